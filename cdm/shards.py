"""The shard format: what one teacher says of one corpus, as a folder of Parquet parts (layer 2).

Legend: N response tokens of one document, K top-k. Part `train-00003.parquet` holds the scores of the corpus part of
that name, in its order, without the documents that could not be scored. Those are listed, with the reason, in the
footer of the same file, so that both appear in one rename; `finish_shards` gathers them in `quarantine.parquet`.
A row is a document; a row group is ROW_GROUP_DOCUMENTS of them, so that training reads any of them alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cdm import parts
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
        ("topk_ids_t", pa.list_(pa.int32())),  # N * K, row after row
        ("topk_logp_t", pa.list_(pa.float16())),
    ]
)
_FOOTER = b"cdm.scores"
_ENCODING = {
    f"{name}.list.element": "DELTA_BINARY_PACKED" if name == "ends_t" else "BYTE_STREAM_SPLIT"
    for name in SCHEMA.names
    if pa.types.is_list(SCHEMA.field(name).type)
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
        "identity": dict(identity),
        "tokens": sum(len(document.ids_t) for document in documents),
        "truncated": sum(document.truncated for document in documents),
        "quarantined": list(quarantined),
    }
    table = to_table(documents).replace_schema_metadata({_FOOTER: json.dumps(footer, sort_keys=True)})
    return parts.write_part(folder, name, table, row_group_size=ROW_GROUP_DOCUMENTS, column_encoding=_ENCODING)


def read_scores(folder: str, name: str, row_groups: Sequence[int] | None = None) -> list[ScoredDocument]:
    """The documents of one part, or of some of its row groups: document i of a part is in group i // 16.

    The arrays are read-only views of what Parquet decoded. Raises ValueError naming a part that is missing or broken.
    """
    with parts.open_part(folder, name) as file:
        table = file.read() if row_groups is None else file.read_row_groups(list(row_groups))
    return from_table(table)


def to_table(documents: Sequence[ScoredDocument]) -> pa.Table:
    """One row a document, with SCHEMA."""
    columns = [
        pa.array([document.id for document in documents], pa.string()),
        pa.array([document.truncated for document in documents], pa.bool_()),
    ]
    for field in list(SCHEMA)[2:]:
        values = [np.ravel(getattr(document, field.name)) for document in documents]
        columns.append(_list_array(values, field.type.value_type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[ScoredDocument]:
    """The inverse of `to_table`."""
    columns = {field.name: _arrays(table[field.name]) for field in list(SCHEMA)[2:]}
    documents = []
    for i, (name, truncated) in enumerate(zip(table["id"].to_pylist(), table["truncated"].to_pylist(), strict=True)):
        arrays = {column: values[i] for column, values in columns.items()}
        n = len(arrays["ids_t"])
        for column in ("topk_ids_t", "topk_logp_t"):
            arrays[column] = arrays[column].reshape(n, -1)
        documents.append(ScoredDocument(name, truncated, **arrays))
    return documents


def read_footer(folder: str, name: str) -> PartScores:
    """Identity, counts and quarantine of one part, without reading its documents."""
    with parts.open_part(folder, name) as file:
        metadata, documents = file.schema_arrow.metadata or {}, file.metadata.num_rows
    if _FOOTER not in metadata:
        raise ValueError(f"{folder}/{name}: a Parquet file, but no scores of a teacher; is this a shards folder?")
    footer = json.loads(metadata[_FOOTER])
    quarantined = tuple((document_id, reason) for document_id, reason in footer["quarantined"])
    return PartScores(footer["identity"], documents, footer["tokens"], footer["truncated"], quarantined)


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


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    out = []
    for chunk in column.chunks:
        flat = chunk.values.to_numpy(zero_copy_only=True)
        bounds = chunk.offsets.to_numpy(zero_copy_only=True)
        out += [flat[start:end] for start, end in itertools.pairwise(bounds)]
    return out
