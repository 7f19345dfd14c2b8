"""What stands for the groups: pairs of distributions, and the sums that every method returns.

Legend: R response rows of a batch, G groups, L rows of one group, K top-k, V vocabulary. docs/method.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cdm import losses
from cdm.records import LossOutput, TeacherRows
from cdm.vocab_map import VocabMap


@dataclass(frozen=True, slots=True)
class Pairs:
    """One pair of distributions a group: the student's logits[rows], read through `pick`; the teacher's top-k [G, K].

    lse [G] is the student's normaliser, so that z - lse are log-probabilities.
    """

    logits: Tensor
    rows: Tensor
    top_s: Tensor
    lse: Tensor
    ids_t: Tensor
    logp_t: Tensor

    def pick(self, ids: Tensor) -> Tensor:
        """Student logits at `ids` [G, M], without a copy of the rows."""
        flat = self.rows[:, None] * self.logits.shape[1] + ids
        return self.logits.reshape(-1).index_select(0, flat.reshape(-1)).view(ids.shape)


def need_map(method: str, logits_s: Tensor, vocab_map: VocabMap | None) -> VocabMap:
    if vocab_map is None:
        raise ValueError(f"method {method!r} needs a vocabulary map; for one shared tokenizer use 'kl'")
    if len(vocab_map.inverse) > logits_s.shape[1]:
        raise ValueError(
            f"the student has {logits_s.shape[1]} logits but its tokenizer {vocab_map.name_s!r} "
            f"{len(vocab_map.inverse)} ids: resize the embedding or give the model's own tokenizer"
        )
    return vocab_map


def nothing(logits_s: Tensor) -> LossOutput:
    """The output of a batch without groups: zero, and still part of the graph."""
    return LossOutput(logits_s[:0].sum(), 0, {})


def pair_rows(
    logits_s: Tensor, teacher: TeacherRows, top_k: int, rows: Literal["first", "mean"], *, with_lse: bool
) -> Pairs:
    """The distributions that stand for the groups. top_k 0: no live candidates, and all of the teacher's."""
    if rows not in ("first", "mean"):
        raise ValueError(f"rows {rows!r}: choose 'first' or 'mean'")
    k_t = min(top_k or teacher.topk_ids_t.shape[1], teacher.topk_ids_t.shape[1])
    if rows == "mean":
        logits, lse = _student_means(logits_s, teacher.groups_s)
        at = torch.arange(len(logits), device=logits.device)
        ids_t, logp_t = _teacher_means(teacher)
    else:
        logits, at = logits_s, teacher.groups_s[:, 0]
        lse = losses.row_logsumexp(logits)[at] if with_lse else logits.new_zeros(len(at))
        first_t = teacher.groups_t[:, 0]
        ids_t, logp_t = teacher.topk_ids_t[first_t], teacher.topk_logp_t[first_t]
    top_s = logits.detach().topk(min(top_k, logits.shape[1])).indices[at]
    return Pairs(logits, at, top_s, lse, ids_t[:, :k_t], logp_t[:, :k_t].detach())


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


def _student_means(logits_s: Tensor, groups_s: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities averaged over each group's rows, as logits [G, V] and the normaliser [G] to take off."""
    rows, of_row = _rows(groups_s)
    share = (1.0 / (groups_s[:, 1] - groups_s[:, 0]))[of_row].to(logits_s.dtype)
    out = logits_s.new_zeros(len(groups_s), logits_s.shape[1])
    means = out.index_add(0, of_row, logits_s[rows] * share[:, None])
    lse = losses.row_logsumexp(logits_s)[rows] * share
    return means, lse.new_zeros(len(groups_s)).index_add(0, of_row, lse)


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
