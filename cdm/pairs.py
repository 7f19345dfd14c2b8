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

ID_BITS = 32  # of a group's number and a token id in one integer
NO_KEY = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True)
class Pairs:
    """One pair of distributions a group: the student's, read through `pick` and `lse`, and the teacher's top-k [G, K].

    The student's is its row `rows` [G]; or, with `means`, the mean of the log-probabilities of the group's rows, and
    `rows` are all rows [R].
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
        return self.means(self.student.pick(self.rows, self.means.spread(ids)))

    @property
    def lse(self) -> Tensor:
        """The student's normaliser [G], so that z - lse are log-probabilities."""
        lse = self.student.lse[self.rows]
        return lse if self.means is None else self.means(lse)


@dataclass(frozen=True, slots=True)
class Means:
    """Means over the rows of each group. of_row [R]: `group_of_rows`; lengths [G]: rows of each."""

    of_row: Tensor
    lengths: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """What each row's group has; rows in none get some other's. [G, ...] -> [R, ...]."""
        return values[self.of_row.clamp_max(len(self.lengths) - 1)]

    def __call__(self, values: Tensor) -> Tensor:
        """[R, ...] -> [G, ...]."""
        share = self.spread(1.0 / self.lengths).to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        return _add_up(values * share, self.of_row, len(self.lengths))


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
        at = torch.arange(len(student.logits), device=student.logits.device)
        means = Means(group_of_rows(teacher.groups_s, len(at)), teacher.groups_s[:, 1] - teacher.groups_s[:, 0])
        logits = means(student.logits)
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
    return _add_up(values, group_of_rows(groups, len(values)), len(groups))


def group_of_rows(groups: Tensor, rows: int) -> Tensor:
    """The group of each of `rows` rows, G for a row in none: [R]. Groups [G, 2], G > 0, are in order.

    Of all rows, not of the groups' alone: how many these are is known on the device only, and would be waited for.
    """
    row = torch.arange(rows, device=groups.device)
    before = torch.searchsorted(groups[:, 0].contiguous(), row, right=True) - 1
    inside = (before >= 0) & (row < groups[before.clamp_min(0), 1])
    return torch.where(inside, before, len(groups))


def _add_up(values: Tensor, of_row: Tensor, groups: int) -> Tensor:
    """Sums over the rows of each group; a row in none adds to a last one, which is dropped. [R, ...] -> [G, ...]."""
    return values.new_zeros(groups + 1, *values.shape[1:]).index_add(0, of_row, values)[:groups]


def _teacher_means(teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """Log-probabilities averaged over each group's rows, an absent id at its row's smallest: the union's best K.

    What all rows of a group kept is one flat list of [R_t * K]: a long group costs no padding of the others.
    """
    groups, k = len(teacher.groups_t), teacher.topk_ids_t.shape[1]
    logp = teacher.topk_logp_t
    of_row = group_of_rows(teacher.groups_t, len(logp))
    least = torch.where(torch.isneginf(logp), torch.inf, logp).amin(1, keepdim=True)
    kept = (teacher.topk_ids_t >= 0) & (of_row < groups)[:, None]
    extra = torch.where(kept, logp.maximum(least) - least, 0.0).flatten()
    key = torch.where(kept, (of_row[:, None] << ID_BITS) + teacher.topk_ids_t, NO_KEY).flatten()

    key, order = key.sort(stable=True)  # equal ids of a group become neighbours
    leads = key < NO_KEY
    leads[1:] &= key[1:] != key[:-1]
    segment = leads.long().cumsum(0).sub_(1).clamp_min_(0)
    total = torch.zeros_like(extra).index_add(0, segment, extra[order])[segment]
    group = torch.where(leads, key >> ID_BITS, groups)
    lengths = torch.nn.functional.pad(teacher.groups_t[:, 1] - teacher.groups_t[:, 0], (0, 1), value=1)
    base = logp.new_zeros(groups + 1).index_add(0, of_row, least[:, 0])
    means = (base[group] + total) / lengths[group]

    best = means.argsort(descending=True, stable=True)
    best = best[group[best].argsort(stable=True)]  # by group, in it by mean
    group, ids, means = group[best], key[best] & ((1 << ID_BITS) - 1), means[best]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    place = torch.where((rank < k) & (group < groups), group * k + rank, groups * k)
    ids_t = ids.new_full((groups * k + 1,), -1).scatter(0, place, ids)
    logp_t = means.new_full((groups * k + 1,), -torch.inf).scatter(0, place, means)
    return ids_t[:-1].view(groups, k), logp_t[:-1].view(groups, k)


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
