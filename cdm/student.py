"""One student, sharded by FSDP2 over however many processes there are: the loop around the step, and export.

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
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from cdm.batches import AlignedData, collate, micro_batches, step_rows, token_bytes
from cdm.checkpoints import Checkpoints, export_model, restore, save
from cdm.config_methods import AnyMethod, Cdm, Sft
from cdm.config_models import Optimisation
from cdm.head import Sums
from cdm.methods import CONTEXT, METHODS, SAME_TOKENIZER
from cdm.models import load_model
from cdm.pieces import Piece
from cdm.records import AlignedBatch, LossOutput, TeacherRows
from cdm.rows import StudentRows, token_logp
from cdm.step import Counts, Objective, StudentModel, Term, shard, step, to_device
from cdm.vocab_map import VocabMap

Metrics = dict[str, float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LN2 = math.log(2)
VALIDATION_METRICS = ("validation_bits_per_byte",)  # what `validate` returns


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


def objective_of(job: TrainingJob) -> Objective:
    """The method's terms, one a teacher; a teacher with the student's own tokenizer is a plain top-k KL."""
    if isinstance(job.method, Sft):
        return Objective(1.0, (), ())
    options = job.method.model_dump(exclude={"type", "alpha", "align", "threshold", "protect"})
    terms = [_term(job.method.type, path, options) for path in job.maps]
    return Objective(job.method.alpha, tuple(terms), job.weights)


def _term(method: str, map_path: str | None, options: dict[str, Any]) -> Term:
    if map_path is None and method not in SAME_TOKENIZER:
        method, options = "kl", {"temperature": options.get("temperature", 1.0)}
    vocab_map, context = None if map_path is None else VocabMap.load(map_path), CONTEXT.get(method)

    def term(rows: StudentRows, teacher: TeacherRows, piece: Piece) -> LossOutput:
        more = {} if context is None else {context: getattr(piece, context)}
        return METHODS[method](rows, teacher, vocab_map, **options, **more)

    return term


def counts_of(data: AlignedData, rows: np.ndarray, targets: str) -> Counts:
    """The counts of one step's rows, the same on every worker."""
    sizes = data.sizes
    tokens = sizes["response_s"][rows] if targets == "response" else sizes["tokens_s"][rows] - 1
    return Counts(
        int(tokens.sum()), tuple(int(sizes[f"groups{k}"][rows].sum()) for k in range(len(data.shards_folders)))
    )


def learning_rate(optimisation: Optimisation, step: int) -> float:
    """Linear warm-up, then the schedule down to zero at `steps` (constant: not down at all)."""
    peak, warmup, steps = optimisation.learning_rate, optimisation.warmup_steps, optimisation.steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * shapes[optimisation.schedule]


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
    model = shard(model.train(), DTYPES[settings.precision], device)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    objective = objective_of(job)
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
        counts = counts_of(data, rows, job.targets)
        batches = [to_device(batch, device) for batch in batches]
        sums, norm = step(model, optimizer, batches, objective, counts, max_grad_norm=settings.max_grad_norm)
        metrics = _global(sums, device)
        _check_mapped(metrics, job)
        metrics |= {"grad_norm": norm.item(), "learning_rate": learning_rate(settings, number)}
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
    about |= {"from": job.model, "scores": list(job.shards), "aligned": job.aligned}
    export_model(model, job.tokenizer, job.revision, job.export, about)


def _prefetch(
    data: AlignedData, plan: Iterator[np.ndarray], job: TrainingJob, *, rank: int, world: int
) -> Iterator[tuple[np.ndarray, list[AlignedBatch]]]:
    """Reads the next step's batches in a thread while this one computes."""
    lengths = data.sizes["tokens_s"]
    top_k = job.method.top_k if isinstance(job.method, Cdm) else None
    whole_documents = CONTEXT.get(job.method.type) == "documents_s"

    def read(rows: np.ndarray) -> tuple[np.ndarray, list[AlignedBatch]]:
        chunks = micro_batches(rows, lengths, world=world, micro_batch_tokens=job.optimisation.micro_batch_tokens)
        mine = [[data.row(number) for number in chunk] for chunk in chunks[rank::world]]
        return rows, [
            collate(chunk, top_k=top_k, targets=job.targets, whole_documents=whole_documents) for chunk in mine
        ]

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
        batch = to_device(collate(documents, top_k=0), device)
        sizes = torch.from_numpy(token_bytes(documents)).to(device)
        nats, _ = model.read(batch, partial(_nats_of_bytes, sizes=sizes))
        sums["nats"] += nats
        sums["bytes"] += sizes.sum()
    model.train()
    totals = _global(sums, device)
    return {"validation_bits_per_byte": totals["nats"] / totals["bytes"] / LN2}


def _nats_of_bytes(rows: StudentRows, piece: Piece, sizes: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """Nats of a piece's tokens that have bytes; sizes [R] of the whole batch."""
    has_bytes = sizes[piece.start : piece.end] > 0
    return -torch.where(has_bytes, token_logp(rows, piece.targets_s), 0.0).sum(), {}


def _check_mapped(metrics: Metrics, job: TrainingJob) -> None:
    """Raise ValueError where none of a teacher's mass in the whole step maps to the student."""
    for k, scores in enumerate(job.shards):
        prefix = f"teacher{k}." if len(job.shards) > 1 else ""
        if metrics.get(f"{prefix}mass_unmapped") and not (
            metrics[f"{prefix}mass_exact"] or metrics[f"{prefix}mass_dynamic"]
        ):
            raise ValueError(
                f"nothing maps in a whole step between the scores {scores!r} and the student's tokenizer "
                f"{job.tokenizer!r}: check that the shards and the student belong to these tokenizers"
            )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _global(sums: dict[str, torch.Tensor], device: torch.device) -> Metrics:
    """Sums over all workers. A worker may have had only empty chunks, so the names are agreed on first."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(sums))
    known = list(dict.fromkeys(itertools.chain.from_iterable(names)))
    values = torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in known])
    dist.all_reduce(values)
    return dict(zip(known, values.tolist(), strict=True))
