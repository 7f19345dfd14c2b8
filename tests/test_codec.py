"""The codec of the top-k rows against a list that is searched and swapped in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import codec


def rows(n: int, k: int, vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows, Zipf-like ids, log-probabilities from nearly certain to the lowest; some cells are padding."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.2, (n, k)), vocabulary).astype(np.int32) - 1
    logp = -np.sort(rng.gamma(0.3, 10.0 ** rng.integers(-6, 5, (n, 1)), (n, k)), axis=1)
    logp = logp.clip(-65504, 0).astype(np.float16)
    kept = rng.integers(0, k + 1, n).astype(np.int32)
    gone = np.arange(k) >= kept[:, None]
    ids[gone], logp[gone] = codec.PADDING_ID, codec.PADDING_LOGP
    return ids, logp, kept


def slow_numbers(ids: np.ndarray, logp: np.ndarray, kept: np.ndarray, vocabulary: int) -> tuple[list[int], list[int]]:
    """What is coded: each id's place in the list before it moves half-way up, each step between bit patterns."""
    listed = list(range(vocabulary))
    places, falls = [], []
    for row, values, count in zip(ids.tolist(), logp, kept, strict=True):
        bits = [0, *(int(value.view(np.uint16)) & 0x7FFF for value in values)]
        for j in range(count):
            at = listed.index(row[j])
            places.append(at)
            listed[at // 2], listed[at] = listed[at], listed[at // 2]
            falls.append(bits[j + 1] - bits[j])
    return places, falls


def slow_code(numbers: list[int]) -> tuple[list[int], list[int]]:
    code, more = [], []
    for number in numbers:
        if number < 128:
            code.append(number)
        elif number < 128 + 96 * 256:
            code.append(128 + (number - 128) // 256)
            more.append((number - 128) % 256)
        else:
            high, low = divmod(number - 128 - 96 * 256, 65536)
            code.append(224 + high)
            more += [low % 256, low // 256]
    return code, more


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 12),
    k=st.integers(1, 9),
    vocabulary=st.sampled_from([1, 7, 300, 151_665]),
    seed=st.integers(0, 999),
)
def test_codes_are_those_of_the_plain_list_and_come_back(n: int, k: int, vocabulary: int, seed: int) -> None:
    ids, logp, kept = rows(n, k, vocabulary, seed)
    codes = codec.encode(ids, logp, kept, vocabulary)
    places, falls = slow_numbers(ids, logp, kept, vocabulary)
    assert (codes.ids.tolist(), codes.ids_more.tolist()) == slow_code(places)
    assert (codes.logp.tolist(), codes.logp_more.tolist()) == slow_code(falls)
    read_ids, read_logp = codec.decode(codes, kept, k, vocabulary)
    np.testing.assert_array_equal(read_ids, ids)
    np.testing.assert_array_equal(read_logp, logp)
    assert read_ids.dtype == np.int32 and read_logp.dtype == np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, logp: ids.__setitem__((1, 0), 50), "ids from 0 to 50, expected 0 to 49"),
        (lambda ids, logp: ids.__setitem__((1, 1), -1), "ids from -1"),
        (lambda ids, logp: logp.__setitem__((0, 0), 0.5), "0 or less and best first"),
        (lambda ids, logp: logp.__setitem__((0, 1), -0.5), "0 or less and best first"),
        (lambda ids, logp: logp.__setitem__((1, 1), np.nan), "0 or less and best first"),
    ],
)
def test_rows_that_are_no_rows_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    ids = np.array([[0, 1], [2, 3]], np.int32)
    logp = np.array([[-1, -2], [-1, -2]], np.float16)
    change(ids, logp)
    with pytest.raises(ValueError, match=message):
        codec.encode(ids, logp, np.full(2, 2, np.int32), 50)


def test_streams_that_do_not_fit_are_refused() -> None:
    ids, logp, kept = rows(9, 5, 300, 1)
    codes = codec.encode(ids, logp, kept, 300)
    short = codec.Codes(codes.ids[:-1], codes.ids_more, codes.logp, codes.logp_more)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(short, kept, 5, 300)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(codes, kept, 4, 300)
    far = codec.Codes(np.array([200], np.uint8), np.zeros(1, np.uint8), np.zeros(1, np.uint8), np.zeros(0, np.uint8))
    with pytest.raises(ValueError, match="beyond 300"):
        codec.decode(far, np.ones(1, np.int32), 5, 300)
