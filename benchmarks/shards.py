"""Bytes, error, write and read rates of every format of the top-k rows, side by side: `python -m benchmarks.shards`.

The rows are a trained teacher's, over 151,665 ids (`benchmarks.teacher_152k`); the same rows, sharpened, stand for a
larger teacher's peaks. Rates are tokens a CPU second of one core, the best of REPEATS, files in memory.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.shard_formats import CHOSEN, FORMATS, Arrays
from benchmarks.teacher_152k import describe, scored_documents
from cdm import shards
from cdm.records import ScoredDocument
from cdm.shards import ROW_GROUP_DOCUMENTS
from cdm.teacher import keep_mass

K = 64
REPEATS = 3
TOP_MASS = 0.999
SHARPEN = 2.0  # log-probabilities times this, normalised again: a temperature of 1 / SHARPEN
PACKED = {"sorted by id, DELTA_BINARY_PACKED": ("sorted by id", {"ids": "DELTA_BINARY_PACKED"})}
Rows = tuple[np.ndarray, np.ndarray]  # ids, logp of a row group


def main() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    documents = [_best(document, K) for document in scored_documents()]
    sharp = [_sharpened(document) for document in documents]
    print(describe(documents))
    print(describe(sharp) + f"  (sharpened {SHARPEN:g} times)\n")
    print(f"{f'top {K} rows':46}{'B/token':>9}{'sharp':>8}{'max err':>9}{'mean err':>10}{'write/s':>10}{'read/s':>11}")
    formats = {name: _format(name, _groups(documents), _groups(sharp)) for name in [*FORMATS, *PACKED]}
    result = formats[CHOSEN]
    print(
        f"\nwhole parts (every column, cdm.shards){'':9}{'B/token':>9}{'kept':>8}{'KL':>11}{'write/s':>9}{'read/s':>11}"
    )
    whole = {label: _part(label, rows) for label, rows in (("all 64", documents), ("all 64, sharpened", sharp))}
    for label, rows in ((f"{TOP_MASS:g} of the mass", documents), (f"{TOP_MASS:g} of the mass, sharpened", sharp)):
        whole[label] = _part(label, [_adapted(document) for document in rows], rows)
    adaptive = whole[f"{TOP_MASS:g} of the mass"]
    figures = {
        "bytes_per_token_k64": result["bytes"],
        "decode_tokens_per_s": round(result["read"]),
        "adaptive_bytes_per_token": adaptive["topk_bytes"],
        "adaptive_kl": adaptive["kl"],
        "bytes_per_token_k64_sharpened": result["sharp"],
        "adaptive_bytes_per_token_sharpened": whole[f"{TOP_MASS:g} of the mass, sharpened"]["topk_bytes"],
        "adaptive_kl_sharpened": whole[f"{TOP_MASS:g} of the mass, sharpened"]["kl"],
        "part_bytes_per_token_k64": whole["all 64"]["bytes"],
        "part_read_tokens_per_s": round(whole["all 64"]["read"]),
    }
    print(json.dumps(figures))


# --- rows --------------------------------------------------------------------------------------------------------


def _best(document: ScoredDocument, k: int) -> ScoredDocument:
    ids, logp = document.topk_ids_t[:, :k].copy(), document.topk_logp_t[:, :k].copy()
    tail = 1 - np.exp(logp.astype(np.float64)).sum(1)
    return replace(document, topk_ids_t=ids, topk_logp_t=logp, tail_t=tail.clip(0).astype(np.float32))


def _sharpened(document: ScoredDocument) -> ScoredDocument:
    """Sharper rows: the tail as a whole is negligible beside the best k once all are raised to a power."""
    logp = SHARPEN * document.topk_logp_t.astype(np.float64)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    entropy = -(np.exp(logp) * logp).sum(1).astype(np.float32)
    return replace(document, topk_logp_t=logp.clip(max=0).astype(np.float16), entropy_t=entropy, tail_t=0 * entropy)


def _adapted(document: ScoredDocument) -> ScoredDocument:
    ids, logp, tail = keep_mass(document.topk_ids_t, document.topk_logp_t, document.tail_t, TOP_MASS)
    return replace(document, topk_ids_t=ids, topk_logp_t=logp, tail_t=tail)


def _groups(documents: Sequence[ScoredDocument]) -> list[Rows]:
    return [
        (np.concatenate([d.topk_ids_t for d in g]), np.concatenate([d.topk_logp_t for d in g]))
        for g in _chunks(documents)
    ]


def _chunks(documents: Sequence[ScoredDocument]) -> Iterator[Sequence[ScoredDocument]]:
    for first in range(0, len(documents), ROW_GROUP_DOCUMENTS):
        yield documents[first : first + ROW_GROUP_DOCUMENTS]


# --- formats -----------------------------------------------------------------------------------------------------


def _format(name: str, groups: list[Rows], sharp: list[Rows]) -> dict[str, float]:
    """Print the row of one format; what it reads back must be what was written, up to the error that is printed."""
    key, encoding = PACKED.get(name, (name, {}))
    encode, decode = FORMATS[key]
    tokens = sum(len(ids) for ids, _ in groups)

    def write(rows: list[Rows]) -> pa.Buffer:
        return _parquet([encode(ids, logp) for ids, logp in rows], encoding)

    def read(data: pa.Buffer) -> list[Rows]:
        return [decode(arrays, K) for arrays in _read(data)]

    data, write_seconds = _timed(lambda: write(groups))
    rows, read_seconds = _timed(lambda: read(data))
    errors = []
    for (ids, logp), (read_ids, read_logp) in zip(groups, rows, strict=True):
        assert (
            (_sorted(ids, logp) == _sorted(read_ids, read_logp)).all() if "sorted" in name else (ids == read_ids).all()
        )
        errors.append(np.abs(logp.astype(np.float32) - read_logp))
    error = np.concatenate(errors)
    figures = {"bytes": data.size / tokens, "sharp": write(sharp).size / tokens, "read": tokens / read_seconds}
    print(
        f"{name:46}{figures['bytes']:9.1f}{figures['sharp']:8.1f}{error.max():9.4f}{error.mean():10.5f}"
        f"{tokens / write_seconds:10,.0f}{figures['read']:11,.0f}"
    )
    return figures


def _sorted(ids: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """Ids best first, equal log-probabilities by id: an order that a format which sorts by id can give back."""
    return np.take_along_axis(ids, np.lexsort((ids, -logp.astype(np.float32))), 1)


def _parquet(groups: list[Arrays], encoding: dict[str, str]) -> pa.Buffer:
    """A row group each, one row in it; numbers as lists split by byte, bytes as they are."""
    names = list(groups[0])
    wide = [name for name in names if groups[0][name].dtype != np.uint8]
    columns = []
    for name in names:
        values = [group[name] for group in groups]
        if name not in wide:
            columns.append(pa.array([value.tobytes() for value in values], pa.large_binary()))
            continue
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values))))
    sink = pa.BufferOutputStream()
    split = {f"{name}.list.element": encoding.get(name, "BYTE_STREAM_SPLIT") for name in wide}
    pq.write_table(
        pa.Table.from_arrays(columns, names), sink, row_group_size=1, compression="zstd", compression_level=3,
        use_dictionary=False, write_statistics=False, version="2.6", column_encoding=split or None,
    )  # fmt: skip
    return sink.getvalue()


def _read(data: pa.Buffer) -> Iterator[Arrays]:
    file = pq.ParquetFile(pa.BufferReader(data))
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        yield {name: _array(table[name].chunk(0)) for name in table.column_names}


def _array(chunk: Any) -> np.ndarray:
    if pa.types.is_list(chunk.type):
        return chunk.values.to_numpy(zero_copy_only=True)
    return np.frombuffer(chunk[0].as_buffer(), np.uint8)


# --- parts -------------------------------------------------------------------------------------------------------


def _part(label: str, documents: list[ScoredDocument], whole: list[ScoredDocument] | None = None) -> dict[str, float]:
    """Print what `cdm.shards` makes of documents; `whole` are the same ones before their rows were shortened."""
    tokens = sum(len(document.ids_t) for document in documents)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        name = "train-00000.parquet"
        part, write_seconds = _timed(lambda: shards.write_scores(folder, name, documents, quarantined=[], identity={}))
        read, read_seconds = _timed(lambda: shards.read_scores(folder, name))
        sizes = shards.column_bytes(folder, name)
    topk = sum(sizes[column] for column in (*shards.STREAMS, "kept_t")) / tokens
    for one, two in zip(documents, read, strict=True):
        assert (one.topk_ids_t == two.topk_ids_t).all() and (one.topk_logp_t == two.topk_logp_t).all()
    kept = sum(int((document.topk_ids_t >= 0).sum()) for document in documents) / tokens
    kl = _kl(whole or documents, documents)
    print(
        f"{label:46}{part.bytes / tokens:9.1f}{kept:8.1f}{kl:11.2e}{tokens / write_seconds:9,.0f}"
        f"{tokens / read_seconds:11,.0f}   top k {topk:.1f}"
    )
    return {"bytes": part.bytes / tokens, "topk_bytes": topk, "kl": kl, "read": tokens / read_seconds}


def _kl(whole: list[ScoredDocument], kept: list[ScoredDocument]) -> float:
    """KL(stored top k and tail || kept ones normalised), nats a token: what a loss that renormalises would not see."""
    total = count = 0.0
    for one, two in zip(whole, kept, strict=True):
        p = np.exp(one.topk_logp_t.astype(np.float64))
        p /= p.sum(1, keepdims=True)
        inside = np.where(two.topk_ids_t >= 0, p, 0).sum(1)
        total += -np.log(inside).sum()
        count += len(inside)
    return max(total / count, 0.0)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the best CPU seconds of REPEATS, after a first time that compiles."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return result, min(seconds)


if __name__ == "__main__":
    main()
