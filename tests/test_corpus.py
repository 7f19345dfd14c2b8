"""Corpora: every source, what is dropped and why, the order, the split, and the errors people meet."""

from __future__ import annotations

import ast
import gzip
import json
import os
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import corpus, parts, python_functions
from cdm.config import HuggingFace, Jsonl, ParquetCorpus, PythonPackages
from cdm.records import Document, Message

ROWS = [{"prompt": f"Question {n}?", "response": f"The answer to question {n} is {n * n}."} for n in range(300)]

ALL_TRAIN: dict[str, Any] = {"validation_share": 1e-12, "test_share": 1e-12}  # no id falls below these


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _documents(folder: str | Path, manifest: parts.Manifest, split: str = "") -> list[Document]:
    names = corpus.split_parts(manifest, split) if split else manifest.names
    return [document for name in names for document in corpus.read_documents(str(folder), name)]


def _write(
    tmp_path: Path, rows: list[Any], place: str = "corpus", **options: Any
) -> tuple[parts.Manifest, list[Document]]:
    config = Jsonl(type="jsonl", path=str(_jsonl(tmp_path / f"{place}.jsonl", rows)), **options)
    manifest = corpus.write_corpus(config, str(tmp_path / place))
    return manifest, _documents(tmp_path / place, manifest)


def test_every_document_is_there_once_in_the_order_of_ids(tmp_path: Path) -> None:
    manifest, documents = _write(tmp_path, ROWS, part_documents=32, validation_share=0.1, test_share=0.2)
    assert Counter(d.response for d in documents) == Counter(row["response"] for row in ROWS)
    assert manifest.meta["counts"] == {"rows": 300, "kept": 300}
    assert manifest.meta["response_bytes"] == sum(len(row["response"]) for row in ROWS)
    for split, share in [("train", 0.7), ("validation", 0.1), ("test", 0.2)]:
        inside = _documents(tmp_path / "corpus", manifest, split)
        assert [d.id for d in inside] == sorted(d.id for d in inside)
        assert len(inside) == manifest.meta["splits"][split]
        assert abs(len(inside) / 300 - share) < 0.08
        sizes = [manifest.part(name).rows for name in corpus.split_parts(manifest, split)]
        assert all(size == 32 for size in sizes[:-1]) and 0 < sizes[-1] <= 32
    assert documents[0] == Document(
        corpus.document_id(documents[0].prompt, documents[0].response), documents[0].prompt, documents[0].response, {}
    )
    with parts.open_part(str(tmp_path / "corpus"), "train-00000.parquet") as file:
        assert file.num_row_groups == 2
        assert corpus.documents_of(file.read_row_group(1)) == documents[16:32]


def test_the_order_of_the_source_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with gzip.open(tmp_path / "folder" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in reversed(ROWS[100:]))
    _jsonl(tmp_path / "folder" / "b.jsonl", ROWS[:100])
    first, _ = _write(tmp_path, ROWS)
    second = corpus.write_corpus(Jsonl(type="jsonl", path=str(tmp_path / "folder")), str(tmp_path / "second"))
    assert [part.sha256 for part in first.parts] == [part.sha256 for part in second.parts]
    assert first.meta["identity"] != second.meta["identity"]


def test_the_three_tabular_sources_give_the_same_corpus(tmp_path: Path) -> None:
    import datasets

    _, expected = _write(tmp_path, ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "dict"))
    configs = {
        "parquet": ParquetCorpus(type="parquet", path=str(tmp_path / "rows.parquet")),
        "url": ParquetCorpus(type="parquet", path=f"file://{tmp_path}/rows.parquet"),
        "saved": HuggingFace(type="huggingface", name=str(tmp_path / "saved")),
        "dict": HuggingFace(type="huggingface", name=str(tmp_path / "dict")),
    }
    for place, config in configs.items():
        manifest = corpus.write_corpus(config, str(tmp_path / "out" / place))
        assert _documents(tmp_path / "out" / place, manifest) == expected
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        config = HuggingFace(type="huggingface", name=str(tmp_path / "dict"), split="test")
        corpus.write_corpus(config, str(tmp_path / "none"))


