"""One student, sharded by FSDP2 over however many processes there are: one step, one loop, export.

The loop is a plain function. It runs in a Ray Train worker, under torchrun or alone; whoever calls it passes a
`Checkpoints` and a place for metrics. Loss and gradients do not depend on micro-batches, padding or the number of
workers: every sum is divided by its count over the global batch, which each worker reads off the plan.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from cdm.batches import AlignedData, collate, micro_batches, step_rows, token_bytes
from cdm.checkpoints import Checkpoints, export_model, restore, save
from cdm.config import AnyMethod, Optimisation, Sft
from cdm.methods import METHODS
from cdm.models import load_model
from cdm.records import AlignedBatch, TeacherRows
from cdm.vocab_map import VocabMap

Metrics = dict[str, float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LN2 = math.log(2)


@dataclass(frozen=True)
class TrainingJob:
    """All that a training run is asked. Paths are reachable from every worker; nothing here says where it runs.

    maps: one file of `VocabMap.save` a teacher, None where the teacher has the student's own tokenizer.
    targets: `response` distils and teaches the response alone; `all` teaches every token (pretraining).
    """

    model: str
    revision: str | None
    tokenizer: str
    optimisation: Optimisation
    method: AnyMethod
    aligned: str
    shards: tuple[str, ...]
    maps: tuple[str | None, ...]
    weights: tuple[float, ...]
    seed: int
    export: str
    targets: Literal["response", "all"] = "response"


@dataclass(frozen=True)
class Objective:
    """L = alpha * CE + (1 - alpha) * sum_k w_k * KD_k (docs/method.md, section 4)."""

    alpha: float
    terms: tuple[Callable[[torch.Tensor, TeacherRows], Any], ...]
    weights: tuple[float, ...]

    @classmethod
    def build(cls, job: TrainingJob) -> Objective:
        """The method's terms, one a teacher; a teacher with the student's own tokenizer is a plain top-k KL."""
        if isinstance(job.method, Sft):
            return cls(1.0, (), ())
        options = job.method.model_dump(exclude={"type", "alpha", "threshold", "protect"})
        terms = [_term(job.method.type, path, options) for path in job.maps]
        return cls(job.method.alpha, tuple(terms), job.weights)


def _term(method: str, map_path: str | None, options: dict[str, Any]) -> Callable[[torch.Tensor, TeacherRows], Any]:
    if map_path is None:
        return lambda logits_s, teacher: METHODS["kl"](logits_s, teacher, None, temperature=options["temperature"])
    vocab_map = VocabMap.load(map_path)
    return lambda logits_s, teacher: METHODS[method](logits_s, teacher, vocab_map, **options)


class StudentModel(torch.nn.Module):
    """A causal LM whose head sees only the rows asked for: [B, N] ids -> [R, V] logits, never [B, N, V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)  # Gemma-2 and its kin

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[rows])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ValueError where the model does more after its last hidden state than this forward does (scaling)."""
        ids = torch.arange(4, device=self.model.device)[None]
        ours = self(ids, torch.ones_like(ids), torch.arange(4, device=ids.device))
        if not torch.allclose(ours, self.model(ids).logits[0], rtol=1e-3, atol=1e-4):
            raise ValueError(f"{self.model.config.model_type}: the logits are no plain head over the last hidden state")


def shard(model: StudentModel, optimisation: Optimisation, device: torch.device) -> StudentModel:
    """`fully_shard` every block and the root over all processes; fp32 weights, reduction in fp32."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[optimisation.precision], reduce_dtype=torch.float32)
    blocks = set(model.model._no_split_modules)
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def learning_rate(optimisation: Optimisation, step: int) -> float:
    """Linear warm-up, then the schedule down to zero at `steps` (constant: not down at all)."""
    peak, warmup, steps = optimisation.learning_rate, optimisation.warmup_steps, optimisation.steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * shapes[optimisation.schedule]


# --- one step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What the sums of one step are divided by, over the global batch."""

    tokens: int
    groups: tuple[int, ...]

    @classmethod
    def of(cls, data: AlignedData, rows: np.ndarray, targets: str) -> Counts:
        sizes = data.sizes
        tokens = sizes["response_s"][rows] if targets == "response" else sizes["tokens_s"][rows] - 1
        return cls(
            int(tokens.sum()), tuple(int(sizes[f"groups{k}"][rows].sum()) for k in range(len(data.shards_folders)))
        )


