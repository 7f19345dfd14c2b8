"""A directory of Parquet parts with a manifest written last, on a local path or any fsspec URL (layer 1, no torch).

A part is written under a temporary name, fsynced and renamed (an object store's put is atomic by itself), and a table
written twice is the same file byte for byte. `parts.parquet`, a row a part, stays small and quick at a million parts.
`manifest.json` appears last: its existence means that the stage is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
PARTS = "parts.parquet"
SCHEMA_VERSION = 2
_PARTS = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.binary(32))])
_TEMPORARY = ".tmp"
_CHUNK = 1 << 20
_THREADS = 8  # checksums are bound by the disk or the network, not by Python


class UnfinishedError(ValueError):
    """A folder without a manifest: the stage that writes it has not finished."""


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet file of a folder. `bytes` is its size, `sha256` the hex checksum of the file."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds. `kind` is the stage (corpus, shards, aligned), `meta` plain JSON values."""

    schema_version: int
    kind: str
    meta: dict[str, Any]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the kind, the meta and every part's name and checksum: equal folders, equal fingerprints."""
        content = [self.kind, self.meta, [[part.name, part.sha256] for part in self.parts]]
        return hashlib.sha256(_canonical(content)).hexdigest()

    def part(self, name: str) -> Part:
        """The part of that name. Raises ValueError where the manifest lists none."""
        if name not in self._by_name:
            raise ValueError(f"{name}: not in this {self.kind} manifest of {len(self.parts)} parts")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}


# --- writing -----------------------------------------------------------------------------------------------------


def write_part(
    folder: str,
    name: str,
    table: pa.Table,
    *,
    row_group_size: int | None = None,
    compression_level: int = 3,
    column_encoding: Mapping[str, str] | None = None,
    use_dictionary: bool | Sequence[str] = False,
) -> Part:
    """Write one part (zstd) atomically and return what the manifest will say of it.

    Writing the same table again leaves the same bytes. `use_dictionary` names the columns to dictionary-encode; a
    column with an entry in `column_encoding` cannot be one of them. Raises OSError where the disk is full: nothing is
    left under `name` then.
    """
    _check_name(name)
    data = _parquet(
        table,
        row_group_size=row_group_size,
        compression_level=compression_level,
        use_dictionary=use_dictionary if isinstance(use_dictionary, bool) else list(use_dictionary),
        column_encoding=dict(column_encoding) if column_encoding else None,
    )
    write_bytes(folder, name, memoryview(data))
    return Part(name, table.num_rows, data.size, hashlib.sha256(data).hexdigest())


def _parquet(table: pa.Table, **options: Any) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    whole = table.combine_chunks()  # page bounds follow the chunks, which are no part of a table's value
    fixed = {"version": "2.6", "data_page_version": "1.0", "compression": "zstd", "write_statistics": False}
    pq.write_table(whole, sink, **fixed, **options)
    return sink.getvalue()


def write_bytes(folder: str, name: str, data: bytes | memoryview) -> None:
    """Put a small or large file into a folder (made if need be): all of it under its name, or nothing."""
    local = local_path(folder)
    if local is None:
        fs, root = _remote(folder)
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name}", bytes(data))
        return
    os.makedirs(local, exist_ok=True)
    with _temporary(local, name) as path:
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a full disk does not say which one
            raise OSError(error.errno, error.strerror, local) from error
        os.replace(path, os.path.join(local, name))
    fsync_folder(local)


