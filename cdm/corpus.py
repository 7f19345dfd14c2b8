"""Any source of instruction data -> Documents in a fixed order, split by hash (layer 2).

A corpus folder holds parts `{split}-{index:05d}.parquet` (columns id, prompt, response, metadata) and a manifest. Texts
are NFC. The order is by document id, a content hash: it does not depend on the order of the source, and any run of
documents is a random sample. The split of a document depends on its prompt alone, so that no prompt of the test split
is trained on with another response. Where a later stage generates responses (cdm/generation.py), documents without
one are kept, with an empty response.

Millions of documents: texts wait on disk, in unnamed temporary files by the first digits of their ids, and one such
bucket is in memory at a time; what stays in memory is 16 bytes of hash per document (about 100 with Python's own),
twice that where responses are generated.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from cdm import parts, python_functions, sources
from cdm.config import digest
from cdm.config_corpus import AnyCorpus, HuggingFace, PythonPackages
from cdm.documents import DroppedError, Replace, document_of
from cdm.records import Document, Message

SPLITS = ("train", "validation", "test")
ROW_GROUP = 16  # documents; small, so that a batch's documents are read without the rest of the part
SHORT_RESPONSE = 64  # bytes; a shorter response ("Yes.") is a duplicate only together with its prompt
_RECIPE = 2  # part of the identity: raise it when the same source gives other documents
_BUCKET_DIGITS = 2
_PROGRESS_EVERY = 1000
_SPLIT_SALT = b"cdm split 2:"

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt", pa.list_(_MESSAGE)), ("response", pa.string()), ("metadata", pa.string())]
)
Progress = Callable[[int], None]


def write_corpus(
    config: AnyCorpus, folder: str, progress: Progress | None = None, *, replace: Replace | None = None
) -> parts.Manifest:
    """Gather, clean, split and write the documents that a config's `corpus` section asks for.

    With `replace` a later stage generates responses: prompts without one are kept, unless the same prompt has one in
    another row. `progress` hears the number of rows read so far. A finished folder of the same identity is returned as
    it is. Of equal documents, and of documents whose responses differ in white space alone, the one with the lowest id
    stays. The manifest's meta: identity, source, counts (rows, kept, to_generate and each reason for dropping), splits
    (documents of each), response_bytes, prompt_bytes. Raises ValueError where the folder holds another corpus, where
    the source lacks a column or has a broken line, and where nothing is left to train on.
    """
    identity = corpus_identity(config, replace)
    if parts.is_finished(folder):
        return parts.read_manifest(folder, {"kind": "corpus", "identity": identity})
    counts: Counter[str] = Counter()
    with _Buckets(_spill_folder(folder)) as buckets:
        answered = _gather(config, replace, buckets, counts, progress)
        writer = _SplitWriter(folder, config.part_documents)
        for split, document in _select(config, replace, buckets, answered, counts):
            writer.add(split, document)
        writer.close()
    if not writer.documents["train"]:
        raise ValueError(f"corpus: no training document is left of {counts['rows']} rows ({dict(counts)})")
    meta = {
        "identity": identity,
        "source": config.type,
        "counts": dict(counts),
        "splits": {split: writer.documents[split] for split in SPLITS},
        "response_bytes": writer.response_bytes,
        "prompt_bytes": writer.prompt_bytes,
    }
    return parts.finish(
        folder, meta, kind="corpus", names=[part.name for part in writer.written], written=writer.written
    )


def corpus_identity(config: AnyCorpus, replace: Replace | None = None) -> str:
    """Hex sha256 of what was asked and of what the source holds, but not of where it lies.

    Files count by their content, a hub dataset by name, subset, split and revision, Python packages by the Python
    version and (unless only the standard library is asked for) the installed distributions.
    """
    if isinstance(config, PythonPackages):
        return digest(_RECIPE, replace, config, _python_identity(config))
    if isinstance(config, HuggingFace):
        folder = os.path.expanduser(config.name)
        local = os.path.exists(folder)
        asked = config.model_dump(mode="json", exclude={"name"} if local else None)
        return digest(_RECIPE, replace, asked, sources.file_checksums(folder) if local else None)
    asked = config.model_dump(mode="json", exclude={"path"})
    return digest(_RECIPE, replace, asked, sources.file_checksums(config.path))


def read_documents(folder: str, part_name: str, *, expect: parts.Part | None = None) -> list[Document]:
    """The documents of one part, in order. Raises ValueError naming the part where it is missing or broken."""
    return documents_of(parts.read_part(folder, part_name, expect=expect))


def documents_of(table: pa.Table) -> list[Document]:
    """The documents in a table of the corpus schema (a part, or some of its row groups)."""
    return [
        Document(
            row["id"],
            tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]),
            row["response"],
            json.loads(row["metadata"]),
        )
        for row in table.to_pylist()
    ]


def with_all_splits(corpus: str) -> parts.Manifest:
    """A corpus's manifest. Raises ValueError naming the splits that have no documents."""
    manifest = parts.read_manifest(corpus)
    empty = [split for split, documents in manifest.meta["splits"].items() if not documents]
    if empty:
        raise ValueError(f"corpus: no documents in {', '.join(empty)}; take more documents or a larger share")
    return manifest


