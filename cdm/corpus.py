"""Any source of instruction data -> Documents in a fixed order, split by hash (layer 2).

A corpus folder holds parts `{split}-{index:05d}.parquet` (columns id, prompt, response, metadata) and a manifest. Texts
are NFC. The order is by document id, a content hash: it does not depend on the order of the source, and any run of
documents is a random sample. The split of a document depends on its id alone.

Millions of documents: texts wait on disk, in unnamed temporary files by the first digits of their ids, and one such
bucket is in memory at a time; what stays in memory is 16 bytes of hash per document (about 100 with Python's own).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from cdm import parts, python_functions, sources
from cdm.config import AnyCorpus, Corpus, Fields, HuggingFace, Jsonl, ParquetCorpus, PythonPackages, digest
from cdm.records import Document, Message

SPLITS = ("train", "validation", "test")
ROW_GROUP = 16  # documents; small, so that a batch's documents are read without the rest of the part
ID_LENGTH = 32  # hex digits: 128 bits
SHORT_RESPONSE = 64  # bytes; a shorter response ("Yes.") is a duplicate only together with its prompt
_RECIPE = 1  # part of the identity: raise it when the same source gives other documents
_BUCKET_DIGITS = 2
_PROGRESS_EVERY = 1000
_SPLIT_SALT = b"cdm split 1:"

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt", pa.list_(_MESSAGE)), ("response", pa.string()), ("metadata", pa.string())]
)
# Names of the turns' fields and roles in the two chat formats in use: {role, content} and ShareGPT's {from, value}.
_TURN_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}

Progress = Callable[[int], None]


class _DroppedError(Exception):
    """A row that is no document; the argument is the reason that is counted."""


def write_corpus(config: AnyCorpus, folder: str, progress: Progress | None = None) -> parts.Manifest:
    """Gather, clean, split and write the documents that a config's `corpus` section asks for.

    `progress` hears the number of rows read so far. A finished folder of the same identity is returned as it is. Of
    equal documents, and of documents whose responses differ in white space alone, the one with the lowest id stays.
    The manifest's meta: identity, source, counts (rows, kept and each reason for dropping), splits (documents of each),
    response_bytes, prompt_bytes. Raises ValueError where the folder holds another corpus, where the source lacks a
    column or has a broken line, and where nothing is left to train on.
    """
    identity = corpus_identity(config)
    if parts.is_finished(folder):
        return parts.read_manifest(folder, {"kind": "corpus", "identity": identity})
    counts: Counter[str] = Counter()
    with _Buckets(_spill_folder(folder)) as buckets:
        _gather(config, buckets, counts, progress)
        writer = _SplitWriter(folder, config.part_documents)
        for document in _select(buckets, config.max_documents, counts):
            writer.add(split_of(document.id, config.validation_share, config.test_share), document)
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


def corpus_identity(config: AnyCorpus) -> str:
    """Hex sha256 of what was asked and of what the source holds, but not of where it lies.

    Files count by their content, a hub dataset by name, subset, split and revision, Python packages by the Python
    version and (unless only the standard library is asked for) the installed distributions.
    """
    if isinstance(config, PythonPackages):
        return digest(_RECIPE, config, _python_identity(config))
    if isinstance(config, HuggingFace):
        folder = os.path.expanduser(config.name)
        local = os.path.exists(folder)
        asked = config.model_dump(mode="json", exclude={"name"} if local else None)
        return digest(_RECIPE, asked, sources.file_checksums(folder) if local else None)
    return digest(_RECIPE, config.model_dump(mode="json", exclude={"path"}), sources.file_checksums(config.path))


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


def split_parts(manifest: parts.Manifest, split: str) -> list[str]:
    """The names of a split's parts, in order. Works for corpora, shards and aligned folders alike."""
    return [name for name in manifest.names if name.startswith(f"{split}-")]


def document_id(prompt: tuple[Message, ...], response: str) -> str:
    """Hash of the canonical JSON of prompt and response. Raises UnicodeEncodeError where a text is no Unicode text."""
    content = [[[message.role, message.content] for message in prompt], response]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def split_of(document_id: str, validation_share: float, test_share: float) -> str:
    """The split of a document: a second, salted hash of its id against the shares."""
    point = int.from_bytes(hashlib.sha256(_SPLIT_SALT + document_id.encode()).digest()[:8], "big") / 2**64
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"


# --- gathering ---------------------------------------------------------------------------------------------------


def _gather(config: AnyCorpus, buckets: _Buckets, counts: Counter[str], progress: Progress | None) -> None:
    """Put every usable document into the buckets; `counts` learns the reasons of the others."""
    distinct: set[bytes] = set()
    for group in _row_groups(config, counts):
        for where, row in group:
            counts["rows"] += 1
            if progress is not None and counts["rows"] % _PROGRESS_EVERY == 0:
                progress(counts["rows"])
            try:
                document = _document(config, where, row)
            except _DroppedError as reason:
                counts[str(reason)] += 1
                continue
            buckets.add(document)
            if config.max_documents is not None:
                distinct.add(_duplicate_key(document))
        if config.max_documents is not None and len(distinct) >= config.max_documents:
            break
    if progress is not None:
        progress(counts["rows"])


