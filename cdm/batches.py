"""Shard rows and the student's tokens -> AlignedBatch, in an order that is a pure function of seed and step.

`align_part` joins one corpus part with the teachers' shard parts and keeps the result as an `aligned` part, so that a
training step only gathers. Corpus parts are in the order of content hashes: any run of documents is a random sample, so
an epoch permutes blocks (row groups) and reads each of them whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from cdm import parts, shards
from cdm.corpus import read_documents
from cdm.grouping import NO_GROUPS, Grouping
from cdm.pieces import cuts
from cdm.records import AlignedBatch, Alignment, ScoredDocument, TeacherRows
from cdm.shards import ROW_GROUP_DOCUMENTS

CACHED_BLOCKS = 64

Ints = np.ndarray


COUNTS = ("documents", "refused", "prompt_too_long", "cut", "response_tokens", "groups", "one_to_one")


# --- the aligned part --------------------------------------------------------------------------------------------


def align_part(
    corpus_folder: str, shards_folders: Sequence[str], part: str, grouping: Grouping, *, max_length: int
) -> tuple[pa.Table, dict[str, int]]:
    """One corpus part tokenised for the student and aligned with every teacher's scores of it.

    A row per document: id, prompt_s, ids_s, ends_s (the response and its end of turn) and, per teacher k, its row in
    the shard part (`row_t{k}`, -1 where the teacher has none) and the groups' bounds (`bounds_s{k}`, `bounds_t{k}`).
    Documents that the student's tokenizer cannot spell, whose prompt its chat template refuses, or whose prompt fills
    `max_length` are left out and counted.
    """
    tokenizer_s = grouping.tokenizer_s
    scored = [{doc.id: (row, doc) for row, doc in enumerate(shards.read_scores(f, part))} for f in shards_folders]
    counts = dict.fromkeys(COUNTS, 0)
    rows: list[dict[str, object]] = []
    for document in read_documents(corpus_folder, part):
        try:
            ids, ends = tokenizer_s.encode_with_ends(document.response)
            prompt = tokenizer_s.encode_prompt(document.prompt)
        except ValueError:  # the tokens do not spell the text, or the chat template takes no such prompt
            counts["refused"] += 1
            continue
        if not prompt:  # nothing to predict the first token from
            counts["refused"] += 1
            continue
        room = max_length - len(prompt)
        if room < 1:
            counts["prompt_too_long"] += 1
            continue
        ids = np.append(ids, tokenizer_s.end_of_turn_id).astype(np.int32)
        ends = np.append(ends, ends[-1] if len(ends) else 0).astype(np.int32)
        row: dict[str, object] = {
            "id": document.id,
            "prompt_s": np.asarray(prompt, np.int32),
            "ids_s": ids[:room],
            "ends_s": ends[:room],
        }
        for k, of_teacher in enumerate(scored):
            row_t, doc = of_teacher.get(document.id, (-1, None))
            groups = NO_GROUPS if doc is None else grouping.groups(k, doc, ids, ends, room)
            row |= {f"row_t{k}": row_t, f"bounds_s{k}": groups.bounds_s, f"bounds_t{k}": groups.bounds_t}
            counts["groups"] += len(groups.bounds_s) - 1
            counts["one_to_one"] += int(((np.diff(groups.bounds_s) == 1) & (np.diff(groups.bounds_t) == 1)).sum())
        counts["documents"] += 1
        counts["cut"] += len(ids) > room
        counts["response_tokens"] += min(len(ids), room)
        rows.append(row)
    return _aligned_table(rows, len(shards_folders)), counts


def _aligned_table(rows: list[dict[str, object]], teachers: int) -> pa.Table:
    ints = pa.list_(pa.int32())
    schema = [("id", pa.string()), ("prompt_s", ints), ("ids_s", ints), ("ends_s", ints)]
    for k in range(teachers):
        schema += [(f"row_t{k}", pa.int32()), (f"bounds_s{k}", ints), (f"bounds_t{k}", ints)]
    lengths = {
        "tokens_s": [len(row["prompt_s"]) + len(row["ids_s"]) for row in rows],  # type: ignore[arg-type]
        "response_s": [len(row["ids_s"]) for row in rows],  # type: ignore[arg-type]
        **{f"groups{k}": [len(row[f"bounds_s{k}"]) - 1 for row in rows] for k in range(teachers)},  # type: ignore[arg-type]
    }
    table = pa.Table.from_pylist(rows, pa.schema(schema))
    for name, values in lengths.items():  # small columns of their own: planning reads them and nothing else
        table = table.append_column(name, pa.array(values, pa.int32()))
    return table


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlignedData:
    """The aligned parts of one split, addressed by row number. Sizes are held, texts and scores are read on demand.

    limit: only the first so many rows are there; they are a random sample, because parts are in the order of hashes.
    """

    folder: str
    shards_folders: tuple[str, ...]
    parts: tuple[str, ...]
    limit: int | None = None

    @classmethod
    def open(cls, folder: str, shards_folders: Sequence[str], split: str, limit: int | None = None) -> AlignedData:
        """The split's parts in their order. Raises ValueError where the split has none."""
        names = tuple(part.name for part in parts.read_manifest(folder).parts if part.name.startswith(f"{split}-"))
        if not names:
            raise ValueError(
                f"{folder}: no documents in the {split} split; raise corpus.{split}_share or max_documents"
            )
        return cls(folder, tuple(shards_folders), names, limit)

    @cached_property
    def sizes(self) -> dict[str, Ints]:
        """Per row: tokens_s, response_s, groups0, groups1, ..."""
        names = ["tokens_s", "response_s", *(f"groups{k}" for k in range(len(self.shards_folders)))]
        tables = [parts.read_part(self.folder, part, columns=names) for part in self.parts]
        return {name: np.concatenate([table[name].to_numpy() for table in tables])[: self.limit] for name in names}

    @cached_property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """(part, row group, first row, rows) of every block, in order."""
        found: list[tuple[int, int, int, int]] = []
        first = 0
        for part, name in enumerate(self.parts):
            with parts.open_part(self.folder, name) as file:
                metadata = file.metadata
            for group in range(metadata.num_row_groups):
                rows = min(metadata.row_group(group).num_rows, len(self) - first)
                if not rows:
                    return found
                found.append((part, group, first, rows))
                first += rows
        return found

    @cached_property
    def _first_rows(self) -> Ints:
        return np.array([first for _, _, first, _ in self.blocks])

    @cached_property
    def _reader(self) -> _BlockReader:
        return _BlockReader(self)

    def row(self, number: int) -> Row:
        block = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        return self._reader.block(block)[number - self.blocks[block][2]]

    def __len__(self) -> int:
        return len(self.sizes["tokens_s"])


