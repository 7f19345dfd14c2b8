"""`cdm inspect` over a small storage folder that the stages' own functions wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from cdm import parts
from cdm.alignment import exact_bounds
from cdm.batches import align_part
from cdm.config_corpus import Jsonl
from cdm.corpus import read_documents, write_corpus
from cdm.grouping import Grouping
from cdm.inspection import inspect_path
from cdm.records import Alignment, Document
from cdm.shards import finish_shards, write_scores
from cdm.teacher import TeacherScorer
from cdm.text_view import (
    BETWEEN_GROUPS,
    BETWEEN_TOKENS,
    NO_WIDTH,
    bytes_text,
    draw_alignment,
    draw_tokens,
    pieces,
    visible,
)
from cdm.tokenizers import load_tokenizer
from tests.tiny import documents, tiny_student, tiny_teacher


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder as the pipeline lays it out."""
    root = tmp_path_factory.mktemp("storage")
    source = root.parent / "source.jsonl"
    rows = [{"prompt": d.prompt[-1].content, "response": d.response} for d in documents(24)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("models", "students", "runs"):
        (root / folder).mkdir()
    teacher = tiny_teacher(root / "models" / "tiny-qwen2-0123456789ab")
    student = tiny_student(root / "students" / "run-cdm-0123456789ab")
    (Path(student) / "cdm.json").write_text(json.dumps({"method": {"type": "cdm", "alpha": 0.5}}))
    section = Jsonl(type="jsonl", path=str(source), validation_share=0.2, test_share=0.2, part_documents=8)
    corpus = write_corpus(section, str(root / "corpus" / "c"))
    shards = score(corpus, root, teacher)
    align(corpus, shards, root, student)
    state = {"training": {"model": {"w": torch.zeros(3, 5)}, "step": 50}}
    for step in (25, 50):
        dcp.save(state, checkpoint_id=root / "runs" / "train-cdm" / f"step_{step:08d}", no_dist=True)
    (root / "runs" / "train-cdm" / "checkpoint_manager_snapshot.json").write_text("{}")
    return root


def score(corpus: parts.Manifest, root: Path, teacher: str) -> parts.Manifest:
    options = {"type": "transformers", "dtype": "float32", "batch_tokens": 512}
    scorer = TeacherScorer(teacher, engine=options, top_k=8, max_length=96)
    identity = {
        "teacher": "tiny-qwen2",
        "teacher_identity": "0" * 64,
        "tokenizer_t": scorer.tokenizer.fingerprint,
        "k": 8,
        "corpus": corpus.fingerprint,
    }
    folder = str(root / "shards" / "tiny-qwen2-s")
    for name in corpus.names:
        scored, quarantined = scorer(read(root, name))
        write_scores(folder, name, scored, quarantined=quarantined, identity=identity)
    return finish_shards(folder, corpus.names, identity)


def read(root: Path, name: str) -> list[Document]:
    return read_documents(str(root / "corpus" / "c"), name)


def align(corpus: parts.Manifest, shards: parts.Manifest, root: Path, student: str) -> None:
    folder, tokenizer = str(root / "aligned" / "a"), load_tokenizer(student)
    total = dict.fromkeys(("documents", "groups", "one_to_one"), 0)
    for name in corpus.names:
        table, counts = align_part(
            str(root / "corpus" / "c"),
            [str(root / "shards" / "tiny-qwen2-s")],
            name,
            Grouping("exact", tokenizer),
            max_length=128,
        )
        parts.write_part(folder, name, table, row_group_size=16)
        total = {key: total[key] + counts[key] for key in total}
    meta = {"corpus": corpus.fingerprint, "shards": [shards.fingerprint], "max_length": 128, "counts": total}
    parts.finish(folder, meta, kind="aligned", names=corpus.names)


@pytest.fixture
def look(storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What `inspect_path` prints for a path below the storage folder."""
    monkeypatch.setattr("cdm.progress.console._width", 120)

    def printed(path: str, rows: int = 2) -> str:
        inspect_path(str(storage / path), rows)
        return capsys.readouterr().out

    return printed


def test_a_corpus_folder(look, storage: Path) -> None:
    shown = look("corpus/c")
    manifest = parts.read_manifest(str(storage / "corpus" / "c"))
    assert manifest.fingerprint in shown.replace("\n", "").replace(" ", "")
    assert f"{len(manifest.parts)} (train " in shown
    first = read(storage, "train-00000.parquet")
    assert first[0].id in shown and first[1].id in shown and first[2].id not in shown
    assert first[0].response.splitlines()[0] in shown


def test_one_part_of_a_corpus(look, storage: Path) -> None:
    shown = look("corpus/c/test-00000.parquet", rows=1)
    assert "a part of corpus" in shown
    assert read(storage, "test-00000.parquet")[0].id in shown


def test_a_shards_folder_spells_what_the_teacher_ranked(look, storage: Path) -> None:
    shown = look("shards/tiny-qwen2-s", rows=6)
    assert "mass outside the top k" in shown and "bytes a token" in shown
    assert "cannot be loaded" not in shown and "are left out" not in shown
    assert "⟨end⟩" in shown, "the end of the turn is a token of its own"


def test_shards_without_their_teacher_show_numbers(storage: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(storage / "shards", tmp_path / "shards")
    inspect_path(str(tmp_path / "shards" / "tiny-qwen2-s" / "train-00000.parquet"), 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokenizer cannot be loaded, ids are shown as numbers" in shown
    assert "no corpus folder with fingerprint" in shown
    assert "#" in shown


def test_an_aligned_folder_draws_both_sides(look, storage: Path) -> None:
    shown = look("aligned/a", rows=3)
    lines = [line for line in shown.splitlines() if line[:3] in (f"s {BETWEEN_GROUPS}", f"t {BETWEEN_GROUPS}")]
    assert lines and len(lines) % 2 == 0
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        assert above.startswith("s") and below.startswith("t")
        assert text_of([above]) == text_of([below]), "a group spells the same on both sides"
    assert "one token each" in shown


def test_an_aligned_folder_whose_shards_are_gone(storage: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(storage / "aligned", tmp_path / "aligned")
    inspect_path(str(tmp_path / "aligned" / "a"), 1)
    assert "no shards folder with fingerprint" in " ".join(capsys.readouterr().out.split())


def test_an_unfinished_folder_says_so(storage: Path, tmp_path: Path, capsys) -> None:
    for kind, name in (("corpus", "c"), ("shards", "tiny-qwen2-s"), ("aligned", "a")):
        folder = shutil.copytree(storage / kind / name, tmp_path / kind / name)
        (folder / "manifest.json").unlink()
        inspect_path(str(folder), 1)
        assert "unfinished" in capsys.readouterr().out, kind


def test_a_model_folder(look) -> None:
    shown = look("models/tiny-qwen2-0123456789ab")
    assert "Qwen2ForCausalLM" in shown and "ByteLevel" in shown and "<|im_end|>" in shown
    assert "parameters" in shown


def test_the_parameters_are_those_of_the_model(look, storage: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = storage / "students" / "run-cdm-0123456789ab"
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    shown = look("students/run-cdm-0123456789ab")
    assert f"{count:,} (F32)" in shown
    assert "alpha 0.5" in shown, "the lineage in cdm.json"


def test_a_checkpoint_and_the_run_it_is_of(look) -> None:
    checkpoint = look("runs/train-cdm/step_00000050")
    assert "1 tensors, 15 numbers (float32)" in checkpoint
    assert "training.step" in checkpoint
    run = look("runs/train-cdm")
    assert "step_00000025, step_00000050" in run
    assert "15 numbers" in run


def test_a_storage_folder_and_one_stage_of_it(look, storage: Path) -> None:
    half = storage / "shards" / "half"
    half.mkdir()
    shutil.copy(storage / "shards" / "tiny-qwen2-s" / "train-00000.parquet", half)
    try:
        shown, stage = look(""), look("shards")
    finally:
        shutil.rmtree(half)
    rows = parts.read_manifest(str(storage / "corpus" / "c")).rows
    for name in ("corpus", "tiny-qwen2-s", "run-cdm-0123456789ab", "train-cdm", f"{rows} documents"):
        assert name in shown
    assert "unfinished" in shown and "half" in stage and "train-cdm" not in stage


@pytest.mark.parametrize("path", ["", "nothing-here", "notes.txt", "some.parquet"])
def test_anything_else_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no stage wrote this")
    if path == "some.parquet":
        parts.write_part(str(tmp_path), path, pa.table({"x": [1]}))
    with pytest.raises(ValueError, match=r"expected|no such file"):
        inspect_path(str(tmp_path / path))


# --- drawing -----------------------------------------------------------------------------------------------------


def text_of(lines: list[str]) -> str:
    """What drawn lines of one side spell, without padding, separators and tokens of no width."""
    cells = [cell for line in lines for cell in line[2:].split(BETWEEN_GROUPS)]
    return "".join(cell.rstrip() for cell in cells).replace(BETWEEN_TOKENS, "").replace(NO_WIDTH, "")


def test_an_alignment_by_hand() -> None:
    alignment = Alignment(np.array([0, 2, 3, 4]), np.array([0, 2, 4, 5]))
    tokens_s, tokens_t = ["un", "happy", "␣cat", "⟨end⟩"], ["unhap", "py", "␣c", "at", "⟨end⟩"]
    drawn = [line.plain for line in draw_alignment(tokens_s, tokens_t, alignment, 80)]
    assert drawn == ["s │un╎happy│␣cat │⟨end⟩", "t │unhap╎py│␣c╎at│⟨end⟩"]


def test_white_space_control_characters_and_cut_characters_are_visible() -> None:
    assert visible(" a\tb\r\n\x00") == "␣a→b␍⏎⟨00⟩"
    assert pieces("é ", np.array([1, 2, 3, 3])) == ["⟨c3⟩", "⟨a9⟩", "␣", "⟨end⟩"]
    assert pieces("", np.array([0])) == ["⟨end⟩"]


@st.composite
def token_pairs(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray]:
    """A text and two ways to cut its bytes into tokens, both with an end of turn."""
    text = draw(st.text(st.sampled_from("ab 日é\n🙂"), min_size=1, max_size=60))
    size = len(text.encode())
    cuts = [sorted(draw(st.sets(st.integers(1, size)))) for _ in range(2)]
    ends_s, ends_t = (np.array([*(c for c in some if c < size), size, size], np.int32) for some in cuts)
    return text, ends_s, ends_t


@settings(deadline=None)
@given(token_pairs(), st.integers(12, 60))
def test_drawn_lines_spell_the_text_line_up_and_fit(pair: tuple[str, np.ndarray, np.ndarray], width: int) -> None:
    text, ends_s, ends_t = pair
    tokens_s, tokens_t = pieces(text, ends_s), pieces(text, ends_t)
    alignment = exact_bounds(ends_s, ends_t)
    drawn = [line.plain for line in draw_alignment(tokens_s, tokens_t, alignment, width)]
    assert text_of(drawn[::2]) == "".join(tokens_s)
    assert text_of(drawn[1::2]) == "".join(tokens_t)
    for above, below in zip(drawn[::2], drawn[1::2], strict=True):
        assert separators(above) == separators(below), "groups stand above one another"
        assert max(cell_len(above), cell_len(below)) <= width or above.count(BETWEEN_GROUPS) == 1


def separators(line: str) -> list[int]:
    """The cells at which groups begin."""
    return [cell_len(line[:at]) for at, character in enumerate(line) if character == BETWEEN_GROUPS]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "bc", "日本", "⟨end⟩"]), max_size=30), st.integers(8, 30))
def test_tokens_of_one_side_all_appear_in_order(tokens: list[str], width: int) -> None:
    assert text_of([line.plain for line in draw_tokens("s", tokens, width)]) == "".join(tokens)


def test_sizes_in_words() -> None:
    sizes = [0, 999, 1000, 1_500_000, 2_000_000_000, 3 * 10**12, 10**16]
    words = ["0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.0 TB", "10,000.0 TB"]
    assert [bytes_text(size) for size in sizes] == words
