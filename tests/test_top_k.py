from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.top_k import best_columns

FLOATS = st.sampled_from([float("-inf"), -3.5, -1.0, 0.0, 0.25, 2.0, 7.0, float("inf")]) | st.floats(width=32)


def slow_best(row: np.ndarray, k: int) -> list[int]:
    """All columns sorted: NaN first, the larger value next, the lower id among equals."""
    return sorted(range(len(row)), key=lambda c: (0, 0.0, c) if np.isnan(row[c]) else (1, -row[c], c))[:k]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(1, 4))
def test_equals_sorting_every_column(data: st.DataObject, width: int, rows: int) -> None:
    values = data.draw(st.lists(st.lists(FLOATS, min_size=width, max_size=width), min_size=rows, max_size=rows))
    k = data.draw(st.integers(1, width))
    logits = torch.tensor(values, dtype=torch.float32).abs_().mul_(-1) + 0.0  # no -0.0, no NaN with a sign
    expected = [slow_best(row, k) for row in logits.numpy()]
    assert best_columns(logits, k).tolist() == expected


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "width", "k"), [(7, 997, 100), (2, 997, 997), (1, 4096, 1), (0, 50, 5)])
def test_equals_torch_on_distinct_values(rows: int, width: int, k: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)] or [torch.zeros(0)])
    logits = (logits.float() - width / 2).reshape(rows, -1) if rows else torch.zeros(0, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = best_columns(logits, k)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.int64
    assert torch.equal(found, logits.topk(k).indices)