@dataclass(frozen=True, slots=True)
class Row:
    """One document as the student and its teachers see it."""

    id: str
    prompt_s: Ints
    ids_s: Ints
    ends_s: Ints
    scores: tuple[ScoredDocument | None, ...]
    alignments: tuple[Alignment, ...]


class _BlockReader:
    """Reads a block of aligned rows with the shard rows they name; keeps the last few blocks."""

    def __init__(self, data: AlignedData) -> None:
        self._data = data
        self.block = lru_cache(CACHED_BLOCKS)(self._read_block)
        self._shard_block = lru_cache(CACHED_BLOCKS)(self._read_shard_block)

    def _read_block(self, block: int) -> list[Row]:
        part, group, _, _ = self._data.blocks[block]
        with parts.open_part(self._data.folder, self._data.parts[part]) as file:
            table = file.read_row_group(group)
        columns: dict[str, Any] = {
            name: table[name].to_pylist() if name == "id" else _arrays(table[name]) for name in table.column_names
        }
        return [self._row(part, columns, i) for i in range(table.num_rows)]

    def _row(self, part: int, columns: dict[str, Any], i: int) -> Row:
        teachers = range(len(self._data.shards_folders))
        return Row(
            columns["id"][i],
            columns["prompt_s"][i],
            columns["ids_s"][i],
            columns["ends_s"][i],
            tuple(self._scores(k, part, int(columns[f"row_t{k}"][i])) for k in teachers),
            tuple(Alignment(columns[f"bounds_s{k}"][i], columns[f"bounds_t{k}"][i]) for k in teachers),
        )

    def _scores(self, k: int, part: int, row_t: int) -> ScoredDocument | None:
        if row_t < 0:
            return None
        return self._shard_block(k, part, row_t // ROW_GROUP_DOCUMENTS)[row_t % ROW_GROUP_DOCUMENTS]

    def _read_shard_block(self, k: int, part: int, group: int) -> list[ScoredDocument]:
        return shards.read_scores(self._data.shards_folders[k], self._data.parts[part], row_groups=[group])


def _arrays(column: pa.ChunkedArray) -> list | Ints:
    array = column.combine_chunks()
    if pa.types.is_string(array.type):
        return array.to_pylist()
    if not pa.types.is_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


# --- order -------------------------------------------------------------------------------------------------------


def step_rows(data: AlignedData, *, seed: int, batch_tokens: int) -> Iterator[Ints]:
    """The rows of step 0, 1, 2, ... for ever: about `batch_tokens` of the student's tokens each, epoch after epoch.

    A pure function of the data and the seed: the number of workers, restarts and the batch's later division into
    micro-batches play no part in it.
    """
    lengths = data.sizes["tokens_s"]
    rows: list[int] = []
    tokens = 0
    for number in _row_numbers(data, seed):
        if rows and tokens + lengths[number] > batch_tokens:
            yield np.array(rows)
            rows, tokens = [], 0
        rows.append(number)
        tokens += int(lengths[number])


def _row_numbers(data: AlignedData, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        for block in np.random.default_rng((seed, epoch)).permutation(len(data.blocks)):
            _, _, first, rows = data.blocks[block]
            yield from range(first, first + rows)
        epoch += 1


def micro_batches(rows: Ints, lengths: Ints, *, world: int, micro_batch_tokens: int) -> list[Ints]:
    """Rows of one step in chunks of similar length; chunk j is worker j % world's.

    Their number is a multiple of `world`, because the workers' collectives must match; a chunk may be empty. Padded to
    its longest row a chunk holds at most `micro_batch_tokens`, or one row.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    weights = np.cumsum(lengths[ordered])
    total = int(weights[-1])
    count = world * max(1, -(-total // (world * micro_batch_tokens)))
    while True:
        cuts = np.searchsorted(weights, np.arange(1, count) * total / count, side="left") + 1
        chunks = np.split(ordered, np.minimum(cuts, len(ordered)))
        if all(len(c) < 2 or len(c) * int(lengths[c].max()) <= micro_batch_tokens for c in chunks):
            return chunks
        count += world


# --- collating ---------------------------------------------------------------------------------------------------


def collate(
    rows: Sequence[Row],
    *,
    top_k: int | None,
    targets: Literal["response", "all"] = "response",
    whole_documents: bool = False,
) -> AlignedBatch:
    """Rows padded on the right to one batch. No row at all gives one padding token that nothing is asked of.

    top_k: the teachers' best so many, None: all that are stored. whole_documents: the batch may be divided between
    documents only.
    """
    sequences = [np.concatenate([row.prompt_s, row.ids_s]) for row in rows] or [np.zeros(1, np.int32)]
    width = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), width), np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for b, sequence in enumerate(sequences):
        input_ids[b, : len(sequence)] = sequence
        mask[b, : len(sequence)] = 1
    positions = [
        b * width + np.arange(max(0 if targets == "all" else len(row.prompt_s) - 1, 0), len(sequences[b]) - 1)
        for b, row in enumerate(rows)
    ]
    rows_s = np.concatenate([*positions, np.zeros(0, np.int64)]).astype(np.int64)
    lengths = np.array([len(p) for p in positions], np.int64)
    teachers = tuple(_teacher_rows(rows, k, top_k) for k in range(len(rows[0].scores) if rows else 0))
    return AlignedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(mask),
        torch.from_numpy(rows_s),
        torch.from_numpy(input_ids.reshape(-1)[rows_s + 1] if len(rows_s) else rows_s),
        torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        teachers,
        cuts(len(rows_s), teachers, np.append(0, np.cumsum(lengths)) if whole_documents else None),
    )


def token_bytes(rows: Sequence[Row]) -> Ints:
    """Bytes that each response token adds, [R] in `collate`'s order; 0 for end of turn and other zero-width tokens."""
    return np.concatenate([np.diff(row.ends_s, prepend=0) for row in rows] or [np.zeros(0, np.int32)])


def _teacher_rows(rows: Sequence[Row], k: int, top_k: int | None) -> TeacherRows:
    pairs_s, pairs_t, scored = [], [], []
    offset_s = offset_t = 0
    for row in rows:
        scores, groups = row.scores[k], row.alignments[k]
        if scores is not None:
            pairs_s.append(np.stack([groups.bounds_s[:-1], groups.bounds_s[1:]], 1) + offset_s)
            pairs_t.append(np.stack([groups.bounds_t[:-1], groups.bounds_t[1:]], 1) + offset_t)
            scored.append(scores)
            offset_t += len(scores.ids_t)
        offset_s += len(row.ids_s)
    if not scored:
        none = torch.zeros(0, dtype=torch.int64)
        pair = torch.zeros(0, 2, dtype=torch.int64)
        return TeacherRows(
            pair, pair, none, none.float(), torch.zeros(0, top_k or 1, dtype=torch.int64), torch.zeros(0, top_k or 1)
        )
    return TeacherRows(
        torch.from_numpy(np.concatenate(pairs_s).astype(np.int64)),
        torch.from_numpy(np.concatenate(pairs_t).astype(np.int64)),
        torch.from_numpy(np.concatenate([s.ids_t for s in scored]).astype(np.int64)),
        torch.from_numpy(np.concatenate([s.logp_t for s in scored])),
        torch.from_numpy(np.concatenate([s.topk_ids_t[:, :top_k] for s in scored]).astype(np.int64)),
        torch.from_numpy(np.concatenate([s.topk_logp_t[:, :top_k] for s in scored]).astype(np.float32)),
    )
