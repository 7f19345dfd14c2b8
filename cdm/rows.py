"""The student's rows as the methods read them: values to look at, and gradients through `lse` and `pick` alone.

Legend: R response rows, M rows asked for, K ids a row, V vocabulary. A method ranks the logits [R, V], but its loss
depends on them through each row's normaliser and its logits at some ids. Whoever holds the logits can therefore give
their gradient without a second [R, V] tensor (`cdm.head`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from cdm import losses

STRIDE = 32  # columns that share a maximum: near the square root of V / K, where the two searches cost the same


class StudentRows:
    """Rows of logits [R, V] with their gradient kept by autograd: what a plain tensor of logits is to a method."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        """[R, V], to look at: without gradient."""
        return self._logits.detach()

    @cached_property
    def lse(self) -> Tensor:
        """logsumexp of each row at temperature 1, at least float32: [R]."""
        return losses.row_logsumexp(self._logits)

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Logits of the rows [M] at `ids` [M, K]: [M, K]."""
        return pick(self._logits, rows, ids)


Logits = Tensor | StudentRows  # what a method takes


def student_rows(logits_s: Logits) -> StudentRows:
    return StudentRows(logits_s) if isinstance(logits_s, Tensor) else logits_s


def token_logp(student: StudentRows, targets_s: Tensor) -> Tensor:
    """Log-probability of each row's token [R]: [R]."""
    rows = torch.arange(len(targets_s), device=targets_s.device)
    return student.pick(rows, targets_s[:, None]).squeeze(1) - student.lse


def pick(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """logits[rows[:, None], ids] without a copy of the rows: [R, V], [M], [M, K] -> [M, K]."""
    return logits.reshape(-1).index_select(0, flat(logits, rows, ids).reshape(-1)).view(ids.shape)


def flat(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Where `ids` [M, K] of the rows [M] are in the flattened logits."""
    return rows[:, None] * logits.shape[1] + ids


def best_ids(logits: Tensor, rows: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of the rows [M], best first: [M, min(k, V)].

    Columns STRIDE apart share a maximum; the k largest values lie in the k groups of columns with the largest maxima,
    so that only these are ranked. On equal values any choice is right.
    """
    if k == 0:
        return rows.new_zeros(len(rows), 0)
    groups = logits.shape[1] // STRIDE
    if groups < 2 * k:
        return logits[rows].topk(min(k, logits.shape[1])).indices
    maxima = logits[:, : groups * STRIDE].unflatten(1, (STRIDE, groups)).amax(1)
    found = maxima[rows].topk(k).indices
    steps = torch.arange(STRIDE, device=logits.device) * groups
    rest = torch.arange(groups * STRIDE, logits.shape[1], device=logits.device).expand(len(rows), -1)
    ids = torch.cat([(found[:, :, None] + steps).flatten(1), rest], 1)
    return ids.gather(1, pick(logits, rows, ids).topk(k).indices)
