"""Named recipes: groups + vocabulary map + divergence. One function each, same inputs and outputs; the dict METHODS.

Legend: R response rows of a batch, G groups, K top-k, V vocabulary; row r predicts token r. Every method takes the
student's rows (a tensor of logits [R, V_s], or whoever holds them), one teacher's rows and the vocabulary map between
them, and returns a sum over groups that the caller divides. The rules: docs/method.md, sections 2 to 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cdm import losses
from cdm.baselines import alm, gold, min_edit, multilevel_ot, strict, uld
from cdm.losses import Directions, Tail
from cdm.pairs import Pairs, need_map, nothing, output, pair_rows
from cdm.records import LossOutput, TeacherRows
from cdm.rows import Logits, student_rows
from cdm.vocab_map import VocabMap

Method = Callable[..., LossOutput]


def cdm(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None,
    *,
    temperature: float = 1.0,
    top_k: int = 100,
    tail: Tail = "renormalise",
    dual: bool = True,
    rows: Literal["first", "mean"] = "first",
    observed: bool = False,
    targets_s: Tensor | None = None,
) -> LossOutput:
    """Contextual dynamic mapping. Source: arXiv 2502.11104; docs/method.md, sections 2 to 4.

    top_k: live candidates on either side. rows: which rows stand for a group, its first or the mean of all.
    observed: the two tokens that the text itself has at the start of a group map to one another there, whatever the
    map says; targets_s [R], the student's own tokens, is needed for that alone.
    Raises ValueError where nothing in the whole batch maps, naming the tokenizers; not on an accelerator, which would
    be waited for: there the caller looks at the mass in the metrics once a step.
    """
    student = student_rows(logits_s)
    vocab_map = need_map("cdm", student, vocab_map)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    pairs = pair_rows(student, teacher, top_k, rows)
    map_t_to_s, map_s_to_t = vocab_map.both(pairs.ids_t, pairs.top_s)
    if observed:
        if targets_s is None:
            raise ValueError("cdm with observed=True needs targets_s")
        own_s, own_t = targets_s[teacher.groups_s[:, :1]], teacher.ids_t[teacher.groups_t[:, :1]]
        live_t = torch.where((pairs.ids_t == own_t).any(1, keepdim=True), own_t, -1)
        map_t_to_s = torch.where(pairs.ids_t == own_t, own_s, map_t_to_s)
        map_s_to_t = torch.where(pairs.top_s == own_s, live_t, map_s_to_t)
    k = map_t_to_s.shape[1]
    z = pairs.pick(torch.cat([map_t_to_s.clamp_min(0), pairs.top_s], 1))
    both = losses.cdm_directions(
        z[:, :k],
        z[:, k:],
        pairs.lse if tail == "residual" else None,
        pairs.logp_t,
        pairs.ids_t,
        map_t_to_s,
        map_s_to_t,
        temperature=temperature,
        tail=tail,
        dual=dual,
    )
    if both.kd.device.type == "cpu" and not bool((both.mapped1 | (both.mapped2 & dual)).any()):
        raise ValueError(
            f"nothing maps in a batch of {len(pairs.ids_t)} groups between teacher {vocab_map.name_t!r} and student "
            f"{vocab_map.name_s!r}: check that the shards and the student belong to these tokenizers"
        )
    return _cdm_output(both, pairs, teacher, vocab_map, map_t_to_s)


def kl(
    logits_s: Logits, teacher: TeacherRows, vocab_map: VocabMap | None = None, *, temperature: float = 1.0
) -> LossOutput:
    """KL(teacher || student) over the teacher's top-k and one residual outcome; same tokenizer. Source: Hinton 2015."""
    return _same_tokenizer(losses.forward_kl, logits_s, teacher, temperature)


def reverse_kl(
    logits_s: Logits, teacher: TeacherRows, vocab_map: VocabMap | None = None, *, temperature: float = 1.0
) -> LossOutput:
    """KL(student || teacher) over the teacher's top-k and one residual outcome. Source: GKD 2306.13649."""
    return _same_tokenizer(losses.reverse_kl, logits_s, teacher, temperature)


def js(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> LossOutput:
    """Generalised Jensen-Shannon over the teacher's top-k and one residual outcome. Source: GKD 2306.13649."""
    return _same_tokenizer(losses.js, logits_s, teacher, temperature, beta=beta)


def skew_kl(
    logits_s: Logits,
    teacher: TeacherRows,
    vocab_map: VocabMap | None = None,
    *,
    temperature: float = 1.0,
    skew: float = 0.1,
) -> LossOutput:
    """KL(teacher || skew teacher + (1 - skew) student) over top-k and residual. Source: DistiLLM 2402.03898."""
    return _same_tokenizer(losses.skew_kl, logits_s, teacher, temperature, skew=skew)


def _same_tokenizer(
    divergence: Callable[..., Tensor], logits_s: Logits, teacher: TeacherRows, temperature: float, **options: Any
) -> LossOutput:
    """A divergence over top-k + residual; every group is one token on both sides, and ids mean the same."""
    student = student_rows(logits_s)
    if len(teacher.groups_s) == 0:
        return nothing(student)
    pairs = pair_rows(student, teacher, 0, "first")
    size = student.logits.shape[1]
    known = (pairs.ids_t >= 0) & (pairs.ids_t < size)
    z = pairs.pick(pairs.ids_t.clamp(0, size - 1))
    log_p, log_q = losses.topk_outcomes(z, pairs.lse, pairs.logp_t, known, temperature)
    kd = temperature**2 * divergence(log_p, log_q, **options)
    mass = torch.where(known, pairs.logp_t, -torch.inf).exp().sum(1)
    return output(kd, teacher, mass, torch.zeros_like(mass))


def _cdm_output(
    both: Directions, pairs: Pairs, teacher: TeacherRows, vocab_map: VocabMap, map_t_to_s: Tensor
) -> LossOutput:
    mass = pairs.logp_t.exp()
    mapped, exact = map_t_to_s >= 0, vocab_map.images(pairs.ids_t) >= 0
    by_exact = torch.where(mapped & exact, mass, 0.0).sum(1)
    by_dynamic = torch.where(mapped & ~exact, mass, 0.0).sum(1)
    return output(both.kd, teacher, by_exact, by_dynamic, d1=both.d1.detach().sum(), d2=both.d2.detach().sum())


# `sft` is cross-entropy alone: no function. Methods that need hidden states or live sampling would come here too.
METHODS: dict[str, Method] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "uld": uld,
    "min_edit": min_edit,
    "multilevel_ot": multilevel_ot,
    "alm": alm,
    "gold": gold,
    "strict": strict,
    "cdm": cdm,
    "cdm_paper": cdm,  # the paper's choices are defaults of its config section
}
SAME_TOKENIZER = ("kl", "reverse_kl", "js", "skew_kl")
# What a method needs of the batch besides its rows: targets_s [R] token ids, documents_s [R] document numbers.
CONTEXT: dict[str, str] = {
    "alm": "targets_s",
    "cdm": "targets_s",
    "cdm_paper": "targets_s",
    "min_edit": "targets_s",
    "multilevel_ot": "documents_s",
    "uld": "documents_s",
}
