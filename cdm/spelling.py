"""All pairs of texts from two vocabularies whose spellings are near: the search behind the neighbour graph.

Legend: distance = Levenshtein / (sum of lengths). Billions of pairs are told apart by length and by the set of their
letters before any edit distance is computed; what is left goes through Myers' bit-parallel algorithm (JACM 1999).
RapidFuzz's `cdist` gives the same pairs from a dense matrix and is the reference in the tests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

OWN_BITS = 56  # the commonest letters have a bit of their own, the rest share eight
ROWS_PER_TASK = 512
WORD = 64


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts as letter codes, codes[starts[i]:starts[i+1]], and as sets of letters, one uint64 each."""

    codes: np.ndarray
    starts: np.ndarray
    letters: np.ndarray


def near_texts(
    texts_a: Sequence[str], texts_b: Sequence[str], threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in texts_a, places in texts_b (int64 [E]) and distances (float32 [E]) of all pairs below `threshold`.

    Neither side may hold an empty text. Pairs come in no particular order.
    """
    alphabet = _alphabet(texts_a, texts_b)
    order_a, order_b = (np.argsort([len(x) for x in texts], kind="stable") for texts in (texts_a, texts_b))
    a, b = (_encode([t[i] for i in order], alphabet) for t, order in ((texts_a, order_a), (texts_b, order_b)))
    lengths_b = np.diff(b.starts)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        tasks = [
            pool.submit(partial(_search, a.codes, a.starts, a.letters, b.codes, b.starts, b.letters), *task)
            for task in _tasks(np.diff(a.starts), lengths_b, threshold, len(alphabet))
        ]
        found = [task.result() for task in tasks]
    i, j, edits = (np.concatenate([part[n] for part in found] or [np.zeros(0, np.int32)]) for n in range(3))
    distances = edits / (np.diff(a.starts)[i] + lengths_b[j])
    return order_a[i], order_b[j], distances.astype(np.float32)


def most_edits(lengths: np.ndarray, threshold: float) -> np.ndarray:
    """The largest number of edits e with e / length < threshold, -1 where there is none."""
    most = np.floor(threshold * lengths).astype(np.int64) + 1
    for _ in range(2):
        most = np.where(most / lengths < threshold, most, most - 1)
    return most


def _alphabet(*sides: Sequence[str]) -> dict[str, int]:
    """Letters by how common they are."""
    counts = Counter(letter for texts in sides for text in texts for letter in text)
    return {letter: code for code, (letter, _) in enumerate(sorted(counts.items(), key=lambda x: (-x[1], x[0])))}


def _encode(texts: Sequence[str], alphabet: dict[str, int]) -> _Texts:
    codes = np.array([alphabet[letter] for text in texts for letter in text], dtype=np.int32)
    starts = np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)
    bits = np.where(codes < OWN_BITS, codes, OWN_BITS + codes % (WORD - OWN_BITS)).astype(np.uint64)
    letters = np.zeros(len(texts), dtype=np.uint64)
    if len(codes):
        letters = np.bitwise_or.reduceat(np.left_shift(np.uint64(1), bits), starts[:-1])
    return _Texts(codes, starts, letters)


def _tasks(lengths_a: np.ndarray, lengths_b: np.ndarray, threshold: float, alphabet: int) -> Iterator[tuple[Any, ...]]:
    """Ranges of rows of one length, the range of columns within reach, the edits allowed for each, the alphabet."""
    for length in np.unique(lengths_a):
        most = most_edits(length + lengths_b, threshold)
        reachable = np.flatnonzero(most >= np.abs(length - lengths_b))
        if len(reachable) == 0:
            continue
        left, right = int(reachable[0]), int(reachable[-1]) + 1
        first, last = (int(x) for x in np.searchsorted(lengths_a, [length, length + 1]))
        for start in range(first, last, ROWS_PER_TASK):
            yield start, min(start + ROWS_PER_TASK, last), left, right, most[left:right].astype(np.int32), alphabet


@njit(cache=True, nogil=True)
def _search(
    codes_a: np.ndarray,
    starts_a: np.ndarray,
    letters_a: np.ndarray,
    codes_b: np.ndarray,
    starts_b: np.ndarray,
    letters_b: np.ndarray,
    row: int,
    last_row: int,
    left: int,
    right: int,
    most: np.ndarray,
    alphabet: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    out = np.empty((3, 1024), np.int32)
    count = 0
    where = np.zeros(alphabet, np.uint64)  # the places of each letter in the row's text, as bits
    for i in range(row, last_row):
        text = codes_a[starts_a[i] : starts_a[i + 1]]
        for k in range(min(len(text), 64)):
            where[text[k]] |= np.uint64(1) << np.uint64(k)
        for j in range(left, right):
            limit = most[j - left]
            apart = letters_a[i] ^ letters_b[j]
            if _ones(apart & letters_a[i]) > limit or _ones(apart & letters_b[j]) > limit:
                continue
            other = codes_b[starts_b[j] : starts_b[j + 1]]
            edits = _myers(where, len(text), other) if len(text) <= 64 else _levenshtein(text, other)
            if edits > limit:
                continue
            if count == out.shape[1]:
                grown = np.empty((3, 2 * count), np.int32)
                grown[:, :count] = out
                out = grown
            out[0, count], out[1, count], out[2, count] = i, j, edits
            count += 1
        for k in range(min(len(text), 64)):
            where[text[k]] = np.uint64(0)
    return out[0, :count].copy(), out[1, :count].copy(), out[2, :count].copy()


@intrinsic
def _ones(context: Any, bits: Any) -> Any:
    """How many bits of a uint64 are set: one machine instruction."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), emit


@njit(cache=True, nogil=True)
def _myers(where: np.ndarray, length: int, other: np.ndarray) -> int:
    """Levenshtein distance of a text of 1 to 64 letters, given as the places of its letters, to `other`."""
    one = np.uint64(1)
    up, down = ~np.uint64(0), np.uint64(0)
    top = one << np.uint64(length - 1)
    edits = length
    for code in other:
        equal = where[code]
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        rise = down | ~(horizontal | up)
        fall = up & horizontal
        if rise & top:
            edits += 1
        if fall & top:
            edits -= 1
        rise = (rise << one) | one
        up = (fall << one) | ~(vertical | rise)
        down = rise & vertical
    return edits


@njit(cache=True, nogil=True)
def _levenshtein(text: np.ndarray, other: np.ndarray) -> int:
    row = np.arange(len(other) + 1)
    for i in range(len(text)):
        corner, row[0] = row[0], i + 1
        for j in range(len(other)):
            cost = min(corner + (text[i] != other[j]), row[j] + 1, row[j + 1] + 1)
            corner, row[j + 1] = row[j + 1], cost
    return row[-1]
