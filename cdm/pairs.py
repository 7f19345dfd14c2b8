"""What stands for the groups: pairs of distributions, and the sums that every method returns.

Legend: R response rows of a batch, G groups, L rows of one group, K top-k, V vocabulary. docs/method.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cdm.records import LossOutput, TeacherRows
from cdm.rows import StudentRows, best_ids
from cdm.vocab_map import VocabMap


@dataclass(frozen=True, slots=True)
class Pairs:
    """One pair of distributions a group: the student's, read through `pick` and `lse`, and the teacher's top-k [G, K].

    The student's is its row `rows` [G]; or, with `means`, the mean of the log-probabilities of the group's rows [L].
    top_s [G, K']: the student's live best ids.
    """

    student: StudentRows
    rows: Tensor
    means: Means | None
    top_s: Tensor
    ids_t: Tensor
    logp_t: Tensor

    def pick(self, ids: Tensor) -> Tensor:
        """Student logits at `ids` [G, M]."""
        if self.means is None:
            return self.student.pick(self.rows, ids)
        return self.means(self.student.pick(self.rows, ids[self.means.of_row]))

    @property
    def lse(self) -> Tensor:
        """The student's normaliser [G], so that z - lse are log-probabilities."""
        lse = self.student.lse[self.rows]
        return lse if self.means is None else self.means(lse)


@dataclass(frozen=True, slots=True)
class Means:
    """Means over the rows of each group: the group of each row `of_row` [L], its weight there `share` [L]."""

    groups: int
    of_row: Tensor
    share: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """[L, ...] -> [G, ...]."""
        share = self.share.to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return values.new_zeros(self.groups, *values.shape[1:]).index_add(0, self.of_row, values * share)


def need_map(method: str, student: StudentRows, vocab_map: VocabMap | None) -> VocabMap:
    if vocab_map is None:
        raise ValueError(f"method {method!r} needs a vocabulary map; for one shared tokenizer use 'kl'")
    size = student.logits.shape[1]
    if len(vocab_map.inverse) > size:
        raise ValueError(
            f"the student has {size} logits but its tokenizer {vocab_map.name_s!r} "
            f"{len(vocab_map.inverse)} ids: resize the embedding or give the model's own tokenizer"
        )
    return vocab_map


def nothing(student: StudentRows) -> LossOutput:
    """The output of a batch without groups: zero, and still part of the graph."""
    none = torch.zeros(0, dtype=torch.long, device=student.logits.device)
    return LossOutput(student.pick(none, none[:, None]).sum(), 0, {})


def pair_rows(student: StudentRows, teacher: TeacherRows, top_k: int, rows: Literal["first", "mean"]) -> Pairs:
    """The distributions that stand for the groups. top_k 0: no live candidates, and all of the teacher's."""
    if rows not in ("first", "mean"):
        raise ValueError(f"rows {rows!r}: choose 'first' or 'mean'")
    k_t = min(top_k or teacher.topk_ids_t.shape[1], teacher.topk_ids_t.shape[1])
    means = None
    if rows == "mean":
        at, of_row = _rows(teacher.groups_s)
        share = (1.0 / (teacher.groups_s[:, 1] - teacher.groups_s[:, 0]))[of_row]
        means = Means(len(teacher.groups_s), of_row, share)
        logits = means(student.logits[at])
        top_s = best_ids(logits, torch.arange(len(logits), device=logits.device), top_k)
        ids_t, logp_t = _teacher_means(teacher)
    else:
        at = teacher.groups_s[:, 0]
        top_s = best_ids(student.logits, at, top_k)
        first_t = teacher.groups_t[:, 0]
        ids_t, logp_t = teacher.topk_ids_t[first_t], teacher.topk_logp_t[first_t]
    return Pairs(student, at, means, top_s, ids_t[:, :k_t], logp_t[:, :k_t].detach())


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """The sum of `values` [R] over the rows of each group: [G]."""
    rows, of_row = _rows(groups)
    return values.new_zeros(len(groups)).index_add(0, of_row, values[rows])


def _rows(groups: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of all groups, in order, and the group of each."""
    lengths = groups[:, 1] - groups[:, 0]
    of_row = torch.repeat_interleave(lengths)
    starts = torch.repeat_interleave(groups[:, 0] - (lengths.cumsum(0) - lengths), lengths)
    return starts + torch.arange(len(of_row), device=groups.device), of_row


def _teacher_means(teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """Log-probabilities averaged over each group's rows: the union's best K, the rest as padding.

    An id that a row lacks is at that row's smallest.
    """
    start, end = teacher.groups_t[:, 0], teacher.groups_t[:, 1]
    longest = int((end - start).max())
    rows = start[:, None] + torch.arange(longest, device=start.device)
    valid = rows < end[:, None]
    rows = torch.where(valid, rows, start[:, None])
    ids, logp = teacher.topk_ids_t[rows], teacher.topk_logp_t[rows]  # [G, L, K]
    least = torch.where(torch.isneginf(logp), torch.inf, logp).amin(2, keepdim=True)
    extra = torch.where(valid[:, :, None], logp.maximum(least) - least, 0.0).flatten(1)
    base = torch.where(valid, least[:, :, 0], 0.0).sum(1)
    ids, order = torch.where(valid[:, :, None] & (ids >= 0), ids, torch.iinfo(ids.dtype).max).flatten(1).sort(1)
    leads = ids < torch.iinfo(ids.dtype).max
    leads[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    segment = leads.long().cumsum(1).sub_(1).clamp_min_(0)
    total = torch.zeros_like(extra).scatter_add(1, segment, extra.gather(1, order)).gather(1, segment)
    means = ((base[:, None] + total) / (end - start)[:, None]).masked_fill(~leads, -torch.inf)
    logp, best = means.topk(teacher.topk_ids_t.shape[1])
    return ids.gather(1, best).masked_fill(torch.isneginf(logp), -1), logp


def output(
    kd: Tensor,
    teacher: TeacherRows,
    mass_exact: Tensor | None = None,
    mass_dynamic: Tensor | None = None,
    **extra: Tensor,
) -> LossOutput:
    """The sum of `kd` and what is logged: the teacher's mass [G] only where the method moves mass from id to id."""
    lengths_s = teacher.groups_s[:, 1] - teacher.groups_s[:, 0]
    lengths_t = teacher.groups_t[:, 1] - teacher.groups_t[:, 0]
    metrics = {"kd": kd.detach().sum(), "one_to_one": ((lengths_s == 1) & (lengths_t == 1)).sum()}
    if mass_exact is not None and mass_dynamic is not None:
        metrics["mass_exact"] = mass_exact.sum()
        metrics["mass_dynamic"] = mass_dynamic.sum()
        metrics["mass_unmapped"] = (1.0 - mass_exact - mass_dynamic).clamp_min(0.0).sum()
    return LossOutput(kd.sum(), len(teacher.groups_s), metrics | extra)
