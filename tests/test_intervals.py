"""Bootstrap intervals against a twin that draws one document at a time, and pass@k against all subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cdm.intervals import Ratio, difference, draws, interval, pass_at_k


def resampled_slowly(above: list[float], below: list[float], resamples: int) -> list[float]:
    found = []
    for block in draws(len(above), resamples):
        for chosen in block.tolist():
            top = bottom = 0.0
            for document in chosen:
                top += above[document]
                bottom += below[document]
            found.append(top / bottom)
    return found


def sorted_quantile(values: list[float], share: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def some(seed: int, documents: int = 30) -> Ratio:
    random = np.random.default_rng(seed)
    return Ratio(random.gamma(2.0, 30.0, documents), random.integers(5, 80, documents).astype(float))


def test_an_interval_is_the_slow_twins() -> None:
    score = some(0)
    values = resampled_slowly(score.above.tolist(), score.below.tolist(), 400)
    found = interval(score, resamples=400)
    assert found.value == pytest.approx(score.above.sum() / score.below.sum())
    assert found.low == pytest.approx(sorted_quantile(values, 0.025))
    assert found.high == pytest.approx(sorted_quantile(values, 0.975))
    assert interval(score, resamples=400) == found, "the seed is fixed"


def test_a_difference_is_taken_on_the_same_documents() -> None:
    one, other = some(1), some(2)
    mine = resampled_slowly(one.above.tolist(), one.below.tolist(), 300)
    theirs = resampled_slowly(other.above.tolist(), other.below.tolist(), 300)
    changes = [a - b for a, b in zip(mine, theirs, strict=True)]
    found = difference(one, other, resamples=300)
    assert found.low == pytest.approx(sorted_quantile(changes, 0.025))
    assert found.high == pytest.approx(sorted_quantile(changes, 0.975))
    shifted = Ratio(one.above + one.below, one.below)  # one more on every document, whichever are drawn
    assert (found := difference(shifted, one)).low == pytest.approx(1) and found.high == pytest.approx(1)
    with pytest.raises(ValueError, match="30 and 29 documents"):
        difference(one, some(2, documents=29))


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Means of 60 draws of a known law, 300 experiments: of 95 % intervals 277 to 293, two standard deviations."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        found = interval(Ratio.mean(random.normal(5.0, 2.0, 60)), resamples=400)
        covered += found.low <= 5.0 <= found.high
    assert 270 <= covered <= 296


def test_blocks_of_resamples_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draws(7, 50)))
    monkeypatch.setattr("cdm.intervals.CELLS", 70)
    assert np.array_equal(np.concatenate(list(draws(7, 50))), whole)
    with pytest.raises(ValueError, match="no documents"):
        next(draws(0, 5))


@pytest.mark.parametrize(("samples", "passed", "k", "expected"), [
    (1, 1, 1, 1.0), (1, 0, 1, 0.0), (5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 2, 4, 1.0), (10, 0, 10, 0.0),
])  # fmt: skip
def test_pass_at_k_by_hand(samples: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected)
    results = [True] * passed + [False] * (samples - passed)
    subsets = list(combinations(results, k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 needs 3 samples, there are 2"):
        pass_at_k(2, 1, 3)