def _row_groups(config: AnyCorpus, counts: Counter[str]) -> Iterator[Iterator[tuple[str, sources.Row]]]:
    """The source as groups of rows; a group is read as a whole, the next one only while documents are wanted."""
    if isinstance(config, PythonPackages):
        for locations in python_functions.package_groups(config.packages):
            yield _function_rows(locations, counts)
        return
    columns = [config.messages] if config.messages else [config.prompt, config.response]
    if isinstance(config, Jsonl):
        yield sources.jsonl_rows(config.path, columns)
    elif isinstance(config, ParquetCorpus):
        yield sources.parquet_rows(config.path, columns)
    else:
        name = os.path.expanduser(config.name)
        yield sources.huggingface_rows(
            name, columns, subset=config.subset, split=config.split, revision=config.revision
        )


def _function_rows(locations: list[Any], counts: Counter[str]) -> Iterator[tuple[str, sources.Row]]:
    for function in python_functions.functions(locations, counts):
        metadata = {"module": function.module, "name": function.qualname}
        where = f"{function.module}.{function.qualname}"
        yield where, {"prompt": function.signature, "response": function.body, "metadata": metadata}


def _document(config: Corpus, where: str, row: sources.Row) -> Document:
    """A row as a document. Raises _DroppedError with the reason, ValueError where a column holds no text."""
    if isinstance(config, Fields) and config.messages:
        prompt, response = _split_turns(row[config.messages], where, config.messages)
    else:
        names = (config.prompt, config.response) if isinstance(config, Fields) else ("prompt", "response")
        asked, response = (_text(row[name], where, name) for name in names)
        prompt = (Message("user", asked),)
    if isinstance(config, Fields) and config.system and all(message.role != "system" for message in prompt):
        prompt = (Message("system", unicodedata.normalize("NFC", config.system)), *prompt)
    if not any(message.content.strip() for message in prompt if message.role != "system"):
        raise _DroppedError("empty_prompt")
    metadata = row["metadata"] if isinstance(config, PythonPackages) else {}
    try:
        size = len(response.encode())
        document = Document(document_id(prompt, response), prompt, response, metadata)
    except UnicodeEncodeError as error:
        raise _DroppedError("not_unicode") from error  # a lone surrogate, which JSON can spell
    if size < config.min_response_bytes:
        raise _DroppedError("too_short")
    if size > config.max_response_bytes:
        raise _DroppedError("too_long")
    return document


def _text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    return unicodedata.normalize("NFC", value)


def _split_turns(turns: Any, where: str, column: str) -> tuple[tuple[Message, ...], str]:
    """Chat turns -> what precedes the last assistant turn, and that turn."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: column {column!r} holds {type(turns).__name__}, expected a list of chat turns")
    messages = [_message(turn, where, column) for turn in turns]
    last = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise _DroppedError("no_assistant_turn")
    return tuple(messages[:last]), messages[last].content


def _message(turn: dict[str, Any], where: str, column: str) -> Message:
    for role_key, content_key in _TURN_KEYS:
        if role_key in turn and content_key in turn:
            role = _ROLES.get(turn[role_key])
            if role is None:
                raise _DroppedError("unknown_role")
            return Message(role, _text(turn[content_key], where, f"{column}.{content_key}"))
    raise ValueError(f"{where}: a turn in {column!r} has keys {sorted(turn)}, expected role and content")


# --- ordering and writing ----------------------------------------------------------------------------------------


def _select(buckets: _Buckets, limit: int | None, counts: Counter[str]) -> Iterator[Document]:
    """The first `limit` documents by id, without duplicates."""
    seen: set[bytes] = set()
    for document in buckets:
        key = _duplicate_key(document)
        if key in seen:
            counts["duplicates"] += 1
        elif limit is not None and counts["kept"] == limit:
            counts["beyond_max_documents"] += 1
        else:
            seen.add(key)
            counts["kept"] += 1
            yield document


def _duplicate_key(document: Document) -> bytes:
    """Equal for documents that teach the same: white space aside, equal responses (short ones: and prompts)."""
    text = " ".join(document.response.split())
    if len(text.encode()) < SHORT_RESPONSE:
        asked = [" ".join(message.content.split()) for message in document.prompt]
        text = "\0".join([*asked, text])
    return hashlib.sha256(text.encode()).digest()[:16]


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
            rows = sorted((json.loads(line) for line in file), key=lambda row: row[0])
            for id_, turns, response, metadata in rows:
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
