"""Two token sequences of one text -> groups: the exact byte walk, and entropy-weighted dynamic time warping.

Legend: N tokens of one side, G groups; sides `_s` student and `_t` teacher. A group is a half-open range of student
tokens and one of teacher tokens; groups cover each side once, in order. The rules: docs/method.md, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from cdm.records import Alignment

Group = tuple[tuple[int, int], tuple[int, int]]
DIAGONAL, TEACHER_BACK, STUDENT_BACK = 0, 1, 2
NEAR = 8  # tokens on either side of the same place in the text


def entropy_weights(entropy: ArrayLike) -> np.ndarray:
    """`3 * sigmoid(4x - 2) + 3`, x = the rows' entropies (nats), min-max normalised. [N] -> float64 [N].

    x is 0.5 where all entropies are the same. Source: CDM, arXiv 2502.11104, without its truncation to integers.
    Raises ValueError on an entropy that is not finite.
    """
    values = np.asarray(entropy, dtype=np.float64)
    if values.size == 0:
        return values
    if not np.isfinite(values).all():
        raise ValueError(f"entropy of row {int(np.argmin(np.isfinite(values)))} is not finite; score the text again")
    low, high = values.min(), values.max()
    x = (values - low) / (high - low) if high - low > 1e-12 else np.full_like(values, 0.5)
    return 3.0 / (1.0 + np.exp(2.0 - 4.0 * x)) + 3.0


def align(
    *,
    method: Literal["exact", "dtw"],
    ends_s: ArrayLike,
    ends_t: ArrayLike,
    texts_s: Sequence[str] | None = None,
    texts_t: Sequence[str] | None = None,
    entropy_s: ArrayLike | None = None,
    entropy_t: ArrayLike | None = None,
) -> Alignment:
    """Groups of one response. `exact` reads the byte ends [N] alone; `dtw` the token texts and, where given, entropies.

    Zero-width tokens after the last byte (end of turn) form one last group of their own under both methods, when both
    sides have them; they take no part in the warping, nor do their entropies.

    Raises ValueError where the two sides do not spell the same bytes, or `dtw` is asked for without texts.
    """
    if method == "exact":
        return exact_bounds(ends_s, ends_t)
    if method != "dtw":
        raise ValueError(f"alignment method {method!r}: choose 'exact' or 'dtw'")
    if texts_s is None or texts_t is None:
        raise ValueError("alignment 'dtw' needs texts_s and texts_t")
    n_s, n_t = text_tokens(ends_s), text_tokens(ends_t)
    if n_s == len(texts_s) or n_t == len(texts_t):  # one side alone has trailing tokens: they warp like any other
        n_s, n_t = len(texts_s), len(texts_t)
    bounds = dtw_bounds(texts_s[:n_s], texts_t[:n_t], _weights(entropy_s, n_s), _weights(entropy_t, n_t))
    if n_s == len(texts_s):
        return bounds
    tails = np.int32(len(texts_s)), np.int32(len(texts_t))
    return Alignment(np.append(bounds.bounds_s, tails[0]), np.append(bounds.bounds_t, tails[1]))


def text_tokens(ends: ArrayLike) -> int:
    """How many of the tokens belong to the text: all but the zero-width ones after its last byte."""
    array = np.asarray(ends)
    if array.size == 0 or array[-1] == 0:
        return 0
    return int(np.searchsorted(array, array[-1])) + 1


def align_exact(ends_s: ArrayLike, ends_t: ArrayLike) -> list[Group]:
    """Two pointers over byte ends: a group closes where both sides end on the same byte. O(N). See `exact_bounds`."""
    return as_groups(exact_bounds(ends_s, ends_t))


def align_dtw(
    texts_s: Sequence[str], texts_t: Sequence[str], weights_s: ArrayLike, weights_t: ArrayLike
) -> list[Group]:
    """Entropy-weighted DTW over token texts (CDM, arXiv 2502.11104). O(N_s * N_t). See `dtw_bounds`."""
    return as_groups(dtw_bounds(texts_s, texts_t, weights_s, weights_t))


def as_groups(alignment: Alignment) -> list[Group]:
    """The groups as pairs of ranges: [((s0, s1), (t0, t1)), ...]."""
    s, t = alignment.bounds_s.tolist(), alignment.bounds_t.tolist()
    return list(zip(pairwise(s), pairwise(t), strict=True))


def exact_bounds(ends_s: ArrayLike, ends_t: ArrayLike) -> Alignment:
    """`align_exact` as cumulative bounds. ends_s [N_s], ends_t [N_t]: byte ends of tokens that spell the same text.

    Raises ValueError where ends fall, are negative, or the sides do not end on the same byte.
    """
    array_s, array_t = np.asarray(ends_s, dtype=np.int64), np.asarray(ends_t, dtype=np.int64)
    _check_both(len(array_s), len(array_t))
    if len(array_s) == 0:
        return _empty()
    for name, array in (("ends_s", array_s), ("ends_t", array_t)):
        if not _is_rising(array):
            raise ValueError(f"{name} must be byte offsets that never fall, got {array[:8].tolist()}...")
    if array_s[-1] != array_t[-1]:
        raise ValueError(f"the student's tokens end at byte {array_s[-1]}, the teacher's at {array_t[-1]}")
    bounds_s, bounds_t, count = _walk(array_s, array_t)
    return Alignment(bounds_s[: count + 1].copy(), bounds_t[: count + 1].copy())


def dtw_bounds(texts_s: Sequence[str], texts_t: Sequence[str], weights_s: ArrayLike, weights_t: ArrayLike) -> Alignment:
    """`align_dtw` as cumulative bounds. texts_*: N token texts; weights_* [N].

    The cost of a pair is the Levenshtein distance of the texts without spaces, times both weights; on ties the path
    goes diagonally, then back on the teacher's side, then on the student's. Groups are maximal runs without a diagonal.

    Raises ValueError where texts and weights differ in length, a weight is negative, not finite, or one side alone is
    empty.
    """
    w_s, w_t = np.asarray(weights_s, dtype=np.float64), np.asarray(weights_t, dtype=np.float64)
    if len(w_s) != len(texts_s) or len(w_t) != len(texts_t):
        raise ValueError(f"{len(texts_s)}, {len(texts_t)} texts but {len(w_s)}, {len(w_t)} weights")
    if not all(np.isfinite(weights).all() and (weights >= 0).all() for weights in (w_s, w_t)):
        raise ValueError("a weight of the warping is negative or not finite")
    _check_both(len(texts_s), len(texts_t))
    if len(texts_s) == 0:
        return _empty()
    unique_s, at_s = _distinct(texts_s)
    unique_t, at_t = _distinct(texts_t)
    edits = cdist(unique_t, unique_s, scorer=Levenshtein.distance, dtype=np.int32)
    near = np.searchsorted(_sizes(unique_s)[at_s].cumsum(), _sizes(unique_t)[at_t].cumsum())
    near[-1] = len(texts_s) - 1
    limit = _near_cost(edits, at_s, at_t, w_s, w_t, near)
    bounds_s, bounds_t = _trace(_warp(edits, at_s, at_t, w_s, w_t, limit))
    return Alignment(bounds_s, bounds_t)


def _weights(entropy: ArrayLike | None, n: int) -> np.ndarray:
    return np.ones(n) if entropy is None else entropy_weights(np.asarray(entropy)[:n])


def _empty() -> Alignment:
    return Alignment(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))


def _check_both(n_s: int, n_t: int) -> None:
    if (n_s == 0) != (n_t == 0):
        raise ValueError(f"one side is empty ({n_s} student tokens, {n_t} teacher tokens): no group can cover both")


def _distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different texts without their spaces, and which of them each text is: only those are compared."""
    index: dict[str, int] = {}
    at = np.array([index.setdefault(text.replace(" ", ""), len(index)) for text in texts], dtype=np.int64)
    return list(index), at


