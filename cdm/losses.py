"""Divergences between aligned distributions: one value per group, which the caller sums and divides.

Legend: G groups, V vocabulary, K the teacher's top-k, K' the student's; `z` logits, `p` teacher, `q` student; -1 is
unmapped. The teacher never gets a gradient. The rules: docs/method.md, section 4.

Temperature and the residual: at tau the outcomes are tempered after the mass outside has become one outcome, on both
sides alike, so equal distributions have divergence 0 at every temperature whatever K is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Tail = Literal["renormalise", "residual"]
SMALLEST_REST = 1e-6  # what float32 sums of probabilities can tell from nothing
LSE_CELLS = 1 << 24


@dataclass(frozen=True, slots=True)
class Directions:
    """KD [G], and its two directions without the factor tau^2: d1, d2 [G], 0 where not mapped1, mapped2 [G]."""

    kd: Tensor
    d1: Tensor
    d2: Tensor
    mapped1: Tensor
    mapped2: Tensor


def cdm_divergence(
    logits_s: Tensor,
    logp_t: Tensor,
    ids_t: Tensor,
    map_t_to_s: Tensor,
    ids_s: Tensor,
    map_s_to_t: Tensor,
    temperature: float,
    tail: Tail,
    *,
    dual: bool = True,
) -> Tensor:
    """Contextual dynamic mapping, tau^2 * mean(D1, D2) per group: [G]. Source: arXiv 2502.11104; docs/method.md, 4.

    logits_s [G, V]; logp_t, ids_t, map_t_to_s [G, K]: the teacher's top ids and their student ids;
    ids_s, map_s_to_t [G, K']: the student's live top ids and their teacher ids. A group in which nothing maps is 0.
    NaN stays in its group; a student logit of -inf under teacher mass is an infinite divergence.

    Raises ValueError on shapes that do not fit, mapped ids beyond V, a bad temperature or tail.
    """
    _check(logits_s, logp_t, ids_t, map_t_to_s, ids_s, map_s_to_t)
    z_mapped = logits_s.gather(1, map_t_to_s.clamp_min(0))
    z_live = logits_s.gather(1, ids_s)
    lse = row_logsumexp(logits_s) if tail == "residual" else None
    return cdm_directions(
        z_mapped, z_live, lse, logp_t, ids_t, map_t_to_s, map_s_to_t, temperature=temperature, tail=tail, dual=dual
    ).kd


def cdm_directions(
    z_mapped: Tensor,
    z_live: Tensor,
    lse_s: Tensor | None,
    logp_t: Tensor,
    ids_t: Tensor,
    map_t_to_s: Tensor,
    map_s_to_t: Tensor,
    *,
    temperature: float,
    tail: Tail,
    dual: bool = True,
) -> Directions:
    """`cdm_divergence` from gathered logits: z_mapped [G, K] at `map_t_to_s`, z_live [G, K'] at the student's top ids.

    lse_s [G] is the student's logsumexp at temperature 1, needed for `tail="residual"` only.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if tail not in ("renormalise", "residual"):
        raise ValueError(f"tail {tail!r}: choose 'renormalise' or 'residual'")
    if tail == "residual" and lse_s is None:
        raise ValueError("tail 'residual' needs the student's logsumexp")
    dtype = torch.promote_types(torch.promote_types(z_live.dtype, logp_t.dtype), torch.float32)
    lse = lse_s.to(dtype) if lse_s is not None and tail == "residual" else None
    logp, z1, z2 = logp_t.detach().to(dtype), z_mapped.to(dtype), z_live.to(dtype)
    d1, mapped1 = _teacher_to_student(z1, lse, logp, map_t_to_s, temperature)
    d2, mapped2 = _student_to_teacher(z2, lse, logp, ids_t, map_s_to_t, temperature)
    if dual:
        kd = (d1 + d2) / (mapped1.to(dtype) + mapped2.to(dtype)).clamp_min(1.0)
    else:
        kd = d1
    return Directions(temperature**2 * kd, d1, d2, mapped1, mapped2)


def topk_kl(logits_s: Tensor, logp_t: Tensor, ids_t: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(teacher || student) over the teacher's top-k ids and one residual outcome: [G].

    logits_s [G, V]; logp_t, ids_t [G, K], of one tokenizer. Ids that the student lacks count as residual.
    Source: Hinton et al. 2015.
    """
    return topk_divergence(forward_kl, logits_s, logp_t, ids_t, temperature)


def topk_divergence(
    divergence: Callable[..., Tensor],
    logits_s: Tensor,
    logp_t: Tensor,
    ids_t: Tensor,
    temperature: float,
    **options: Any,
) -> Tensor:
    """tau^2 * `divergence(log_p, log_q)` over the teacher's top-k ids and one residual outcome: [G]."""
    z = logits_s.gather(1, ids_t.clamp(0, logits_s.shape[1] - 1))
    known = (ids_t >= 0) & (ids_t < logits_s.shape[1])
    log_p, log_q = topk_outcomes(z, row_logsumexp(logits_s), logp_t, known, temperature)
    return temperature**2 * divergence(log_p, log_q, **options)


def topk_outcomes(z: Tensor, lse_s: Tensor, logp_t: Tensor, known: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both sides' tempered log-probabilities over K ids and the residual: [G, K + 1] each, -inf where not `known`.

    z [G, K]: student logits at the ids; lse_s [G] at temperature 1; logp_t, known [G, K].
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    dtype = torch.promote_types(torch.promote_types(z.dtype, logp_t.dtype), torch.float32)
    log_q = torch.where(known, z.to(dtype) - lse_s.to(dtype)[:, None], -torch.inf)
    log_p = torch.where(known, logp_t.detach().to(dtype), -torch.inf)
    outcomes = (torch.cat([side, _log_rest(side, known)[:, None]], 1) for side in (log_p, log_q))
    log_p, log_q = (torch.log_softmax(side / temperature, -1) for side in outcomes)
    return log_p.detach(), log_q


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [G, M] -> [G]. An outcome without mass under p counts nothing."""
    return _terms(log_p, log_q).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p), the mode-seeking direction. [G, M] -> [G]. Source: MiniLLM 2306.08543, GKD 2306.13649."""
    return _terms(log_q, log_p).sum(-1)


def js(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. [G, M] -> [G]. Source: GKD 2306.13649."""
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta {beta} must be between 0 and 1; use kl or reverse_kl at the ends")
    log_m = _log_mix(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q). [G, M] -> [G]. Source: DistiLLM 2402.03898."""
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew {skew} must be in [0, 1)")
    return forward_kl(log_p, log_q if skew == 0 else _log_mix(log_p, log_q, skew))


class _RowLogsumexp(torch.autograd.Function):
    """logsumexp in blocks of rows: at least float32 inside, the logits' own type outside, no second [R, V] tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        step = max(1, LSE_CELLS // max(1, logits.shape[1]))
        ctx.dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.cat([torch.logsumexp(block.to(ctx.dtype), -1) for block in logits.split(step)])
        ctx.save_for_backward(logits, lse)
        ctx.step = step
        return lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        logits, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for block, total, grad, into in zip(
            logits.split(ctx.step), lse.split(ctx.step), grads[0].split(ctx.step), out.split(ctx.step), strict=True
        ):
            into.copy_((block.to(ctx.dtype) - total[:, None]).exp_() * grad[:, None])
        return out


def row_logsumexp(logits: Tensor) -> Tensor:
    """logsumexp of each row, at least float32: [R, V] -> [R]. Keeps no float32 copy of half-precision logits."""
    if logits.shape[0] == 0:
        return logits.sum(-1)
    return _RowLogsumexp.apply(logits)


def _teacher_to_student(
    z: Tensor, lse: Tensor | None, logp: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """D1 [G] and whether it is defined [G]: the teacher's mass moved to student ids, against the student there."""
    target, order = target.sort(1)  # the ids that several teacher ids land on become neighbours
    z, logp = z.gather(1, order), logp.gather(1, order)
    mapped = target >= 0
    leads = mapped.clone()
    leads[:, 1:] &= target[:, 1:] != target[:, :-1]
    segment = leads.long().cumsum(1).sub_(1).clamp_min_(0)
    moved = _segment_logsumexp(logp / temperature, segment, mapped).gather(1, segment)
    log_p = moved.masked_fill(~leads, -torch.inf)
    log_q = (z / temperature).masked_fill(~leads, -torch.inf)
    if lse is not None:
        rest_p = _log_rest(logp, mapped) / temperature
        rest_q = _log_rest(z - lse[:, None], leads) / temperature
        log_p = torch.cat([log_p, rest_p[:, None]], 1)
        log_q = torch.cat([log_q - lse[:, None] / temperature, rest_q[:, None]], 1)
    return _normalised_kl(log_p, log_q, leads.any(1))


def _student_to_teacher(
    z: Tensor, lse: Tensor | None, logp: Tensor, ids_t: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """D2 [G] and whether it is defined [G]: the teacher at its mapped ids, against the student's mass moved there."""
    ids, order = ids_t.sort(1)
    at = torch.searchsorted(ids, target.contiguous()).clamp_max_(ids.shape[1] - 1)
    mapped = (ids.gather(1, at) == target) & (target >= 0)
    place = order.gather(1, at)
    hit = torch.zeros_like(ids_t).scatter_add_(1, place, mapped.long()) > 0
    moved = _segment_logsumexp(z / temperature, place, mapped, width=ids_t.shape[1])
    log_p = (logp / temperature).masked_fill(~hit, -torch.inf)
    log_q = moved.masked_fill(~hit, -torch.inf)
    if lse is not None:
        rest_p = _log_rest(logp, hit) / temperature
        rest_q = _log_rest(z - lse[:, None], mapped) / temperature
        log_p = torch.cat([log_p, rest_p[:, None]], 1)
        log_q = torch.cat([log_q - lse[:, None] / temperature, rest_q[:, None]], 1)
    return _normalised_kl(log_p, log_q, hit.any(1))


def _segment_logsumexp(values: Tensor, segment: Tensor, mask: Tensor, width: int | None = None) -> Tensor:
    """log of the sum of exp(values) by segment within each row: [G, K] -> [G, width]; -inf where a segment is empty."""
    shape = (values.shape[0], width or values.shape[1])
    masked = values.masked_fill(~mask, -torch.inf)
    top = torch.full(shape, -torch.inf, device=values.device, dtype=values.dtype).scatter_reduce(
        1, segment, masked.detach(), "amax"
    )
    top = torch.where(torch.isinf(top), 0.0, top)
    parts = torch.where(mask, (masked - top.gather(1, segment)), -torch.inf).exp()
    total = torch.zeros_like(top).scatter_add(1, segment, parts)
    return torch.where(total == 0, -torch.inf, torch.where(total == 0, 1.0, total).log() + top)


def _log_rest(logp: Tensor, mask: Tensor) -> Tensor:
    """log of the mass that the masked outcomes leave, at least SMALLEST_REST: [G, K] -> [G]."""
    mass = torch.where(mask, logp, -torch.inf).exp().sum(-1)
    return (1.0 - mass).clamp_min(SMALLEST_REST).log()


def _normalised_kl(log_p: Tensor, log_q: Tensor, mapped: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the two sides, each normalised over its finite outcomes; 0 and False where nothing maps or p is empty."""
    defined = mapped & ~torch.isneginf(log_p).all(1)
    keep = defined[:, None]
    log_p = torch.log_softmax(torch.where(keep, log_p, 0.0), -1)
    log_q = torch.log_softmax(torch.where(keep, log_q, 0.0), -1)
    return torch.where(defined, _terms(log_p, log_q).sum(-1), 0.0), defined


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0; both branches stay finite so that no gradient becomes NaN."""
    empty = torch.isneginf(log_p)
    safe_p = torch.where(empty, 0.0, log_p)
    safe_q = torch.where(empty, 0.0, log_q)
    return torch.where(empty, 0.0, safe_p.exp() * (safe_p - safe_q))


def _log_mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    weights = math.log(share), math.log1p(-share)
    both = torch.isneginf(log_p) & torch.isneginf(log_q)
    mixed = torch.logaddexp(torch.where(both, 0.0, log_p) + weights[0], torch.where(both, 0.0, log_q) + weights[1])
    return torch.where(both, -torch.inf, mixed)


def _check(
    logits_s: Tensor, logp_t: Tensor, ids_t: Tensor, map_t_to_s: Tensor, ids_s: Tensor, map_s_to_t: Tensor
) -> None:
    if logits_s.ndim != 2:
        raise ValueError(f"logits_s must be [G, V], got {tuple(logits_s.shape)}")
    if not logp_t.shape == ids_t.shape == map_t_to_s.shape or ids_s.shape != map_s_to_t.shape:
        shapes = [tuple(x.shape) for x in (logp_t, ids_t, map_t_to_s, ids_s, map_s_to_t)]
        raise ValueError(f"logp_t, ids_t, map_t_to_s must be [G, K] and ids_s, map_s_to_t [G, K'], got {shapes}")
    if not len(logits_s) == len(logp_t) == len(ids_s):
        raise ValueError(f"groups differ: logits_s {len(logits_s)}, teacher {len(logp_t)}, ids_s {len(ids_s)}")