def split_parts(manifest: parts.Manifest, split: str) -> list[str]:
    """The names of a split's parts, in order. Works for corpora, shards and aligned folders alike."""
    return [name for name in manifest.names if name.startswith(f"{split}-")]


def split_of(prompt: tuple[Message, ...], validation_share: float, test_share: float) -> str:
    """The split of every document with this prompt, white space aside: a salted hash of it against the shares."""
    asked = json.dumps([[message.role, " ".join(message.content.split())] for message in prompt])
    point = int.from_bytes(hashlib.sha256(_SPLIT_SALT + asked.encode()).digest()[:8], "big") / 2**64
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"


def to_generate(document: Document, split: str, replace: Replace | None) -> bool:
    """Whether the response of a document of this split is yet to be written. Held-out documents keep what is given."""
    return replace is not None and (not document.response or (replace == "all" and split == "train"))


# --- gathering ---------------------------------------------------------------------------------------------------


def _gather(
    config: AnyCorpus,
    replace: Replace | None,
    buckets: _Buckets,
    counts: Counter[str],
    progress: Progress | None,
) -> set[bytes]:
    """Put every usable document into the buckets; `counts` learns the reasons of the others.

    Returns the keys of the prompts that have a response, where some may lack one.
    """
    distinct: set[bytes] = set()
    answered: set[bytes] = set()
    for group in _row_groups(config, counts):
        for where, row in group:
            counts["rows"] += 1
            if progress is not None and counts["rows"] % _PROGRESS_EVERY == 0:
                progress(counts["rows"])
            try:
                document = document_of(config, replace, where, row)
            except DroppedError as reason:
                counts[str(reason)] += 1
                continue
            buckets.add(document)
            if replace is not None and document.response:
                answered.add(_prompt_key(document.prompt))
            if config.max_documents is not None:
                distinct.add(_duplicate_key(document))
        if config.max_documents is not None and len(distinct) >= config.max_documents:
            break
    if progress is not None:
        progress(counts["rows"])
    return answered


def _row_groups(config: AnyCorpus, counts: Counter[str]) -> Iterator[Iterator[tuple[str, sources.Row]]]:
    """The source as groups of rows; a group is read as a whole, the next one only while documents are wanted."""
    if isinstance(config, PythonPackages):
        for locations in python_functions.package_groups(config.packages):
            yield _function_rows(locations, counts)
        return
    texts = [config.messages] if config.messages else [config.prompt, *filter(None, [config.response])]
    columns = list(dict.fromkeys([*texts, *config.metadata]))
    yield sources.rows_of(config, columns)


def _function_rows(locations: list[Any], counts: Counter[str]) -> Iterator[tuple[str, sources.Row]]:
    for function in python_functions.functions(locations, counts):
        metadata = {"module": function.module, "name": function.qualname}
        where = f"{function.module}.{function.qualname}"
        yield where, {"prompt": function.signature, "response": function.body, "metadata": metadata}


# --- ordering and writing ----------------------------------------------------------------------------------------


