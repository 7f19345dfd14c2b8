"""Rows of JSONL, Parquet and Hugging Face datasets, as (where, row) pairs in a fixed order (layer 2).

`where` is what an error names: file and line, file and row. Every reader checks that the columns are there.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from cdm.config_corpus import Dataset, JsonlFiles, ParquetFiles

Row = dict[str, Any]
_JSONL = (".jsonl", ".jsonl.gz")
_BATCH = 1024  # rows read at once


def jsonl_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file, or of every .jsonl and .jsonl.gz file below a folder.

    Raises ValueError naming file and line for a line that is no JSON object or lacks a column.
    """
    for fs, file in _files(path, _JSONL):
        with fs.open(file, "rb", compression="gzip" if file.endswith(".gz") else None) as lines:
            number = 0
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{file}:{number}", _json_row(line, f"{file}:{number}", columns)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{file}: broken after line {number}: {error}") from error


def parquet_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file, or of every .parquet file below a folder or URL. Raises ValueError for a missing column."""
    for fs, file in _files(path, (".parquet",)):
        with fs.open(file, "rb") as opened, pq.ParquetFile(opened) as parquet:
            require_columns(columns, parquet.schema_arrow.names, file)
            row = 0
            for batch in parquet.iter_batches(_BATCH, columns=list(columns)):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{file}: row {row}", values


def huggingface_rows(
    name: str, columns: Sequence[str], *, subset: str | None, split: str, revision: str | None
) -> Iterator[tuple[str, Row]]:
    """The rows of one split of a dataset: a hub name, or a local folder that `datasets` loads or once saved.

    Raises ValueError for a missing column, and where the folder or dataset has no such split.
    """
    import datasets  # seconds to import, and only this source needs it

    folder = Path(name)
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(name)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{name}: no split {split!r}; it has {', '.join(loaded)}")
            loaded = loaded[split]
    else:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    require_columns(columns, loaded.column_names, f"{name} ({split})")
    row = 0
    for table in loaded.select_columns(list(columns)).with_format("arrow").iter(_BATCH):
        for values in table.to_pylist():
            row += 1
            yield f"{name} ({split}): row {row}", values


def rows_of(source: JsonlFiles | ParquetFiles | Dataset, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows that a section of the config names. Raises ValueError as its reader does."""
    if isinstance(source, JsonlFiles):
        return jsonl_rows(source.path, columns)
    if isinstance(source, ParquetFiles):
        return parquet_rows(source.path, columns)
    name = os.path.expanduser(source.name)
    return huggingface_rows(name, columns, subset=source.subset, split=source.split, revision=source.revision)


def file_checksums(path: str) -> list[list[str]]:
    """[relative name, sha256] of a file (its name left out) or of every file below a folder, by name."""
    found = []
    for fs, file in _files(path, ("",)):
        digest = hashlib.sha256()
        with fs.open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
        found.append([file, digest.hexdigest()])
    if len(found) == 1:
        return [["", found[0][1]]]
    root = _root(path)[1]
    return [[file.removeprefix(root).lstrip("/"), checksum] for file, checksum in found]


def require_columns(columns: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises ValueError naming the first missing column, the place and the nearest known column."""
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, known)) or 'none'}"
            raise ValueError(f"{where}: no column {column!r}; {hint}")


def _json_row(line: bytes, where: str, columns: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    require_columns(columns, list(row), where)
    return row


def _root(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, root = fsspec.core.url_to_fs(path if "://" in path else str(Path(path).expanduser().absolute()))
    return fs, root.rstrip("/")


def _files(path: str, endings: tuple[str, ...]) -> list[tuple[fsspec.AbstractFileSystem, str]]:
    fs, root = _root(path)
    if not fs.exists(root):
        raise ValueError(f"{path}: no such file or folder")
    if fs.isfile(root):
        return [(fs, root)]
    found = sorted(file for file in fs.find(root) if file.endswith(endings) and not _hidden(file.removeprefix(root)))
    if not found:
        raise ValueError(f"{path}: this folder holds no {' or '.join(filter(None, endings)) or 'file'}")
    return [(fs, file) for file in found]


def _hidden(inner: str) -> bool:
    return any(step.startswith(".") for step in inner.split("/"))
