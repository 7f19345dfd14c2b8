"""The nouns that cross a boundary (layer 0).

Legend: B batch, N tokens of one sequence, R response rows of a batch (flat), G groups, K top-k, V vocabulary.
Sides are `_s` (student) and `_t` (teacher). Row r predicts token r. Log-probabilities are natural.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt. `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One instruction pair. `id` is a content hash; texts are NFC; only `response` is ever distilled."""

    id: str
    prompt: tuple[Message, ...]
    response: str
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """The teacher's view of one response, its end-of-turn token included unless `truncated`.

    ids_t [N] int32, ends_t [N] int32 (bytes), logp_t [N] float32 (the token's own), entropy_t [N] float32 (nats),
    tail_t [N] float32 (mass outside what is kept), topk_ids_t [N, K] int32 best first, topk_logp_t [N, K] float16. A
    row of which fewer than K are kept ends in padding: id -1, log-probability -inf.
    """

    id: str
    truncated: bool
    ids_t: np.ndarray
    ends_t: np.ndarray
    logp_t: np.ndarray
    entropy_t: np.ndarray
    tail_t: np.ndarray
    topk_ids_t: np.ndarray
    topk_logp_t: np.ndarray


@dataclass(frozen=True, slots=True)
class Alignment:
    """Groups as cumulative bounds [G+1] int32: group g is tokens bounds[g]:bounds[g+1] of each side."""

    bounds_s: np.ndarray
    bounds_t: np.ndarray


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """One teacher's part of a batch: its response rows, flat over the documents, and the groups that pair them.

    groups_s, groups_t [G, 2] int64: half-open ranges of response rows (of `AlignedBatch.rows_s`, of the rows below).
    ids_t [R_t] int64, logp_t [R_t] float32, topk_ids_t [R_t, K] int64, topk_logp_t [R_t, K] float32, with padding (id
    -1, log-probability -inf) at the end of rows of which fewer than K are kept.
    """

    groups_s: torch.Tensor
    groups_t: torch.Tensor
    ids_t: torch.Tensor
    logp_t: torch.Tensor
    topk_ids_t: torch.Tensor
    topk_logp_t: torch.Tensor


@dataclass(frozen=True, slots=True)
class AlignedBatch:
    """What one student step reads.

    input_ids, attention_mask [B, N] int64; rows_s [R] int64: flat positions b * N + n of the logits that predict
    targets_s [R] int64; documents_s [R] int64: the place in the batch of each row's document; one TeacherRows per
    teacher, in the config's order; cuts [C, 1 + 2 T] int64, on the host: where the rows may be divided (`cdm.pieces`).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows_s: torch.Tensor
    targets_s: torch.Tensor
    documents_s: torch.Tensor
    teachers: tuple[TeacherRows, ...]
    cuts: np.ndarray


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A sum over groups that the caller divides: `total` [] carries the gradient, `metrics` are detached."""

    total: torch.Tensor
    groups: int
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Held-out quality of one model: bits per response byte; agreement in [0, 1], None where not measured.

    mappings: the dynamic mappings that moved most of the first teacher's mass (`cdm.mappings`). sums: what each of the
    documents `ids` adds to nats, bytes, agreed and shared boundaries.
    """

    name: str
    bits_per_byte: float
    agreement: float | None
    documents: int
    response_bytes: int
    shared_boundaries: int
    seconds: float
    samples: tuple[dict[str, str], ...] = ()
    mappings: tuple[dict[str, str | float], ...] = ()
    ids: tuple[str, ...] = ()
    sums: dict[str, tuple[float, ...]] = field(default_factory=dict)
