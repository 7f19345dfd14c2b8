"""Formats of the top-k rows that were tried, each as columns of a row group: NAME -> (encode, decode).

Legend: N rows of a row group, K top-k, V vocabulary. `encode(ids [N, K] int32, logp [N, K] float16)` gives named flat
arrays (uint8 ones are stored as binary); `decode(arrays, k)` gives both back, best first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

from cdm import codec

Arrays = dict[str, np.ndarray]
VOCABULARY = 151_665
SIGN = np.uint16(0x8000)


def plain(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    return {"ids": ids.ravel(), "logp": logp.ravel()}


def read_plain(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    return arrays["ids"].reshape(-1, k), arrays["logp"].reshape(-1, k)


# --- sorted by id; the order comes back by sorting the log-probabilities, equal ones by id -------------------------


def by_id(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    order = ids.argsort(1)
    return {"ids": np.take_along_axis(ids, order, 1).ravel(), "logp": np.take_along_axis(logp, order, 1).ravel()}


def read_by_id(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids, logp = read_plain(arrays, k)
    order = (logp.view(np.uint16) & ~SIGN).argsort(1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logp, order, 1)


def id_deltas(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    arrays = by_id(ids, logp)
    steps = np.diff(arrays["ids"].reshape(ids.shape), axis=1, prepend=0)
    return {"ids": steps.ravel(), "logp": arrays["logp"]}


def read_id_deltas(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = arrays["ids"].reshape(-1, k).cumsum(1, dtype=np.int32)
    return read_by_id({"ids": ids, "logp": arrays["logp"]}, k)


# --- best first; a log-probability is its step in float16 patterns ---------------------------------------------------


def steps(logp: np.ndarray) -> np.ndarray:
    return np.diff((logp.view(np.uint16) & ~SIGN).astype(np.int32), axis=1, prepend=0)


def from_steps(steps: np.ndarray) -> np.ndarray:
    return (steps.cumsum(1).astype(np.uint16) | SIGN).view(np.float16)


def planes(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    numbers = steps(logp)
    found = {f"id{i}": (ids >> 8 * i).astype(np.uint8).ravel() for i in range(3)}
    return found | {f"step{i}": (numbers >> 8 * i).astype(np.uint8).ravel() for i in range(2)}


def read_planes(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    wide = {name: array.astype(np.int32) for name, array in arrays.items()}
    ids = wide["id0"] | wide["id1"] << 8 | wide["id2"] << 16
    return ids.reshape(-1, k), from_steps((wide["step0"] | wide["step1"] << 8).reshape(-1, k))


def packed(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    bits = (ids[:, :, None] >> np.arange(18)) & 1
    return {"ids": np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little"), "logp": logp.ravel()}


def read_packed(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    return _unpack(arrays["ids"], len(arrays["logp"])).reshape(-1, k), arrays["logp"].reshape(-1, k)


@njit(cache=True)
def _unpack(data, count):  # type: ignore[no-untyped-def]
    out = np.empty(count, np.int32)
    buffer, held, at = np.int64(0), 0, 0
    for i in range(count):
        while held < 18:
            buffer |= np.int64(data[at]) << held
            held += 8
            at += 1
        out[i] = buffer & 0x3FFFF
        buffer >>= 18
        held -= 18
    return out


def eight_bits(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    best, worst = logp[:, :1].astype(np.float32), logp[:, -1:].astype(np.float32)
    span = np.maximum(best - worst, 1e-6)
    levels = np.rint((best - logp) / span * 255).astype(np.int32)
    numbers = np.diff(levels, axis=1, prepend=0).astype(np.uint8)
    return {"ids": ids.ravel(), "levels": numbers.ravel(), "ends": logp[:, [0, -1]].ravel()}


def read_eight_bits(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    best, worst = arrays["ends"].astype(np.float32).reshape(-1, 2, 1).transpose(1, 0, 2)
    levels = arrays["levels"].reshape(-1, k).cumsum(1)
    return arrays["ids"].reshape(-1, k), (best - levels / 255 * np.maximum(best - worst, 1e-6)).astype(np.float16)


# --- the codes of cdm.codec, ids numbered in several ways ----------------------------------------------------------


def _coded(places: np.ndarray, logp: np.ndarray) -> Arrays:
    """Any numbers in the place of the ids: `codec` codes them as if the list never moved."""
    found: Arrays = {}
    for name, numbers in (("ids", places.ravel()), ("logp", steps(logp).ravel())):
        found[name], found[f"{name}_more"] = split_numbers(numbers)
    return found


def split_numbers(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    code, more = np.empty(len(numbers), np.uint8), np.empty(2 * len(numbers), np.uint8)
    return code, more[: _split(numbers, code, more)].copy()


@njit(cache=True)
def _split(numbers, code, more):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(len(numbers)):
        code[i], at = codec._put(numbers[i], more, at)
    return at


@njit(cache=True)
def _join(code, more):  # type: ignore[no-untyped-def]
    out = np.empty(len(code), np.int32)
    at = 0
    for i in range(len(code)):
        number = np.int64(code[i])
        if number >= codec.ONE:
            number, at = codec._large(number, more, at)
        out[i] = number
    return out


def _read_coded(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    return _join(arrays["ids"], arrays["ids_more"]), from_steps(
        _join(arrays["logp"], arrays["logp_more"]).reshape(-1, k)
    )


def id_codes(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    return _coded(ids, logp)


def read_id_codes(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, logp = _read_coded(arrays, k)
    return numbers.reshape(-1, k), logp


def ranked(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    """Ids by their frequency in the row group, whose table is stored with it."""
    used, counts = np.unique(ids, return_counts=True)
    table = used[np.lexsort((used, -counts))].astype(np.int32)
    rank = np.empty(VOCABULARY, np.int32)
    rank[table] = np.arange(len(table))
    return _coded(rank[ids], logp) | {"table": table}


def read_ranked(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, logp = _read_coded(arrays, k)
    return arrays["table"][numbers].reshape(-1, k), logp


def seen_before(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    """Ids of the row before by their place there, others K on."""
    return _coded(_against_row_before(ids, VOCABULARY), logp)


def read_seen_before(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    numbers, logp = _read_coded(arrays, k)
    ids = numbers.reshape(-1, k)
    _from_row_before(ids)
    return ids, logp


@njit(cache=True)
def _against_row_before(ids, vocabulary):  # type: ignore[no-untyped-def]
    k = ids.shape[1]
    place, row = np.zeros(vocabulary, np.int32), np.full(vocabulary, -1, np.int32)
    out = np.empty(ids.shape, np.int32)
    for n in range(len(ids)):
        for j in range(k):
            token = ids[n, j]
            out[n, j] = place[token] if n and row[token] == n - 1 else token + k
        for j in range(k):
            place[ids[n, j]], row[ids[n, j]] = j, n
    return out


@njit(cache=True)
def _from_row_before(ids):  # type: ignore[no-untyped-def]
    k = ids.shape[1]
    for n in range(len(ids)):
        for j in range(k):
            ids[n, j] = ids[n - 1, ids[n, j]] if ids[n, j] < k else ids[n, j] - k


def moving(ids: np.ndarray, logp: np.ndarray) -> Arrays:
    codes = codec.encode(ids, logp, np.full(len(ids), ids.shape[1], np.int32), VOCABULARY)
    return {"ids": codes.ids, "ids_more": codes.ids_more, "logp": codes.logp, "logp_more": codes.logp_more}


def read_moving(arrays: Arrays, k: int) -> tuple[np.ndarray, np.ndarray]:
    codes = codec.Codes(arrays["ids"], arrays["ids_more"], arrays["logp"], arrays["logp_more"])
    return codec.decode(codes, np.full(len(codes.ids) // k, k, np.int32), k, VOCABULARY)


Encode = Callable[[np.ndarray, np.ndarray], Arrays]
Decode = Callable[[Arrays, int], tuple[np.ndarray, np.ndarray]]
CHOSEN = "codes of places in a moving list (cdm.codec)"
FORMATS: dict[str, tuple[Encode, Decode]] = {
    "int32 + float16, best first": (plain, read_plain),
    "ids of 18 bits + float16": (packed, read_packed),
    "sorted by id": (by_id, read_by_id),
    "sorted by id, steps of ids": (id_deltas, read_id_deltas),
    "best first, ids + 8-bit log-probabilities": (eight_bits, read_eight_bits),
    "best first, byte planes of ids and steps": (planes, read_planes),
    "codes of ids": (id_codes, read_id_codes),
    "codes of frequency ranks, a table a row group": (ranked, read_ranked),
    "codes of places in the row before, or ids": (seen_before, read_seen_before),
    CHOSEN: (moving, read_moving),
}