def test_a_folder_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    _jsonl(tmp_path / "data" / "train.jsonl", ROWS[:50])
    config = HuggingFace(type="huggingface", name=str(tmp_path / "data"))
    manifest = corpus.write_corpus(config, str(tmp_path / "out"))
    assert {d.response for d in _documents(tmp_path / "out", manifest)} == {row["response"] for row in ROWS[:50]}


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    long = "The same rather long response, told twice with other white space in between."
    rows = [
        *ROWS[:20],
        ROWS[3],
        {"prompt": "  ", "response": "No question."},
        {"prompt": "Nothing?", "response": ""},
        {"prompt": "Null?", "response": None},
        {"prompt": "Much?", "response": "x" * 200},
        {"prompt": "Half a pair?", "response": "\ud800"},
        {"prompt": "One?", "response": long},
        {"prompt": "Two?", "response": long.replace(" ", "\n  ")},
        {"prompt": "Is it?", "response": "Yes."},
        {"prompt": "Is it really?", "response": "Yes."},
    ]
    manifest, documents = _write(tmp_path, rows, max_response_bytes=100)
    expected = {"rows": 30, "kept": 23, "duplicates": 2, "empty_prompt": 1, "too_short": 2, "too_long": 1}
    assert manifest.meta["counts"] == expected | {"not_unicode": 1}
    assert len(documents) == 23
    twins = [
        Document(corpus.document_id((Message("user", row["prompt"]),), row["response"]), (), "") for row in rows[26:28]
    ]
    assert {twin.id for twin in twins} & {d.id for d in documents} == {min(twin.id for twin in twins)}


def test_texts_are_composed(tmp_path: Path) -> None:
    _, documents = _write(tmp_path, [{"prompt": "Cafe\u0301?", "response": "A\u030angstro\u0308m"}, *ROWS[:30]])
    (found,) = [d for d in documents if "ngstr" in d.response]
    assert (found.prompt[0].content, found.response) == ("Caf\u00e9?", "\u00c5ngstr\u00f6m")


def test_max_documents_takes_the_lowest_ids_and_keeps_the_shares(tmp_path: Path) -> None:
    shares = {"validation_share": 0.2, "test_share": 0.2}
    _, everything = _write(tmp_path, ROWS, **shares)
    manifest, some = _write(tmp_path, ROWS, "some", max_documents=100, **shares)
    assert sorted(d.id for d in some) == sorted(d.id for d in everything)[:100]
    assert manifest.meta["counts"] == {"rows": 300, "kept": 100, "beyond_max_documents": 200}
    assert all(10 <= manifest.meta["splits"][split] <= 32 for split in ("validation", "test"))
    for document in some:
        assert corpus.split_of(document.id, 0.2, 0.2) in corpus.SPLITS


@given(st.text("0123456789abcdef", min_size=32, max_size=32), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_growing_test_share_never_moves_a_test_document(id_: str, validation: float, test: float) -> None:
    if corpus.split_of(id_, 0.0, test) == "test":
        assert corpus.split_of(id_, validation, test) == "test"
        assert corpus.split_of(id_, validation, test + 0.01) == "test"
    assert corpus.split_of(id_, 0.0, 0.0) == "train"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=80)), max_size=25), st.integers(0, 99))
def test_any_text_survives_as_its_slow_twin_says(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], place: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("any")
    pairs = [("Is this always there?", "Yes, whatever else there is."), *pairs]
    pairs.insert(place % (len(pairs) + 1), pairs.pop(0))
    kept: dict[Any, tuple[str, str, str]] = {}
    for prompt, response in pairs:
        prompt, response = (unicodedata.normalize("NFC", text) for text in (prompt, response))
        size = len(response.encode())
        collapsed = " ".join(response.split())
        key = collapsed if len(collapsed.encode()) >= 64 else (" ".join(prompt.split()), collapsed)
        if prompt.strip() and 1 <= size <= 100:
            candidate = (corpus.document_id((Message("user", prompt),), response), prompt, response)
            kept[key] = min(candidate, kept.get(key, candidate))
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    _, documents = _write(tmp_path, rows, max_response_bytes=100, **ALL_TRAIN)
    assert [(d.id, d.prompt[0].content, d.response) for d in documents] == sorted(kept.values())


def test_chat_turns_teach_the_last_assistant_turn(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Nothing."},
        {"role": "user", "content": "Thanks"},
    ]
    share = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Three."}]
    rows = [
        {"messages": chat},
        {"messages": share},
        {"messages": [{"role": "user", "content": "Anyone?"}]},
        {"messages": [{"role": "tool", "content": "{}"}, {"role": "assistant", "content": "Done."}]},
    ]
    manifest, documents = _write(tmp_path, rows, messages="messages", system="You help.", **ALL_TRAIN)
    found = {d.response: [(m.role, m.content) for m in d.prompt] for d in documents}
    assert found == {
        "Nothing.": [(turn["role"], turn["content"]) for turn in chat[:4]],
        "Three.": [("system", "You help."), ("user", "Two?")],
    }
    assert manifest.meta["counts"] == {"rows": 4, "kept": 2, "no_assistant_turn": 1, "unknown_role": 1}


