"""The top-k rows of a row group as bytes that compress well: exact, and decoded row after row (layer 1).

Legend: N rows, K top-k (best first, padding last), E entries that are kept. An entry is two numbers:
- the id's place in a list of all ids in which an id moves half-way to the front whenever it is used. The list begins in
  the order of the ids, which in a BPE vocabulary is roughly the order of frequency, and soon knows what this text uses;
- how far the float16 of the log-probability, taken as an integer, lies beyond the row's previous one.
Both are small as a rule. A number is a byte, and one or two more in a second stream where it is large: zstd is left
with bytes of a skewed distribution and, apart from them, bytes that nothing would compress.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

ONE, TWO = 128, 224  # codes below ONE are the number itself; ONE to TWO have one more byte, the others two
TWO_FROM = ONE + (TWO - ONE) * 256  # the least number that needs two
LIMIT = TWO_FROM + (256 - TWO) * 65536
PADDING_ID, PADDING_LOGP = -1, np.float16(-np.inf)
_SIGN = 0x8000


@dataclass(frozen=True, slots=True)
class Codes:
    """The streams of a row group, uint8: a code an entry [E], and the bytes that large numbers have besides."""

    ids: np.ndarray
    ids_more: np.ndarray
    logp: np.ndarray
    logp_more: np.ndarray


def encode(ids: np.ndarray, logp: np.ndarray, kept: np.ndarray, vocabulary: int) -> Codes:
    """ids [N, K] int32 below `vocabulary`, logp [N, K] float16, kept [N] int32: how many of each row are no padding.

    Raises ValueError where a row is not best first, has a positive or undefined log-probability or an id out of range.
    """
    inside = np.arange(ids.shape[1]) < kept[:, None]
    _check(ids[inside], inside, logp, vocabulary)
    entries = int(kept.sum())
    codes = np.empty((2, entries), np.uint8)
    more = np.empty((2, 2 * entries), np.uint8)
    bits = np.ascontiguousarray(logp).view(np.uint16) & (_SIGN - 1)
    n_ids, n_logp = _encode(np.ascontiguousarray(ids), bits, kept, vocabulary, codes[0], more[0], codes[1], more[1])
    return Codes(codes[0], more[0, :n_ids].copy(), codes[1], more[1, :n_logp].copy())


def decode(codes: Codes, kept: np.ndarray, k: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse: ids [N, k] int32 and log-probabilities [N, k] float16, with padding after the kept ones.

    Raises ValueError where the streams do not fit the counts.
    """
    entries = int(kept.sum())
    more = [np.count_nonzero(c >= ONE) + np.count_nonzero(c >= TWO) for c in (codes.ids, codes.logp)]
    found = (len(codes.ids), len(codes.logp), len(codes.ids_more), len(codes.logp_more))
    if found != (entries, entries, *more) or (len(kept) and not 0 <= kept.min() <= kept.max() <= k):
        raise ValueError(f"top-k streams of {found} bytes, expected {(entries, entries, *more)} for {len(kept)} rows")
    ids = np.empty((len(kept), k), np.int32)
    bits = np.empty((len(kept), k), np.uint16)
    places = np.arange(vocabulary, dtype=np.int32)
    if not _decode(codes.ids, codes.ids_more, codes.logp, codes.logp_more, kept, places, ids, bits):
        raise ValueError(f"top-k streams name ids beyond {vocabulary}")
    return ids, bits.view(np.float16)


def more_bytes(codes: np.ndarray) -> np.ndarray:
    """How many bytes of the second stream belong to each code."""
    return (codes >= ONE).astype(np.int64) + (codes >= TWO)


def _check(ids: np.ndarray, inside: np.ndarray, logp: np.ndarray, vocabulary: int) -> None:
    if vocabulary > LIMIT:
        raise ValueError(f"ids up to {vocabulary}: the format holds at most {LIMIT}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"top-k ids from {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}")
    with np.errstate(invalid="ignore"):
        falls = (logp[:, 1:] <= logp[:, :-1]) | ~inside[:, 1:]
        good = falls.all() and (logp[inside] <= 0).all()
    if not good:
        raise ValueError("top-k log-probabilities must be 0 or less and best first")


# --- kernels: bit patterns of logp without their sign, which grow along a row --------------------------------------


@njit(cache=True)
def _put(number, more, at):  # type: ignore[no-untyped-def]
    """The code of a number, whose other bytes are written from `at` on, and the next free place."""
    if number < ONE:
        return np.uint8(number), at
    if number < TWO_FROM:
        number -= ONE
        more[at] = number & 255
        return np.uint8(ONE + (number >> 8)), at + 1
    number -= TWO_FROM
    more[at] = number & 255
    more[at + 1] = (number >> 8) & 255
    return np.uint8(TWO + (number >> 16)), at + 2


@njit(cache=True)
def _large(code, more, at):  # type: ignore[no-untyped-def]
    """The inverse for a code of at least ONE: the number, and the next place to read."""
    if code < TWO:
        return ONE + ((code - ONE) << 8) + np.int64(more[at]), at + 1
    low = np.int64(more[at]) + (np.int64(more[at + 1]) << 8)
    return TWO_FROM + ((code - TWO) << 16) + low, at + 2


@njit(cache=True)
def _encode(ids, bits, kept, vocabulary, id_codes, id_more, logp_codes, logp_more):  # type: ignore[no-untyped-def]
    listed = np.arange(vocabulary).astype(np.int32)  # the id at each place
    place = np.arange(vocabulary).astype(np.int32)  # the place of each id
    entry, n_ids, n_logp = 0, 0, 0
    for n in range(len(kept)):
        previous = np.int64(0)
        for j in range(kept[n]):
            token = ids[n, j]
            at = np.int64(place[token])
            id_codes[entry], n_ids = _put(at, id_more, n_ids)
            half = at >> 1
            other = listed[half]
            listed[half], listed[at] = token, other
            place[token], place[other] = half, at
            now = np.int64(bits[n, j])
            logp_codes[entry], n_logp = _put(now - previous, logp_more, n_logp)
            previous = now
            entry += 1
    return n_ids, n_logp


@njit(cache=True)
def _decode(id_codes, id_more, logp_codes, logp_more, kept, listed, ids, bits):  # type: ignore[no-untyped-def]
    entry, m_ids, m_logp = 0, 0, 0
    for n in range(len(kept)):
        now = np.int64(0)
        for j in range(kept[n]):
            code = np.int64(logp_codes[entry])
            if code >= ONE:
                code, m_logp = _large(code, logp_more, m_logp)
            now += code
            bits[n, j] = now | _SIGN
            at = np.int64(id_codes[entry])
            if at >= ONE:
                at, m_ids = _large(at, id_more, m_ids)
                if at >= len(listed):
                    return False
            token = listed[at]
            listed[at] = listed[at >> 1]
            listed[at >> 1] = token
            ids[n, j] = token
            entry += 1
        for j in range(kept[n], ids.shape[1]):
            ids[n, j] = PADDING_ID
            bits[n, j] = 0xFC00  # minus infinity
    return True
