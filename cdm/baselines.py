"""The methods that others published for two tokenizers, under the inputs and outputs of docs/method.md, section 5.

Legend: R response rows, G groups, M pairs of rows, K top-k, V vocabulary; `p` teacher, `q` student. The teacher is
known by its top-k alone; what a paper sums over a whole vocabulary is summed here over the top-k and one residual.
Every divergence is 0 between equal distributions: constants of the teacher (its entropies) are taken off.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cdm import losses
from cdm.pairs import group_sums, need_map, nothing, output, pair_rows
from cdm.records import LossOutput, TeacherRows
from cdm.rows import Logits, StudentRows, best_ids, student_rows, token_logp
from cdm.vocab_map import VocabMap


def uld(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None = None,
    *,
    documents_s: Tensor,
    temperature: float = 1.0,
) -> LossOutput:
    """Sum over ranks of |sorted p - sorted q|, rows paired by position in their response. Source: ULD, 2402.12030.

    documents_s [R]: which document each student row belongs to. Rows beyond the shorter response are left out.
    """
    student = student_rows(logits_s)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    rows_t, paired = _by_position(teacher, documents_s)
    log_p, log_q = _sorted_outcomes(student, teacher, rows_t, temperature)
    return output(torch.where(paired, (log_p.exp() - log_q.exp()).abs().sum(1), 0.0), teacher)


def multilevel_ot(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None = None,
    *,
    documents_s: Tensor,
    temperature: float = 2.0,
    log_weight: float = 0.1,
    sequence_weight: float = 0.1,
    blur: float = 0.1,
    iterations: int = 20,
) -> LossOutput:
    """Token-level sorted transport, its logarithmic form, and Sinkhorn between the rows of a response. 2412.14528.

    Token level: sum over ranks of |p - q| + log_weight * KL(p || q), rows paired by position. Sequence level: entropic
    transport (regularisation `blur`, uniform margins) between all rows of the two responses at the same cost, debiased
    so that equal responses cost 0. documents_s [R]: which document each student row belongs to.
    """
    student = student_rows(logits_s)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    rows_t, paired = _by_position(teacher, documents_s)
    log_p, log_q = (side[paired] for side in _sorted_outcomes(student, teacher, rows_t, temperature))
    kd = (log_p.exp() - log_q.exp()).abs().sum(1) + log_weight * losses.forward_kl(log_p, log_q)
    lengths = documents_s[paired].unique_consecutive(return_counts=True)[1].tolist()
    blocks = zip(log_p.exp().split(lengths), log_q.exp().split(lengths), strict=True)
    sequences = torch.stack([_sinkhorn_divergence(p, q, blur, iterations) * len(p) for p, q in blocks])
    return output(torch.cat([kd, sequence_weight * sequences]), teacher)


def min_edit(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None,
    *,
    targets_s: Tensor,
    temperature: float = 1.0,
) -> LossOutput:
    """KL to the teacher moved by a static nearest-token map in 1:1 groups, one-hot elsewhere. FuseLLM, 2401.10491.

    targets_s [R]: the student's own tokens, the one-hot targets. Give it groups of `dtw` without weights to follow the
    paper. The map is static: the exact image, else the nearest spelling of the whole vocabulary below the threshold.
    """
    student = student_rows(logits_s)
    vocab_map = need_map("min_edit", student, vocab_map)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    pairs = pair_rows(student, teacher, 0, "first")
    static = _static_map(vocab_map, pairs.ids_t.device)
    known = (pairs.ids_t >= 0) & (pairs.ids_t < len(static))
    target = torch.where(known, static[pairs.ids_t.clamp(0, len(static) - 1)], -1)
    z = pairs.pick(target.clamp_min(0))
    none = target.new_full((len(target), 1), -1)
    moved = losses.cdm_directions(
        z,
        z[:, :1],
        pairs.lse,
        pairs.logp_t,
        pairs.ids_t,
        target,
        none,
        temperature=temperature,
        tail="residual",
        dual=False,
    )
    single = _one_to_one(teacher)
    nats = -token_logp(student, targets_s)
    return output(torch.where(single, moved.kd, group_sums(nats, teacher.groups_s)), teacher)


def alm(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None = None,
    *,
    targets_s: Tensor,
    scale: float = 100.0,
) -> LossOutput:
    """Binary cross-entropy between the two models' probabilities of each group's text, (prod p)^(1/scale). 2503.20083.

    targets_s [R]: the student's own tokens. Less the teacher's entropy, so a binary KL with the same gradient.
    """
    if not scale > 0:
        raise ValueError(f"scale {scale} must be above 0")
    student = student_rows(logits_s)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    logp_s = token_logp(student, targets_s)
    sides = []
    for logp, groups in ((teacher.logp_t.detach(), teacher.groups_t), (logp_s, teacher.groups_s)):
        text = (group_sums(logp, groups) / scale).clamp_max(-1e-7)
        sides.append(torch.stack([text, (-torch.expm1(text)).log()], 1))
    return output(losses.forward_kl(sides[0], sides[1]), teacher)


def gold(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> LossOutput:
    """JSD on the shared vocabulary, sorted L1 on the rest, weighted by how much is shared.

    Source: the hybrid ULD loss of GOLD in Hugging Face TRL. The weight is the share of the teacher's vocabulary with an
    exact image; what is sorted are the unshared ids among each side's best, as many as the teacher kept in that row.
    """
    student = student_rows(logits_s)
    vocab_map = need_map("gold", student, vocab_map)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    pairs = pair_rows(student, teacher, teacher.topk_ids_t.shape[1], "first")
    image = vocab_map.images(pairs.ids_t)
    shared = image >= 0
    log_p, log_q = losses.topk_outcomes(pairs.pick(image.clamp_min(0)), pairs.lse, pairs.logp_t, shared, temperature)
    on_shared = temperature**2 * losses.js(log_p, log_q, beta)
    alone_t = torch.where(shared, -torch.inf, pairs.logp_t).exp()
    live = pairs.pick(pairs.top_s) - pairs.lse[:, None]
    ranks = torch.arange(live.shape[1], device=live.device)
    compared = (vocab_map.reverse.images(pairs.top_s) < 0) & (ranks < (pairs.ids_t >= 0).sum(1, keepdim=True))
    alone_s = torch.where(compared, live, -torch.inf).exp()
    on_rest = _sorted_l1(alone_t, alone_s)
    weight = float((vocab_map.exact >= 0).mean())
    mass = torch.where(shared, pairs.logp_t, -torch.inf).exp().sum(1)
    return output(weight * on_shared + (1.0 - weight) * on_rest, teacher, mass, torch.zeros_like(mass))


def strict(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None,
    *,
    temperature: float = 1.0,
    top_k: int = 16,
    reverse: bool = True,
) -> LossOutput:
    """Only 1:1 groups and the shared vocabulary: the student's best `top_k` shared ids, renormalised (reverse) KL.

    Source: 2610.08448, the baseline to beat. An id that the teacher did not keep has no known mass and drops out.
    """
    student = student_rows(logits_s)
    vocab_map = need_map("strict", student, vocab_map)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    pairs = pair_rows(student, teacher, 0, "first")
    chosen = _best_shared(student.logits[pairs.rows], vocab_map, top_k)
    ids_t = vocab_map.reverse.images(chosen)
    same = (ids_t[:, :, None] == pairs.ids_t[:, None, :]) & (ids_t >= 0)[:, :, None]
    kept = same.any(2)
    logp = torch.where(same, pairs.logp_t[:, None, :], -torch.inf).amax(2)
    use = kept.any(1) & _one_to_one(teacher)
    keep = kept & use[:, None]
    empty = ~use[:, None]
    log_p = torch.log_softmax(torch.where(empty, 0.0, (logp / temperature).masked_fill(~keep, -torch.inf)), -1)
    z = pairs.pick(chosen)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
    log_q = torch.log_softmax(torch.where(empty, 0.0, z.masked_fill(~keep, -torch.inf)), -1)
    divergence = losses.reverse_kl if reverse else losses.forward_kl
    kd = torch.where(use, temperature**2 * divergence(log_p, log_q), 0.0)
    mass = torch.where(keep, logp, -torch.inf).exp().sum(1)
    return output(kd, teacher, mass, torch.zeros_like(mass))


def _one_to_one(teacher: TeacherRows) -> Tensor:
    lengths = [groups[:, 1] - groups[:, 0] for groups in (teacher.groups_s, teacher.groups_t)]
    return (lengths[0] == 1) & (lengths[1] == 1)


def _by_position(teacher: TeacherRows, documents_s: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's row at the same place of the same response as each student row, and whether there is one: [R]."""
    row = torch.arange(len(documents_s), device=documents_s.device)
    of_group = documents_s[teacher.groups_s[:, 0]]
    first = torch.searchsorted(of_group, documents_s)
    last = torch.searchsorted(of_group, documents_s, right=True) - 1
    there = first <= last
    first = first.clamp_max(len(of_group) - 1)  # of a document without groups, which comes last
    place = row - teacher.groups_s[first, 0]
    rows_t = teacher.groups_t[first, 0] + place
    there &= (row < teacher.groups_s[last, 1]) & (rows_t < teacher.groups_t[last, 1])
    return torch.where(there, rows_t, 0), there


