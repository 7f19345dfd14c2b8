"""The shard format: what one teacher says of one corpus, as a folder of Parquet parts (layer 2).

Legend: N response tokens of one document, K top-k. Part `train-00003.parquet` holds the scores of the corpus part of
that name, in its order, without the documents that could not be scored. Those are listed, with the reason, in the
footer of the same file, so that both appear in one rename; `finish_shards` gathers them in `quarantine.parquet`.
A row is a document; a row group is ROW_GROUP_DOCUMENTS of them, coded by itself (`cdm.codec`), so that training reads
any of them alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cdm import codec, parts
from cdm.codec import Codes
from cdm.parts import Manifest, Part
from cdm.records import ScoredDocument

KIND = "shards"
QUARANTINE = "quarantine.parquet"
ROW_GROUP_DOCUMENTS = 16

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("truncated", pa.bool_()),
        ("ids_t", pa.list_(pa.int32())),
        ("ends_t", pa.list_(pa.int32())),
        ("logp_t", pa.list_(pa.float32())),
        ("entropy_t", pa.list_(pa.float32())),
        ("tail_t", pa.list_(pa.float32())),
        ("kept_t", pa.list_(pa.int32())),  # of the top K, in each row
        ("topk_ids_t", pa.binary()),  # these four: cdm.codec, row after row
        ("topk_ids_more_t", pa.binary()),
        ("topk_logp_t", pa.binary()),
        ("topk_logp_more_t", pa.binary()),
    ]
)
SCALARS = ("ids_t", "ends_t", "logp_t", "entropy_t", "tail_t")
STREAMS = ("topk_ids_t", "topk_ids_more_t", "topk_logp_t", "topk_logp_more_t")
_FOOTER, _WIDTHS = b"cdm.scores", b"cdm.topk"
_ENCODING = {
    f"{name}.list.element": "DELTA_BINARY_PACKED" if name in ("ends_t", "kept_t") else "BYTE_STREAM_SPLIT"
    for name in (*SCALARS, "kept_t")
}


@dataclass(frozen=True, slots=True)
class PartScores:
    """What the footer of one part says. `identity` is what was asked; quarantined are (id, reason)."""

    identity: dict[str, Any]
    documents: int
    tokens: int
    truncated: int
    quarantined: tuple[tuple[str, str], ...]


def write_scores(
    folder: str,
    name: str,
    documents: Sequence[ScoredDocument],
    *,
    quarantined: Sequence[tuple[str, str]],
    identity: Mapping[str, Any],
) -> Part:
    """Write one part atomically; the same documents leave the same bytes.

    `identity` is what was asked of the teacher (plain JSON values); a part is never mixed with parts of another one.
    """
    footer = {
        "schema_version": parts.SCHEMA_VERSION,
        "identity": dict(identity),
        "tokens": sum(len(document.ids_t) for document in documents),
        "truncated": sum(document.truncated for document in documents),
        "quarantined": list(quarantined),
    }
    table = to_table(documents)
    table = table.replace_schema_metadata({_FOOTER: json.dumps(footer, sort_keys=True), **table.schema.metadata})
    return parts.write_part(folder, name, table, row_group_size=ROW_GROUP_DOCUMENTS, column_encoding=_ENCODING)


def read_scores(folder: str, name: str, row_groups: Sequence[int] | None = None) -> list[ScoredDocument]:
    """The documents of one part, or of some of its row groups: document i of a part is in group i // 16.

    Raises ValueError naming a part that is missing, broken or of another schema version.
    """
    with parts.open_part(folder, name) as file:
        _check_version(folder, name, file.schema_arrow.metadata)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        tables = [file.read_row_group(group) for group in groups]
    try:
        return [document for table in tables for document in _from_group(table)]
    except ValueError as error:
        raise ValueError(f"{folder}/{name}: {error}; delete the part and rerun the stage") from error


def to_table(documents: Sequence[ScoredDocument]) -> pa.Table:
    """One row a document, with SCHEMA; the widths of the top k are in its metadata."""
    columns = [
        pa.array([document.id for document in documents], pa.string()),
        pa.array([document.truncated for document in documents], pa.bool_()),
    ]
    for name in SCALARS:
        columns.append(_list_array([getattr(d, name) for d in documents], SCHEMA.field(name).type.value_type))
    kept = [(document.topk_ids_t >= 0).sum(1, dtype=np.int32) for document in documents]
    columns.append(_list_array(kept, pa.int32()))
    vocabulary = 1 + max((int(document.topk_ids_t.max(initial=-1)) for document in documents), default=-1)
    streams: list[tuple[bytes, ...]] = []
    for first in range(0, len(documents), ROW_GROUP_DOCUMENTS):
        group = slice(first, first + ROW_GROUP_DOCUMENTS)
        streams += _encode_group(documents[group], kept[group], vocabulary)
    columns += [pa.array([row[i] for row in streams], pa.binary()) for i in range(len(STREAMS))]
    widths = {"k": documents[0].topk_ids_t.shape[1] if documents else 0, "vocabulary": vocabulary}
    return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata({_WIDTHS: json.dumps(widths)}))


def _encode_group(
    documents: Sequence[ScoredDocument], kept: Sequence[np.ndarray], vocabulary: int
) -> Iterator[tuple[bytes, ...]]:
    """The four streams of each document of a row group."""
    ids, logp = (np.concatenate([getattr(d, name) for d in documents]) for name in ("topk_ids_t", "topk_logp_t"))
    codes = codec.encode(ids, logp, np.concatenate(kept), vocabulary)
    entries = np.cumsum([0, *(int(k.sum()) for k in kept)])
    streams: list[list[bytes]] = []
    for code, more in ((codes.ids, codes.ids_more), (codes.logp, codes.logp_more)):
        bounds = np.concatenate([[0], np.cumsum(codec.more_bytes(code))])[entries]
        streams += [_cut(code, entries), _cut(more, bounds)]
    return zip(*streams, strict=True)


def _cut(stream: np.ndarray, bounds: np.ndarray) -> list[bytes]:
    return [stream[start:end].tobytes() for start, end in itertools.pairwise(bounds)]


def _from_group(table: pa.Table) -> list[ScoredDocument]:
    """The documents of one row group, the inverse of `to_table`. The top-k arrays are views of the group's."""
    columns = {name: _arrays(table[name]) for name in SCALARS}
    widths = json.loads(table.schema.metadata[_WIDTHS])
    kept = table["kept_t"].combine_chunks().flatten().to_numpy()
    codes = Codes(*(_bytes(table[name].combine_chunks()) for name in STREAMS))
    ids, logp = codec.decode(codes, kept, widths["k"], widths["vocabulary"])
    ends = np.cumsum([len(ids_t) for ids_t in columns["ids_t"]])
    documents = []
    for i, (name, truncated) in enumerate(zip(table["id"].to_pylist(), table["truncated"].to_pylist(), strict=True)):
        rows = slice(ends[i] - len(columns["ids_t"][i]), ends[i])
        scalars = {column: columns[column][i] for column in SCALARS}
        documents.append(ScoredDocument(name, truncated, **scalars, topk_ids_t=ids[rows], topk_logp_t=logp[rows]))
    return documents


