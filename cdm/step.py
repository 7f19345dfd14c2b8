"""One step of the student: hidden states -> loss -> gradients -> update, on one process or many.

Legend: B batch, N tokens, R response rows, G groups, V vocabulary. Loss and gradients do not depend on micro-batches,
pieces, padding or the number of workers: every sum is divided by its count over the global batch. Nothing here reads a
file or a configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cdm.head import PIECE_CELLS, Read, Sums, read_rows
from cdm.pieces import Piece, divide
from cdm.records import AlignedBatch, LossOutput, TeacherRows
from cdm.rows import Logits, StudentRows, student_rows, token_logp

Term = Callable[[StudentRows, TeacherRows, Piece], LossOutput]


@dataclass(frozen=True)
class Objective:
    """L = alpha * CE + (1 - alpha) * sum_k w_k * KD_k (docs/method.md, section 4); a term and a weight a teacher."""

    alpha: float
    terms: tuple[Term, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Counts:
    """What the sums of one step are divided by, over the global batch."""

    tokens: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a step. sums: this worker's; norm: of the whole gradient, before clipping, the same on all workers.

    skipped: some loss or gradient of some worker was not finite, so no worker updated anything. finite [M] bool, on the
    host: which of this worker's micro-batches had a finite loss; None where nothing was skipped.
    """

    sums: Sums
    norm: torch.Tensor
    skipped: bool
    finite: list[bool] | None = None


class StudentModel(torch.nn.Module):
    """A causal LM whose head sees only the rows asked for, a piece at a time: never [B, N, V], nor [R, V].

    Raises ValueError where the model's head is no linear layer.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)  # Gemma-2 and its kin
        head = model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(f"{model.config.model_type}: its head is a {type(head).__name__}, not one linear layer")
        self.piece_rows = max(1, PIECE_CELLS // head.out_features)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, bounds: list[int], read: Read
    ) -> tuple[torch.Tensor, Sums]:
        """`cdm.head.read_rows` over the logits at `rows` [R], flat positions of [B, N]; the head's hooks run here."""
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, rows)
        return read_rows(hidden, self.model.get_output_embeddings(), self.softcap, bounds, read)

    def read(
        self, batch: AlignedBatch, read: Callable[[StudentRows, Piece], tuple[torch.Tensor, Sums]]
    ) -> tuple[torch.Tensor, Sums]:
        """The sum of `read` over the pieces of a batch's response rows; 0 and in the graph where it has none."""
        pieces = divide(batch, self.piece_rows)
        bounds = [0, *(piece.end for piece in pieces)]
        return self(batch.input_ids, batch.attention_mask, batch.rows_s, bounds, lambda rows, i: read(rows, pieces[i]))

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ValueError where the model does more after its last hidden state than this forward does (scaling)."""
        ids = torch.arange(4, device=self.model.device)[None]
        rows, ones = torch.arange(4, device=ids.device), torch.ones_like(ids)
        _, ours = self(ids, ones, rows, [0, 4], lambda rows, _: (rows.logits.new_zeros(()), {"logits": rows.logits}))
        if not torch.allclose(ours["logits"], self.model(ids).logits[0], rtol=1e-3, atol=1e-4):
            raise ValueError(f"{self.model.config.model_type}: the logits are no plain head over the last hidden state")


def shard(model: StudentModel, precision: torch.dtype, device: torch.device, *, compiled: bool = False) -> StudentModel:
    """`fully_shard` every block and the root over all processes; fp32 weights, reduction in fp32.

    compiled: `torch.compile` of each block, for any length of the sequences.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    blocks = set(model.model._no_split_modules)
    for module in model.modules():
        if type(module).__name__ in blocks:
            if compiled:
                module.compile(dynamic=True)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def batch_loss(
    model: StudentModel, batch: AlignedBatch, objective: Objective, counts: Counts
) -> tuple[torch.Tensor, Sums]:
    """This micro-batch's share of the step's loss [], and its detached sums of what is logged."""
    return model.read(batch, lambda rows, piece: piece_loss(rows, piece, objective, counts))


def piece_loss(rows: Logits, piece: Piece, objective: Objective, counts: Counts) -> tuple[torch.Tensor, Sums]:
    """The same for one piece, from its rows."""
    rows = student_rows(rows)
    ce = -token_logp(rows, piece.targets_s).sum()
    loss = objective.alpha * ce / counts.tokens
    sums = {"ce": ce.detach() / counts.tokens}
    for k, (term, weight) in enumerate(zip(objective.terms, objective.weights, strict=True)):
        if counts.groups[k] == 0:
            continue
        out = term(rows, piece.teachers[k], piece)
        loss = loss + (1 - objective.alpha) * weight * out.total / counts.groups[k]
        prefix = f"teacher{k}." if len(objective.terms) > 1 else ""
        sums |= {prefix + name: value / counts.groups[k] for name, value in out.metrics.items()}
        if out.groups:  # a 1:1 group is one student token: its share is of tokens, the others' of groups
            sums[f"{prefix}one_to_one"] = out.metrics["one_to_one"] / counts.tokens
    return loss, sums | {"loss": loss.detach()}


def step(
    model: StudentModel,
    optimizer: torch.optim.Optimizer,
    batches: list[AlignedBatch],
    objective: Objective,
    counts: Counts,
    *,
    max_grad_norm: float,
    lap: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Forward and backward over this worker's micro-batches, then one update, or none where it would not be finite.

    `lap(name)` is called at the end of each part of the work: forward, backward, optimizer.
    """
    totals: dict[str, torch.Tensor] = {}
    finite: list[torch.Tensor] = []
    for i, batch in enumerate(batches):
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(i == len(batches) - 1)
        loss, sums = batch_loss(model, batch, objective, counts)
        lap("forward")
        (loss * dist.get_world_size()).backward()  # FSDP averages over the workers, the loss is a sum
        lap("backward")
        finite.append(torch.isfinite(loss.detach()))
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    all_finite = torch.stack(finite)
    faults = (~(all_finite.all() & torch.isfinite(norm))).float()
    dist.all_reduce(faults)  # a loss may be infinite where the gradient is not: all workers decide alike
    skipped = bool(faults.item())
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    lap("optimizer")
    return Outcome(totals, norm, skipped, all_finite.tolist() if skipped else None)


def global_sums(sums: Mapping[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Sums over all workers. A worker may have had only empty chunks, so the names are agreed on first. Collective."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(sums))
    known = list(dict.fromkeys(itertools.chain.from_iterable(names)))
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in known])
    dist.all_reduce(values)
    return dict(zip(known, values.tolist(), strict=True))


def to_device(batch: AlignedBatch, device: torch.device) -> AlignedBatch:
    """The batch's tensors on `device`; its cuts stay on the host."""

    def moved(record: AlignedBatch | TeacherRows) -> dict[str, Any]:
        values = {name: getattr(record, name) for name in record.__dataclass_fields__}
        return {name: value.to(device, non_blocking=True) for name, value in values.items() if torch.is_tensor(value)}

    teachers = tuple(TeacherRows(**moved(one)) for one in batch.teachers)
    return AlignedBatch(**moved(batch), teachers=teachers, cuts=batch.cuts)
