"""How sure a score is: bootstrap over documents, alone and paired; and pass@k (layer 1).

Legend: D documents, S seeds (samples a document), B resamples. A score is a ratio of sums over documents, so that bits
per byte, shares and means are one case. Percentile bootstrap; the seed is fixed: the same
numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 20_260_101
CELLS = 1 << 22  # numbers drawn at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds that LEVEL of the resamples lie between."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Ratio:
    """What each document adds to both sums of a score: above, below [D]. Its value is sum(above) / sum(below)."""

    above: np.ndarray
    below: np.ndarray

    @classmethod
    def mean(cls, values: np.ndarray) -> Ratio:
        """The mean over documents of values [D]."""
        return cls(np.asarray(values, np.float64), np.ones(len(values)))

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())

    def of(self, chosen: np.ndarray) -> np.ndarray:
        """The values [B] on resamples chosen [B, D]; NaN where nothing is below."""
        above, below = self.above[chosen].sum(1), self.below[chosen].sum(1)
        return np.divide(above, below, out=np.full(len(chosen), np.nan), where=below != 0)


def interval(score: Ratio, resamples: int = RESAMPLES) -> Interval:
    """A score on documents drawn with replacement. Raises ValueError without documents."""
    return _bounds(score.value, np.concatenate([score.of(chosen) for chosen in draws(len(score.above), resamples)]))


def difference(one: Ratio, other: Ratio, resamples: int = RESAMPLES) -> Interval:
    """one - other on the same documents, in the same order: both are computed on each resample.

    Raises ValueError where the numbers of documents differ.
    """
    if len(one.above) != len(other.above):
        raise ValueError(f"{len(one.above)} and {len(other.above)} documents cannot be paired")
    found = [one.of(chosen) - other.of(chosen) for chosen in draws(len(one.above), resamples)]
    return _bounds(one.value - other.value, np.concatenate(found))


def draws(documents: int, resamples: int) -> Iterator[np.ndarray]:
    """Numbers of documents [B, D] in blocks of resamples; the same for equal arguments."""
    if not documents:
        raise ValueError("no documents to draw from")
    random = np.random.default_rng(SEED)
    rows = max(1, CELLS // documents)
    for start in range(0, resamples, rows):
        yield random.integers(0, documents, (min(rows, resamples - start), documents))


def _bounds(value: float, found: np.ndarray) -> Interval:
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, from `samples` of which `passed` did; unbiased (arXiv 2107.03374)."""
    if k > samples:
        raise ValueError(f"pass@{k} needs {k} samples, there are {samples}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