def read_footer(folder: str, name: str) -> PartScores:
    """Identity, counts and quarantine of one part, without reading its documents."""
    with parts.open_part(folder, name) as file:
        metadata, documents = file.schema_arrow.metadata, file.metadata.num_rows
    footer = _check_version(folder, name, metadata)
    quarantined = tuple((document_id, reason) for document_id, reason in footer["quarantined"])
    return PartScores(footer["identity"], documents, footer["tokens"], footer["truncated"], quarantined)


def column_bytes(folder: str, name: str) -> dict[str, int]:
    """The bytes that each column of a part takes in the file."""
    with parts.open_part(folder, name) as file:
        metadata = file.metadata
    found = dict.fromkeys(SCHEMA.names, 0)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            found[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return found


def _check_version(folder: str, name: str, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The footer of a part. Raises ValueError where there is none or it is of another version."""
    if _FOOTER not in (metadata or {}):
        raise ValueError(f"{folder}/{name}: a Parquet file, but no scores of a teacher; is this a shards folder?")
    footer = json.loads(metadata[_FOOTER])  # type: ignore[index]
    found = footer.get("schema_version", 1)  # version 1 did not say so
    if found != parts.SCHEMA_VERSION:
        raise ValueError(
            f"{folder}/{name}: schema_version is {found}, this version reads {parts.SCHEMA_VERSION}; rerun the stage"
        )
    return footer


def check_identity(folder: str, name: str, scores: PartScores, identity: Mapping[str, Any]) -> None:
    """Raise ValueError naming the key and both values where a part was made for something else than `identity`."""
    for key in sorted({*identity, *scores.identity}):
        found, wanted = scores.identity.get(key), identity.get(key)
        if found != wanted:
            raise ValueError(
                f"{folder}/{name}: {key} is {found!r}, expected {wanted!r}; delete the folder or name another one"
            )


def finish_shards(folder: str, names: Sequence[str], identity: Mapping[str, Any]) -> Manifest:
    """Write quarantine.parquet, then the manifest: identity and counts as meta, `names` as parts.

    Raises ValueError where a part is missing, broken or made for something else.
    """
    footers = {}
    for name in names:
        footers[name] = read_footer(folder, name)
        check_identity(folder, name, footers[name], identity)
    rows = [
        {"part": name, "id": document_id, "reason": reason}
        for name, scores in footers.items()
        for document_id, reason in scores.quarantined
    ]
    schema = pa.schema([("part", pa.string()), ("id", pa.string()), ("reason", pa.string())])
    parts.write_part(folder, QUARANTINE, pa.Table.from_pylist(rows, schema=schema))
    counts = {
        "documents": sum(scores.documents for scores in footers.values()),
        "tokens": sum(scores.tokens for scores in footers.values()),
        "truncated": sum(scores.truncated for scores in footers.values()),
        "quarantined": len(rows),
    }
    return parts.finish(folder, {**identity, **counts}, kind=KIND, names=names)


def open_shards(folder: str, expect: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a finished shards folder.

    Raises ValueError naming the key and both values where the meta differs from `expect`, UnfinishedError without one.
    """
    return parts.read_manifest(folder, {"kind": KIND, **(expect or {})})


def _list_array(values: Sequence[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.concatenate(values) if values else np.empty(0)
    return pa.ListArray.from_arrays(offsets, pa.array(flat.astype(value_type.to_pandas_dtype(), copy=False)))


def _bytes(column: pa.BinaryArray) -> np.ndarray:
    """All values of a column, one after the other, without a copy."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]] if len(column) else np.empty(0, np.uint8)


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    out = []
    for chunk in column.chunks:
        flat = chunk.values.to_numpy(zero_copy_only=True)
        bounds = chunk.offsets.to_numpy(zero_copy_only=True)
        out += [flat[start:end] for start, end in itertools.pairwise(bounds)]
    return out