def test_a_finished_corpus_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    manifest, _ = _write(tmp_path, ROWS)
    before = {name: os.stat(tmp_path / "corpus" / name).st_mtime_ns for name in [*manifest.names, parts.MANIFEST]}
    assert _write(tmp_path, ROWS)[0] == manifest
    assert {name: os.stat(tmp_path / "corpus" / name).st_mtime_ns for name in before} == before
    with pytest.raises(ValueError, match=r"identity is '.*', expected '"):
        _write(tmp_path, ROWS[:-1])


def test_the_identity_is_what_was_asked_not_where_it_lies(tmp_path: Path) -> None:
    here, there = _jsonl(tmp_path / "a.jsonl", ROWS), _jsonl(tmp_path / "b.jsonl", ROWS)
    other = _jsonl(tmp_path / "c.jsonl", ROWS[1:])
    identities = [corpus.corpus_identity(Jsonl(type="jsonl", path=str(path))) for path in (here, there, other)]
    assert identities[0] == identities[1] != identities[2]
    assert corpus.corpus_identity(Jsonl(type="jsonl", path=str(here), test_share=0.1)) != identities[0]
    hub = [HuggingFace(type="huggingface", name="some/dataset", revision=revision) for revision in ("v1", "v2")]
    assert corpus.corpus_identity(hub[0]) != corpus.corpus_identity(hub[1])