def batch_loss(
    model: StudentModel, batch: AlignedBatch, objective: Objective, counts: Counts
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the step's loss [], and its detached sums of what is logged."""
    logits = model(batch.input_ids, batch.attention_mask, batch.rows_s)
    if not len(batch.rows_s):  # a chunk that only keeps the collectives in step
        return logits.sum() * 0, {}
    ce = functional.cross_entropy(logits.float(), batch.targets_s, reduction="sum")
    loss = objective.alpha * ce / counts.tokens
    sums = {"ce": ce.detach() / counts.tokens}
    for k, (term, weight) in enumerate(zip(objective.terms, objective.weights, strict=True)):
        if counts.groups[k] == 0:
            continue
        out = term(logits, batch.teachers[k])
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
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Forward and backward over this worker's micro-batches, one update. Returns this worker's sums and the norm."""
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(batches):
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(i == len(batches) - 1)
        loss, sums = batch_loss(model, batch, objective, counts)
        (loss * dist.get_world_size()).backward()  # FSDP averages over the workers, the loss is a sum
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm.item()}: the loss or a gradient is not finite")
    optimizer.step()
    optimizer.zero_grad()
    return totals, norm


# --- the loop ----------------------------------------------------------------------------------------------------


def train(job: TrainingJob, checkpoints: Checkpoints, on_metrics: Callable[[int, Metrics], None]) -> None:
    """Trains, checkpoints and exports; resumes from the latest checkpoint. The same on every process of the group.

    `on_metrics(step, metrics)` is called on every rank after every step with global figures.
    """
    settings, device = job.optimisation, _device()
    rank, world = dist.get_rank(), dist.get_world_size()
    inner = load_model(job.model, revision=job.revision, dtype="float32")
    if settings.activation_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    model = StudentModel(inner.to(device).eval())
    model.check_head()
    model = shard(model.train(), settings, device)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    objective = Objective.build(job)
    # A run without KD terms reads the same documents in the same order, and none of the scores.
    data = AlignedData.open(job.aligned, job.shards if objective.terms else (), "train")
    start, seconds = restore(checkpoints, model, optimizer)
    plan = itertools.islice(step_rows(data, seed=job.seed, batch_tokens=settings.batch_tokens), start, settings.steps)
    feed = _prefetch(data, plan, job, rank=rank, world=world)
    for number, (rows, batches) in zip(range(start, settings.steps), feed, strict=True):
        began = time.perf_counter()
        torch.manual_seed(hash((job.seed, number, rank)) % 2**63)  # dropout: a restart draws the same numbers
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, number)
        counts = Counts.of(data, rows, job.targets)
        batches = [_to(batch, device) for batch in batches]
        sums, norm = step(model, optimizer, batches, objective, counts, max_grad_norm=settings.max_grad_norm)
        metrics = _global(sums, device) | {"grad_norm": norm.item(), "learning_rate": learning_rate(settings, number)}
        took = time.perf_counter() - began
        seconds += took
        metrics |= {"seconds": seconds, "tokens_a_second": int(data.sizes["tokens_s"][rows].sum()) / took}
        metrics |= {"groups_a_second": sum(counts.groups) / took} if objective.terms else {}
        last = number + 1 == settings.steps
        if last or (number + 1) % settings.validate_every == 0:
            metrics |= validate(model, job, rank=rank, world=world, device=device)
        on_metrics(number + 1, metrics)
        if last or (number + 1) % settings.checkpoint_every == 0:
            save(checkpoints, model, optimizer, step=number + 1, seconds=seconds, metrics=metrics)
    about = {"method": job.method.model_dump(mode="json"), "steps": settings.steps, "seconds": seconds}
    export_model(
        model, job.tokenizer, job.revision, job.export, about | {"from": job.model, "scores": list(job.shards)}
    )


def _prefetch(
    data: AlignedData, plan: Iterator[np.ndarray], job: TrainingJob, *, rank: int, world: int
) -> Iterator[tuple[np.ndarray, list[AlignedBatch]]]:
    """Reads the next step's batches in a thread while this one computes."""
    lengths, top_k = data.sizes["tokens_s"], getattr(job.method, "top_k", 0)

    def read(rows: np.ndarray) -> tuple[np.ndarray, list[AlignedBatch]]:
        chunks = micro_batches(rows, lengths, world=world, micro_batch_tokens=job.optimisation.micro_batch_tokens)
        mine = [[data.row(number) for number in chunk] for chunk in chunks[rank::world]]
        return rows, [collate(chunk, top_k=top_k, targets=job.targets) for chunk in mine]

    with ThreadPoolExecutor(1) as pool:
        upcoming: Future[tuple[np.ndarray, list[AlignedBatch]]] | None = None
        for rows in plan:
            ready, upcoming = upcoming, pool.submit(read, rows)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()


@torch.no_grad()
def validate(model: StudentModel, job: TrainingJob, *, rank: int, world: int, device: torch.device) -> Metrics:
    """Bits per byte of the validation split's first documents: nats of the tokens that have bytes, over the bytes."""
    data = AlignedData.open(job.aligned, (), "validation")
    rows = np.arange(min(len(data), job.optimisation.validation_documents))
    budget = job.optimisation.micro_batch_tokens
    chunks = micro_batches(rows, data.sizes["tokens_s"], world=world, micro_batch_tokens=budget)
    sums = {"nats": torch.zeros((), device=device), "bytes": torch.zeros((), device=device)}
    model.eval()
    for chunk in chunks[rank::world]:
        documents = [data.row(number) for number in chunk]
        batch = _to(collate(documents, top_k=0), device)
        logits = model(batch.input_ids, batch.attention_mask, batch.rows_s)
        sizes = torch.from_numpy(token_bytes(documents)).to(device)
        nats = functional.cross_entropy(logits.float(), batch.targets_s, reduction="none")
        sums["nats"] += nats[sizes > 0].sum()
        sums["bytes"] += sizes.sum()
    model.train()
    totals = _global(sums, device)
    return {"validation_bits_per_byte": totals["nats"] / totals["bytes"] / LN2}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _to(batch: AlignedBatch, device: torch.device) -> AlignedBatch:
    def moved(record: Any) -> dict[str, Any]:
        tensors = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "teachers"}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

    return AlignedBatch(**moved(batch), teachers=tuple(TeacherRows(**moved(one)) for one in batch.teachers))


def _global(sums: dict[str, torch.Tensor], device: torch.device) -> Metrics:
    """Sums over all workers. A worker may have had only empty chunks, so the names are agreed on first."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(sums))
    known = list(dict.fromkeys(itertools.chain.from_iterable(names)))
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in known])
    dist.all_reduce(values)
    return dict(zip(known, values.tolist(), strict=True))