def finish(
    folder: str, meta: dict[str, Any], *, kind: str, names: Sequence[str] | None = None, written: Iterable[Part] = ()
) -> Manifest:
    """Write the table of parts, then the manifest, which ends a stage; remove what killed writers left behind.

    `names` are the parts that belong to the folder, in order (default: every part there, by name); `written` are parts
    whose checksum is known because this process just wrote them, the others are read. Raises ValueError where a part is
    missing or is no Parquet file.
    """
    present = list_parts(folder)
    names = present if names is None else list(names)
    missing = sorted(set(names) - set(present))
    if missing:
        raise ValueError(f"{folder}: cannot finish {kind}: {len(missing)} parts are missing, the first is {missing[0]}")
    known = {part.name: part for part in written}
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda name: _measure(folder, name), [name for name in names if name not in known])
        known |= {part.name: part for part in read}
    manifest = Manifest(SCHEMA_VERSION, kind, json.loads(_canonical(meta)), tuple(known[name] for name in names))
    _remove_temporaries(folder)
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: str, manifest: Manifest) -> None:
    """`parts.parquet`, then `manifest.json` with its checksum, which ties one to the other."""
    parts = manifest.parts
    columns = [[part.name for part in parts], [part.rows for part in parts], [part.bytes for part in parts]]
    columns.append([bytes.fromhex(part.sha256) for part in parts])
    table = pa.Table.from_pydict(dict(zip(_PARTS.names, columns, strict=True)), schema=_PARTS)
    data = _parquet(table, compression_level=3, use_dictionary=False)
    write_bytes(folder, PARTS, memoryview(data))
    about = {"schema_version": manifest.schema_version, "kind": manifest.kind, "meta": manifest.meta}
    about |= {"parts": len(parts), "rows": manifest.rows, "bytes": manifest.bytes}
    about["parts_sha256"] = hashlib.sha256(data).hexdigest()
    write_bytes(folder, MANIFEST, (json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


# --- reading -----------------------------------------------------------------------------------------------------


def list_parts(folder: str) -> list[str]:
    """The names of the parts in a folder, sorted; empty where there is no such folder.

    Temporary files are no parts, nor is the table of parts.
    """
    return sorted(n for n in _names(folder) if n.endswith(".parquet") and not n.startswith(".") and n != PARTS)


def part_exists(folder: str, name: str) -> bool:
    local = local_path(folder)
    if local is not None:
        return os.path.isfile(os.path.join(local, name))
    fs, root = _remote(folder)
    return fs.exists(f"{root}/{name}")


def missing_parts(folder: str, names: Sequence[str]) -> list[str]:
    """Those of `names` that a folder lacks, in the order given: what is left to do."""
    present = set(list_parts(folder))
    return [name for name in names if name not in present]


def is_finished(folder: str) -> bool:
    return part_exists(folder, MANIFEST)


def read_manifest(folder: str, expect: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a finished folder.

    `expect` maps `kind` or keys of the meta to the values they must have. Raises UnfinishedError (a ValueError) where
    there is no manifest, ValueError naming the key and both values where one differs.
    """
    expect = dict(expect or {})
    if not is_finished(folder):
        stage = expect.get("kind", os.path.basename(folder.rstrip("/")))
        raise UnfinishedError(f"{folder}: the {stage} stage is unfinished (no {MANIFEST}); run it first")
    with _open(folder, MANIFEST) as file:
        text = file.read()
    try:
        about = json.loads(text)
        version = about["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{folder}: schema_version is {version}, this version reads {SCHEMA_VERSION}; rerun the stage"
            )
        manifest = Manifest(version, about["kind"], about["meta"], _read_parts(folder, about["parts_sha256"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/{MANIFEST}: not a manifest ({error!r}); remove it and rerun the stage") from error
    found = {"kind": manifest.kind, **manifest.meta}
    for key, wanted in json.loads(_canonical(expect)).items():
        if key not in found or found[key] != wanted:
            shown = repr(found[key]) if key in found else "absent"
            raise ValueError(f"{folder}: {key} is {shown}, expected {wanted!r}; rerun the stage or name another folder")
    return manifest


def _read_parts(folder: str, checksum: str) -> tuple[Part, ...]:
    """The table of parts. Raises ValueError where it is missing or not the one that the manifest was written with."""
    with _open(folder, PARTS) as file:
        data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise ValueError(
            f"{folder}/{PARTS}: sha256 is {found}, the manifest says {checksum}; remove {MANIFEST} and rerun the stage"
        )
    names, rows, sizes, sums = (column.to_pylist() for column in pq.read_table(pa.BufferReader(data)).columns)
    return tuple(map(Part, names, rows, sizes, map(bytes.hex, sums)))


def read_part(folder: str, name: str, columns: Sequence[str] | None = None, *, expect: Part | None = None) -> pa.Table:
    """One part as a table. `expect` (from the manifest) has the file's size and checksum compared before it is read.

    Raises ValueError naming the part where it is missing, truncated or changed.
    """
    with _open(folder, name) as file:
        data = file.read()
    if expect is not None:
        _compare(folder, expect, len(data), hashlib.sha256(data).hexdigest())
    try:
        return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{folder}/{name}: no whole Parquet file ({len(data)} bytes): {error}") from error


def open_part(folder: str, name: str, *, expect: Part | None = None) -> pq.ParquetFile:
    """One part, open for reading by row group. With `expect` its size is compared (`verify` compares checksums).

    Raises ValueError naming the part where it is missing, truncated or of another size.
    """
    local = local_path(folder)
    fs, root = (None, local) if local is not None else _remote(folder)
    path = f"{root}/{name}"
    try:
        size = os.path.getsize(path) if fs is None else fs.info(path)["size"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder}/{name}: no such part") from error
    if expect is not None:
        _compare(folder, expect, size, expect.sha256)
    try:
        return pq.ParquetFile(path, filesystem=fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{folder}/{name}: no whole Parquet file ({size} bytes): {error}") from error


def check_parts(folder: str, manifest: Manifest) -> Iterator[tuple[Part, str | None]]:
    """Each part, and how its file differs from the manifest; None where it does not."""

    def fault(part: Part) -> str | None:
        try:
            _compare(folder, part, *_checksum(folder, part.name))
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(manifest.parts, pool.map(fault, manifest.parts), strict=True)


def verify(folder: str) -> Manifest:
    """Read every part and compare size and checksum with the manifest. Raises ValueError naming the first to differ."""
    manifest = read_manifest(folder)
    for _, fault in check_parts(folder, manifest):
        if fault is not None:
            raise ValueError(fault)
    return manifest


def local_path(folder: str) -> str | None:
    """The local path of a folder; None where it is a URL of another file system."""
    if "://" not in folder:
        return os.path.expanduser(folder)
    return folder.removeprefix("file://") if folder.startswith("file://") else None


def fsync_folder(path: str) -> None:
    """Make renames inside a local folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- inside ------------------------------------------------------------------------------------------------------


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _check_name(name: str) -> None:
    if not name.endswith(".parquet") or name.startswith(".") or "/" in name or name == PARTS:
        raise ValueError(f"{name}: a part's name ends with .parquet, has no slash, no leading dot, and is not {PARTS}")


def _remote(folder: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, root = fsspec.core.url_to_fs(folder)
    return fs, root.rstrip("/")


@contextlib.contextmanager
def _temporary(folder: str, name: str) -> Iterator[str]:
    """A free name beside `name`; whatever is left under it at the end is removed."""
    path = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _names(folder: str) -> list[str]:
    local = local_path(folder)
    if local is not None:
        return os.listdir(local) if os.path.isdir(local) else []
    fs, root = _remote(folder)
    fs.invalidate_cache(root)  # other machines write here too
    return [path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)] if fs.exists(root) else []


def _remove_temporaries(folder: str) -> None:
    local = local_path(folder)
    if local is None:
        return
    for name in _names(folder):
        if name.startswith(".") and name.endswith(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError):  # its writer may be alive and have renamed it just now
                os.unlink(os.path.join(local, name))


def _open(folder: str, name: str) -> BinaryIO:
    local = local_path(folder)
    try:
        if local is not None:
            return open(os.path.join(local, name), "rb")
        fs, root = _remote(folder)
        return fs.open(f"{root}/{name}", "rb")
    except FileNotFoundError as error:
        raise ValueError(f"{folder}/{name}: no such part") from error


def _checksum(folder: str, name: str) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with _open(folder, name) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _measure(folder: str, name: str) -> Part:
    size, checksum = _checksum(folder, name)
    with open_part(folder, name) as file:
        return Part(name, file.metadata.num_rows, size, checksum)


def _compare(folder: str, part: Part, size: int, checksum: str) -> None:
    where = f"{folder}/{part.name}"
    if size != part.bytes:
        raise ValueError(f"{where}: {size} bytes, the manifest says {part.bytes}; delete the part and rerun the stage")
    if checksum != part.sha256:
        raise ValueError(
            f"{where}: sha256 is {checksum}, the manifest says {part.sha256}; delete it and rerun the stage"
        )
