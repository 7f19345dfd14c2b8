"""Two vocabularies -> the graph of near spellings between their tokens without exact twins.

Legend: V ids of one vocabulary, E edges; sides `_s` student and `_t` teacher. The rules: docs/method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from cdm.spelling import near_texts

Pieces = Sequence[bytes | None]
Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class NeighbourGraph:
    """Near spellings in compressed rows, ids rising. starts int64 [V+1], ids int32 [E], distances float32 [E]."""

    starts: np.ndarray
    ids: np.ndarray
    distances: np.ndarray

    def transposed(self, size: int) -> NeighbourGraph:
        """The same edges by column; `size` is the number of columns."""
        rows = np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))
        starts, order = _counting_sort(self.ids, size)
        return NeighbourGraph(starts, rows[order], self.distances[order])


def near_graph(
    pieces_t: Pieces, pieces_s: Pieces, exact: np.ndarray, inverse: np.ndarray, threshold: float, protect: bool
) -> NeighbourGraph:
    """All pairs of tokens (teacher's by row) that are no exact images and lie nearer than `threshold`."""
    free_t = _free_texts(pieces_t, inverse, protect)
    free_s = _free_texts(pieces_s, exact, protect)
    rows, columns, distances = _near_pairs(free_t, free_s, threshold, protect)
    _, order = _counting_sort(columns, len(pieces_s))
    rows, columns, distances = rows[order], columns[order], distances[order]
    starts, order = _counting_sort(rows, len(pieces_t))  # stable: the columns of a row stay in order
    return NeighbourGraph(starts, columns[order], distances[order])


def _free_texts(pieces: Pieces, images: np.ndarray, protect: bool) -> dict[str, list[int]]:
    """Texts without spaces -> the ids spelled so, of the tokens that are no exact image of the other side's tokens."""
    taken = set(images.tolist())
    texts: dict[str, list[int]] = {}
    for token_id, piece in enumerate(pieces):
        if piece is None or token_id in taken:
            continue
        text = piece.decode("utf-8", "surrogateescape").replace(" ", "")
        if text and (not protect or any(c.isalpha() for c in text)):
            texts.setdefault(text, []).append(token_id)
    return texts


def _near_pairs(free_t: dict[str, list[int]], free_s: dict[str, list[int]], threshold: float, protect: bool) -> Edges:
    """All (teacher id, student id, distance) with distance < threshold."""
    buckets_t, buckets_s = _buckets(free_t, protect), _buckets(free_s, protect)
    rows, columns, distances = [], [], []
    for key in sorted(buckets_t.keys() & buckets_s.keys()):
        texts_t, texts_s = buckets_t[key], buckets_s[key]
        i, j, distance = near_texts(texts_t, texts_s, threshold)
        ids_t, ids_s = (_ragged([free[x] for x in texts]) for free, texts in ((free_t, texts_t), (free_s, texts_s)))
        row, column, pair = _expand(*ids_t, *ids_s, i, j)
        rows.append(row)
        columns.append(column)
        distances.append(distance[pair])
    if not rows:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(distances)


def _buckets(texts: dict[str, list[int]], protect: bool) -> dict[str, list[str]]:
    """Texts by the digits that they hold: only texts of one bucket are ever compared."""
    out: dict[str, list[str]] = {}
    for text in texts:
        digits = "".join(c for c in text if c.isdigit()) if protect else ""
        out.setdefault(digits, []).append(text)
    return out


@njit(cache=True)
def _expand(
    flat_t: np.ndarray, starts_t: np.ndarray, flat_s: np.ndarray, starts_s: np.ndarray, i: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of texts -> all pairs of their ids, and which pair of texts each came from."""
    size = 0
    for pair in range(len(i)):
        size += (starts_t[i[pair] + 1] - starts_t[i[pair]]) * (starts_s[j[pair] + 1] - starts_s[j[pair]])
    rows, columns, of = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.int64)
    at = 0
    for pair in range(len(i)):
        for x in range(starts_t[i[pair]], starts_t[i[pair] + 1]):
            for y in range(starts_s[j[pair]], starts_s[j[pair] + 1]):
                rows[at], columns[at], of[at] = flat_t[x], flat_s[y], pair
                at += 1
    return rows, columns, of


def _ragged(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(ids) for ids in lists)])
    return np.array([i for ids in lists for i in ids], dtype=np.int32), starts


@njit(cache=True)
def _counting_sort(keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each key of 0 to size - 1 starts in sorted order [size + 1], and that order [E]: stable, in O(E)."""
    starts = np.zeros(size + 1, np.int64)
    for key in keys:
        starts[key + 1] += 1
    starts = np.cumsum(starts)
    place = starts[:-1].copy()
    order = np.empty(len(keys), np.int64)
    for edge, key in enumerate(keys):
        order[place[key]] = edge
        place[key] += 1
    return starts, order