def _select(
    config: AnyCorpus, replace: Replace | None, buckets: _Buckets, answered: set[bytes], counts: Counter[str]
) -> Iterator[tuple[str, Document]]:
    """The first `max_documents` documents by id with their splits, without duplicates."""
    seen: set[bytes] = set()
    for document in buckets:
        split = split_of(document.prompt, config.validation_share, config.test_share)
        wanted = to_generate(document, split, replace)
        key = _prompt_key(document.prompt) if wanted else _duplicate_key(document)
        if key in seen or (not document.response and key in answered):
            counts["duplicates"] += 1
        elif config.max_documents is not None and counts["kept"] == config.max_documents:
            counts["beyond_max_documents"] += 1
        else:
            seen.add(key)
            counts["kept"] += 1
            counts.update(["to_generate"] if wanted else [])
            yield split, document


def _duplicate_key(document: Document) -> bytes:
    """Equal for documents that teach the same: white space aside, equal responses (short ones: and prompts)."""
    text = " ".join(document.response.split())
    if len(text.encode()) < SHORT_RESPONSE:
        text = "\0".join([*_asked(document.prompt), text])
    return hashlib.sha256(text.encode()).digest()[:16]


def _prompt_key(prompt: tuple[Message, ...]) -> bytes:
    """Equal for prompts that are equal, white space aside; no key of a document with a response."""
    return hashlib.sha256("\0".join([*_asked(prompt), ""]).encode()).digest()[:16]


def _asked(prompt: tuple[Message, ...]) -> list[str]:
    return [" ".join(message.content.split()) for message in prompt]


class _Buckets:
    """Documents on disk by the first digits of their ids; iterating gives them by id, one bucket in memory."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}

    def __enter__(self) -> _Buckets:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, document: Document) -> None:
        name = document.id[:_BUCKET_DIGITS]
        if name not in self._files:
            self._files[name] = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self._folder)  # noqa: SIM115
        turns = [[message.role, message.content] for message in document.prompt]
        line = json.dumps([document.id, turns, document.response, document.metadata], ensure_ascii=True)
        self._files[name].write(line + "\n")

    def __iter__(self) -> Iterator[Document]:
        for name in sorted(self._files):
            file = self._files[name]
            file.seek(0)
            for line in sorted(file):  # by id: a line begins with it
                id_, turns, response, metadata = json.loads(line)
                yield Document(id_, tuple(Message(*turn) for turn in turns), response, metadata)


@dataclass
class _SplitWriter:
    """Fills one part of each split at a time."""

    folder: str
    part_documents: int
    documents: Counter[str] = field(default_factory=Counter)
    response_bytes: int = 0
    prompt_bytes: int = 0
    written: list[parts.Part] = field(default_factory=list)
    _open: dict[str, list[Document]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def add(self, split: str, document: Document) -> None:
        self._open[split].append(document)
        self.documents[split] += 1
        self.response_bytes += len(document.response.encode())
        self.prompt_bytes += sum(len(message.content.encode()) for message in document.prompt)
        if len(self._open[split]) == self.part_documents:
            self._flush(split)

    def close(self) -> None:
        for split in SPLITS:
            if self._open[split]:
                self._flush(split)
        self.written.sort(key=lambda part: (SPLITS.index(part.name.split("-")[0]), part.name))

    def _flush(self, split: str) -> None:
        name = f"{split}-{(self.documents[split] - 1) // self.part_documents:05d}.parquet"
        table = table_of(self._open[split])
        self.written.append(parts.write_part(self.folder, name, table, row_group_size=ROW_GROUP))
        self._open[split] = []


def table_of(documents: list[Document]) -> pa.Table:
    rows = [
        {
            "id": document.id,
            "prompt": [{"role": message.role, "content": message.content} for message in document.prompt],
            "response": document.response,
            "metadata": json.dumps(document.metadata, sort_keys=True, ensure_ascii=False),
        }
        for document in documents
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def _spill_folder(folder: str) -> str | None:
    """Beside the corpus where that is a local folder (it has the room), else the system's place for temporary files."""
    local = parts.local_path(folder)
    if local is not None:
        os.makedirs(local, exist_ok=True)
    return local


def _python_identity(config: PythonPackages) -> list[str]:
    standard_only = config.packages is not None and {name.split(".")[0] for name in config.packages} <= set(
        sys.stdlib_module_names
    )
    if standard_only:
        return [python_functions.python_version()]
    installed = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    return [python_functions.python_version(), *sorted(installed)]