def _sizes(texts: Sequence[str]) -> np.ndarray:
    """Their bytes: what both sides share however they cut a character."""
    return np.array([len(text.encode("utf-8", "surrogateescape")) for text in texts])


@njit(cache=True)
def _is_rising(ends: np.ndarray) -> bool:
    last = 0
    for end in ends:
        if end < last:
            return False
        last = end
    return True


@njit(cache=True)
def _walk(ends_s: np.ndarray, ends_t: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    n_s, n_t, last = len(ends_s), len(ends_t), ends_s[-1]
    bounds_s = np.zeros(min(n_s, n_t) + 2, np.int32)
    bounds_t = np.zeros(min(n_s, n_t) + 2, np.int32)
    i, j, count = 0, 0, 0
    while last > 0:
        if ends_s[i] < ends_t[j]:
            i += 1
            continue
        if ends_s[i] > ends_t[j]:
            j += 1
            continue
        end = ends_s[i]
        i, j = i + 1, j + 1
        if end < last:  # a zero-width token inside the text joins the group that it ends with
            while ends_s[i] == end:
                i += 1
            while ends_t[j] == end:
                j += 1
        count += 1
        bounds_s[count], bounds_t[count] = i, j
        if end == last:
            break
    if i < n_s and j < n_t:
        count += 1
    bounds_s[count], bounds_t[count] = n_s, n_t
    return bounds_s, bounds_t, count


@njit(cache=True)
def _near_cost(
    edits: np.ndarray,
    at_s: np.ndarray,
    at_t: np.ndarray,
    weights_s: np.ndarray,
    weights_t: np.ndarray,
    near: np.ndarray,
) -> float:
    """The cost of the best path that stays NEAR tokens from student token near[i] where it is at teacher token i."""
    n_s, low = len(at_s), 0
    row = np.full(n_s + 1, np.inf)
    row[0] = 0.0
    for i in range(len(at_t)):
        diagonal, row[low], left = row[low], np.inf, np.inf
        for j in range(low, min(near[i] + NEAR, n_s)):
            above = row[j + 1]
            left = edits[at_t[i], at_s[j]] * weights_t[i] * weights_s[j] + min(diagonal, above, left)
            diagonal, row[j + 1] = above, left
        low = max(low, near[i] - NEAR)
    return row[n_s]


@njit(cache=True)
def _warp(
    edits: np.ndarray, at_s: np.ndarray, at_t: np.ndarray, weights_s: np.ndarray, weights_t: np.ndarray, limit: float
) -> np.ndarray:
    """The step that reaches each cell, [N_t, N_s] uint8; edits of cell (i, j): edits[at_t[i], at_s[j]].

    Costs are never negative, so no best path visits a cell that costs more than `limit`, the whole of some path: such
    cells are left out (PrunedDTW, Silva and Batista, 2016), and the steps of the best paths stay as they are.
    """
    n_t, n_s = len(at_t), len(at_s)
    steps = np.empty((n_t, n_s), np.uint8)
    row = np.full(n_s + 1, np.inf)  # row[j + 1]: the best way to cell j of the row above
    row[0] = 0.0
    first, stop = 0, 0  # outside of cells [first, stop) the row above has none
    for i in range(n_t):
        diagonal, row[first], left = row[first], np.inf, np.inf
        j, low, high = first, n_s, first
        while j < n_s and (j <= stop or left <= limit):
            above = row[j + 1]
            best, step = diagonal, DIAGONAL
            if above < best:
                best, step = above, TEACHER_BACK
            if left < best:
                best, step = left, STUDENT_BACK
            left = edits[at_t[i], at_s[j]] * weights_t[i] * weights_s[j] + best
            steps[i, j] = step
            diagonal, row[j + 1] = above, np.inf
            if left <= limit:
                row[j + 1], low, high = left, min(low, j), j + 1
            j += 1
        first, stop = low, high
    return steps


@njit(cache=True)
def _trace(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    i, j = steps.shape[0] - 1, steps.shape[1] - 1
    bounds_s = np.zeros(min(steps.shape) + 1, np.int32)
    bounds_t = np.zeros(min(steps.shape) + 1, np.int32)
    at = len(bounds_s) - 1
    bounds_s[at], bounds_t[at] = j + 1, i + 1
    while i > 0 or j > 0:
        step = steps[i, j]
        if step == DIAGONAL:
            at -= 1
            bounds_s[at], bounds_t[at] = j, i
        i -= step != STUDENT_BACK
        j -= step != TEACHER_BACK
    at -= 1
    return bounds_s[at:].copy(), bounds_t[at:].copy()