def test_errors_name_file_line_column_and_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.jsonl:3: not JSON"):
        path = _jsonl(tmp_path / "corpus.jsonl", ROWS[:2])
        path.write_text(path.read_text() + '{"prompt": "cut off')
        corpus.write_corpus(Jsonl(type="jsonl", path=str(path)), str(tmp_path / "corpus"))
    assert not parts.is_finished(str(tmp_path / "corpus"))
    with pytest.raises(ValueError, match=r":1: no column 'reponse'; did you mean 'response'\?"):
        _write(tmp_path, ROWS, response="reponse")
    with pytest.raises(ValueError, match=r":2: expected a JSON object, found list"):
        _write(tmp_path, [ROWS[0], [1]])
    with pytest.raises(ValueError, match=r":1: column 'response' holds int, expected text"):
        _write(tmp_path, [{"prompt": "?", "response": 4}])
    with pytest.raises(ValueError, match=r":1: column 'turns' holds str, expected a list of chat turns"):
        _write(tmp_path, [{"turns": "hello"}], messages="turns")
    with pytest.raises(ValueError, match=r"no training document is left of 1 rows .*too_short"):
        _write(tmp_path, [{"prompt": "?", "response": ""}])
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: no column 'prompts'; did you mean 'prompt'\?"):
        config = ParquetCorpus(type="parquet", path=str(tmp_path / "rows.parquet"), prompt="prompts")
        corpus.write_corpus(config, str(tmp_path / "none"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 500)[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: broken after line 0"):
        corpus.write_corpus(Jsonl(type="jsonl", path=str(tmp_path / "cut.jsonl.gz")), str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: this folder holds no file"):
        corpus.write_corpus(Jsonl(type="jsonl", path=str(tmp_path / "empty")), str(tmp_path / "none"))


def test_progress_hears_the_rows(tmp_path: Path) -> None:
    heard: list[int] = []
    path = _jsonl(tmp_path / "many.jsonl", ROWS * 8)
    corpus.write_corpus(Jsonl(type="jsonl", path=str(path)), str(tmp_path / "corpus"), heard.append)
    assert heard == [1000, 2000, 2400]


# --- Python packages ---------------------------------------------------------------------------------------------

SOURCE = '''
import os

def area(width, height=2, *, unit: str = "m") -> str:
    """The area of a rectangle, as text."""
    # comments belong to the body
    size = width * height
    return f"""{size}
{unit}2"""

class Outer(object):
    """A class is no function, however long its docstring."""

    class Inner:
        @staticmethod
        async def go(
            self,
            far,
        ):
            """Go as far as
            one is told to."""

            if far:
                def helper():
                    """A helper inside a function is part of it."""
                    return 1
                return helper()

def undocumented(x):
    return x

def short(x):
    """Too short."""
    return x

def abstract(x):
    """Has a docstring of a good length but nothing to do."""
    raise NotImplementedError("later")

def one_line(x): "A docstring on the very same line."; return x

if os.name:
    def guarded():
        """Functions under a condition are found as well."""
        return os.name
'''


def test_functions_are_cut_at_the_docstring(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    counts: Counter[str] = Counter()
    found = {f.qualname: f for f in python_functions.functions([("module", tmp_path / "module.py")], counts)}
    assert list(found) == ["Outer.Inner.go", "guarded"]  # the string in `area` hangs out to the left: no clean dedent
    go = found["Outer.Inner.go"]
    assert go.module == "module"
    assert go.signature.splitlines()[:2] == ["class Outer.Inner:", "    async def go("]
    assert go.signature.endswith('one is told to."""')
    assert go.body.splitlines()[:2] == ["if far:", "    def helper():"]
    assert found["guarded"].body == "return os.name"


def test_tests_vendored_generated_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    body = 'def {}():\n    """A docstring that is long enough to count."""\n    return 1\n'
    files = {
        "good.py": body.format("good"),
        "sub/__init__.py": body.format("sub"),
        "latin.py": "# -*- coding: latin-1 -*-\n" + body.format("latin") + "# \xe9\n",
        "tests/x.py": body.format("bad"),
        "_vendor/x.py": body.format("bad"),
        "test_good.py": body.format("bad"),
        "made_pb2.py": body.format("bad"),
        "generated.py": "# Generated by a tool. DO NOT EDIT\n" + body.format("bad"),
        "broken.py": "def f(:\n",
        "bytes.py": "# \xe9\n",
    }
    for name, text in files.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_bytes(text.encode("latin-1"))
    counts: Counter[str] = Counter()
    found = list(python_functions.functions([("package", tmp_path / "package")], counts))
    assert [(f.module, f.qualname) for f in found] == [
        ("package.good", "good"), ("package.latin", "latin"), ("package.sub", "sub")
    ]  # fmt: skip
    assert counts == {"files_read": 3, "files_generated": 1, "files_unparsable": 2}


def test_two_packages_of_the_standard_library(tmp_path: Path) -> None:
    config = PythonPackages(type="python_packages", packages=["email", "json"], validation_share=0.1, test_share=0.1)
    manifest = corpus.write_corpus(config, str(tmp_path / "a"))
    again = corpus.write_corpus(config, str(tmp_path / "b"))
    assert again == manifest
    documents = _documents(tmp_path / "a", manifest)
    assert len(documents) == manifest.meta["counts"]["kept"] > 150
    (dumps,) = [d for d in documents if d.metadata == {"module": "json", "name": "dumps"}]
    assert dumps.prompt[0].content.startswith("def dumps(obj, *, skipkeys=False,")
    assert dumps.prompt[0].content.endswith('"""') and dumps.response.startswith("# cached encoder\nif (not skipkeys")
    for document in documents:
        tree = ast.parse("async def body():\n" + textwrap.indent(document.response, "    "))
        assert tree.body and document.prompt[0].content.lstrip().startswith(("def ", "async def ", "class "))


def test_the_standard_library_comes_first() -> None:
    groups = python_functions.package_groups(None)
    names = [[name for name, _ in group] for group in groups]
    assert {"json", "email", "ast"} <= set(names[0]) and not {"test", "pytest", "numpy"} & set(names[0])
    assert names[1:] == sorted(names[1:]) and ["pytest"] in names[1:] and all(len(group) == 1 for group in names[1:])


def test_packages_are_read_only_while_documents_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        [found for name in (name,) for found in python_functions.package_groups([name])[0]] for name in ("json", "csv")
    )
    monkeypatch.setattr(python_functions, "package_groups", lambda packages: [first, second])
    few, many = (PythonPackages(type="python_packages", max_documents=limit) for limit in (5, 5000))
    modules = []
    for place, config in [("few", few), ("many", many)]:
        manifest = corpus.write_corpus(config, str(tmp_path / place))
        modules.append({d.metadata["module"].split(".")[0] for d in _documents(tmp_path / place, manifest)})
    assert modules == [{"json"}, {"json", "csv"}]


def test_an_unknown_package_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no package 'jsson' here; did you mean json\?"):
        python_functions.package_groups(["jsson"])
    with pytest.raises(ValueError, match=r"no package 'json\.encoders' here"):
        python_functions.package_groups(["json.encoders"])
    assert [path.name for _, path in python_functions.package_groups(["json.encoder"])[0]] == ["encoder.py"]


# --- real data ---------------------------------------------------------------------------------------------------


def test_real_instructions(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "instructions"
    manifest = corpus.write_corpus(
        Jsonl(type="jsonl", path=str(folder / "gsm8k_train.jsonl.gz")), str(tmp_path / "gsm8k")
    )
    counts = manifest.meta["counts"]
    assert counts["rows"] == 7473 and counts["kept"] > 7400
    assert abs(manifest.meta["splits"]["test"] / counts["kept"] - 0.02) < 0.006
    chat = Jsonl(type="jsonl", path=str(folder / "glaive_toolcall_en.jsonl.gz"), messages="conversations")
    manifest = corpus.write_corpus(chat, str(tmp_path / "glaive"))
    assert any(len(d.prompt) > 2 for d in _documents(tmp_path / "glaive", manifest))