def _sorted_outcomes(
    student: StudentRows, teacher: TeacherRows, rows_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities by rank, as many as the teacher kept, and the residual: [R, k + 1] of each side."""
    rows_s = torch.arange(len(rows_t), device=rows_t.device)
    k = min(teacher.topk_logp_t.shape[1], student.logits.shape[1])
    best = best_ids(student.logits, rows_s, k)
    logp_t = teacher.topk_logp_t[rows_t, :k]
    return losses.topk_outcomes(student.pick(rows_s, best), student.lse, logp_t, ~torch.isneginf(logp_t), temperature)


def _sinkhorn_divergence(p: Tensor, q: Tensor, blur: float, iterations: int) -> Tensor:
    """Entropic transport between rows p [N, K] and q [N', K] at the L1 cost, less what each side costs with itself."""
    return _transport(p, q, blur, iterations) - 0.5 * (
        _transport(p, p, blur, iterations) + _transport(q, q, blur, iterations)
    )


def _transport(p: Tensor, q: Tensor, blur: float, iterations: int) -> Tensor:
    """<plan, cost> with uniform margins; the plan is a constant of the gradient."""
    cost = torch.cdist(p, q, p=1.0)
    with torch.no_grad():
        log_kernel = -cost / blur
        f, g = cost.new_zeros(len(p)), cost.new_zeros(len(q))
        for _ in range(iterations):
            f = -torch.logsumexp(log_kernel + g[None, :], 1) - float(np.log(len(p)))
            g = -torch.logsumexp(log_kernel + f[:, None], 0) - float(np.log(len(q)))
        plan = (log_kernel + f[:, None] + g[None, :]).exp()
    return (plan * cost).sum()


def _sorted_l1(a: Tensor, b: Tensor) -> Tensor:
    """Sum over ranks of the difference of sorted values, the shorter side filled with zeros: [G]."""
    k = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, k - x.shape[1])).sort(1, descending=True).values for x in (a, b))
    return (a - b).abs().sum(1)


def _best_shared(logits: Tensor, vocab_map: VocabMap, top_k: int) -> Tensor:
    """The student's best ids among those with an exact image, [G, top_k]."""
    shared = vocab_map.reverse.images(torch.arange(logits.shape[1], device=logits.device)) >= 0
    rows = torch.arange(len(logits), device=logits.device)
    return best_ids(logits.masked_fill(~shared, -torch.inf), rows, top_k)


@lru_cache(maxsize=16)
def _static_map(vocab_map: VocabMap, device: torch.device) -> Tensor:
    """The exact image of each teacher id, else its nearest spelling (the lowest id on ties), else -1: [V_t]."""
    graph = vocab_map.graph
    rows = np.repeat(np.arange(len(graph.starts) - 1), np.diff(graph.starts))
    order = np.lexsort((graph.ids, graph.distances, rows))
    first = np.unique(rows[order], return_index=True)[1]
    static = np.full(len(vocab_map.exact), -1, dtype=np.int64)
    static[rows[order][first]] = graph.ids[order][first]
    static = np.where(vocab_map.exact >= 0, vocab_map.exact, static)
    return torch.from_numpy(static).to(device)
