"""Where a batch's response rows may be divided: the loss is a sum over groups, so anywhere that is inside none.

Legend: R response rows, G groups, C cuts, T teachers. Cuts are found on the host while a batch is collated; later the
groups may be on an accelerator, and asking them would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from cdm.records import AlignedBatch, TeacherRows


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start to end of a batch with all that is compared with them, numbered from 0."""

    start: int
    end: int
    targets_s: Tensor
    documents_s: Tensor
    teachers: tuple[TeacherRows, ...]


def cuts(rows: int, teachers: Sequence[TeacherRows], bounds: np.ndarray | None = None) -> np.ndarray:
    """[C, 1 + 2 T] int64: a row before which a batch of `rows` may end, and each teacher's group and row there.

    From 0 to `rows`, both included; with `bounds` (of the documents) at these rows alone. The teachers' tensors are on
    the CPU, their groups in order.
    """
    inside = np.zeros(rows + 1, np.int64)
    for teacher in teachers:
        first, last = teacher.groups_s.numpy().T
        inside[first + 1] += 1
        inside[last] -= 1
    free = np.flatnonzero(np.cumsum(inside) == 0) if bounds is None else np.unique(bounds)
    columns = [free]
    for teacher in teachers:
        group = np.searchsorted(teacher.groups_s[:, 0].numpy(), free)
        columns += [group, np.append(teacher.groups_t[:, 0].numpy(), len(teacher.ids_t))[group]]
    return np.stack(columns, 1)


def divide(batch: AlignedBatch, rows: int) -> list[Piece]:
    """The batch in pieces of about `rows` rows and equal size; a longer group stays whole. No piece without rows."""
    total = len(batch.rows_s)
    count = max(1, -(-total // rows))
    wanted = np.arange(1, count) * total // count
    at = np.searchsorted(batch.cuts[:, 0], wanted, side="right") - 1
    chosen = np.unique(np.concatenate([[0], at, [len(batch.cuts) - 1]]))
    return [_between(batch, first, last) for first, last in pairwise(batch.cuts[chosen].tolist())]


def _between(batch: AlignedBatch, first: list[int], last: list[int]) -> Piece:
    start, end = first[0], last[0]
    teachers = []
    for k, teacher in enumerate(batch.teachers):
        (group, row_t), (last_group, last_row_t) = first[1 + 2 * k : 3 + 2 * k], last[1 + 2 * k : 3 + 2 * k]
        teachers.append(
            TeacherRows(
                teacher.groups_s[group:last_group] - start,
                teacher.groups_t[group:last_group] - row_t,
                teacher.ids_t[row_t:last_row_t],
                teacher.logp_t[row_t:last_row_t],
                teacher.topk_ids_t[row_t:last_row_t],
                teacher.topk_logp_t[row_t:last_row_t],
            )
        )
    return Piece(start, end, batch.targets_s[start:end], batch.documents_s[start:end], tuple(teachers))
