"""One student, sharded by FSDP2 over however many processes there are: the loop around the step, and export.

The loop is a plain function. It runs in a Ray Train worker, under torchrun or alone; whoever calls it passes a
`Checkpoints` and a place for metrics. Loss and gradients do not depend on micro-batches, padding or the number of
workers: every sum is divided by its count over the global batch, which each worker reads off the plan.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from cdm import parts
from cdm.adapters import adapt
from cdm.batches import AlignedData, Row, collate, micro_batches, step_rows
from cdm.checkpoints import Checkpoints, Metrics, Progress, TrainingState, restore_weights
from cdm.config_methods import AnyMethod, Cdm, Sft
from cdm.config_models import Lora, Optimisation
from cdm.export import export_student, lineage
from cdm.methods import CONTEXT, METHODS, SAME_TOKENIZER
from cdm.models import load_model
from cdm.pieces import Piece
from cdm.records import AlignedBatch, LossOutput, TeacherRows
from cdm.rows import StudentRows
from cdm.speed import LAPS, Costs, Laps, cost_of, reset_peak_memory, time_shares
from cdm.step import Counts, Objective, Outcome, StudentModel, Term, global_sums, shard, step, to_device
from cdm.validation import Validation, has_ended, judged
from cdm.vocab_map import VocabMap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN_IDS = 20


@dataclass(frozen=True)
class TrainingJob:
    """All that a training run is asked. Paths are reachable from every worker; nothing here says where it runs.

    maps: one file of `VocabMap.save` a teacher, None where the teacher has the student's own tokenizer.
    targets: `response` distils and teaches the response alone; `all` teaches every token (pretraining).
    lora, freeze_embeddings: what of the weights is trained (`cdm.adapters`). documents: the training split's first so
    many are read, None: all.
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
    lora: Lora | None = None
    freeze_embeddings: bool = False
    documents: int | None = None


def identity_of(job: TrainingJob) -> dict[str, Any]:
    """What a checkpoint of this run belongs to: what was asked and the documents, not where they lie."""
    sections = {"method": job.method, "student": job.optimisation}
    asked = {f"{name}.{k}": v for name, section in sections.items() for k, v in section.model_dump(mode="json").items()}
    asked.pop("student.min_coverage", None)  # asked before the run
    return asked | {
        "model": f"{Path(job.model).name}@{job.revision}", "aligned": parts.read_manifest(job.aligned).fingerprint,
        "weights": job.weights, "seed": job.seed, "targets": job.targets, "freeze_embeddings": job.freeze_embeddings,
        "lora": None if job.lora is None else job.lora.model_dump(mode="json"),
    }  # fmt: skip


def objective_of(job: TrainingJob) -> Objective:
    """The method's terms, one a teacher; a teacher with the student's own tokenizer is a plain top-k KL."""
    if isinstance(job.method, Sft):
        return Objective(1.0, (), ())
    options = job.method.model_dump(exclude={"type", "alpha", "align", "threshold", "protect", "unmatched"})
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

    `on_metrics(step, metrics)` is called on every rank after every step with global figures. Raises ValueError naming
    the documents where `max_skipped` steps in a row had no finite loss and gradient.
    """
    settings = job.optimisation
    run = _start(job)
    reset_peak_memory(run.device)
    validation = Validation(
        job.aligned, job.shards, job.maps, objective=run.objective, documents=settings.validation_documents,
        micro_batch_tokens=settings.micro_batch_tokens, collated=_collated(job, "response"),
    )  # fmt: skip
    state = TrainingState(run.model, run.optimizer, identity_of(job))
    progress = state.restore(checkpoints)
    end = progress.step if has_ended(progress, settings.steps, settings.best) else settings.steps
    plan = itertools.islice(step_rows(run.data, seed=job.seed, batch_tokens=settings.batch_tokens), progress.step, end)
    for work in _prefetch(run.data, plan, job):
        run.laps.end("data")
        progress, metrics = _update(run, work, progress)
        last = progress.step == settings.steps
        validated = last or progress.step % settings.validate_every == 0
        if validated:
            metrics |= validation.measure(run.model)
            progress = judged(progress, metrics, settings.best)
            run.laps.end("validation")
        early = validated and not last and has_ended(progress, settings.steps, settings.best)
        on_metrics(progress.step, metrics)
        due = progress.step % settings.checkpoint_every == 0 or progress.best_step == progress.step
        if last or early or due:
            state.save(checkpoints, progress, metrics)
            run.laps.end("checkpoint")
        if early:
            break
    checkpoints.wait()
    _export(run, checkpoints, validation, progress)


@dataclass(frozen=True)
class _Run:
    """What the loop holds on to."""

    job: TrainingJob
    device: torch.device
    model: StudentModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    data: AlignedData
    costs: Costs
    laps: Laps
    step_seconds: list[float]


def _start(job: TrainingJob) -> _Run:
    """Model, optimiser and data before the first step."""
    settings, device = job.optimisation, _device()
    inner = load_model(job.model, revision=job.revision, dtype="float32")
    adapt(inner, job.lora, job.freeze_embeddings, seed=job.seed)
    if settings.activation_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    costs = Costs.of(inner, device, DTYPES[settings.precision])
    model = StudentModel(inner.to(device).eval())
    model.check_head()
    model = shard(model.train(), DTYPES[settings.precision], device, compiled=settings.compile)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    objective = objective_of(job)
    # A run without KD terms reads the same documents in the same order, and none of the scores.
    data = AlignedData.open(job.aligned, job.shards if objective.terms else (), "train", job.documents)
    return _Run(job, device, model, optimizer, objective, data, costs, Laps(device), [])


@dataclass(frozen=True)
class Work:
    """One step as this worker reads it: the rows of all workers, and its micro-batches with their documents' ids."""

    rows: np.ndarray
    ids: list[list[str]]
    batches: list[AlignedBatch]


def _update(run: _Run, work: Work, progress: Progress) -> tuple[Progress, Metrics]:
    """One step over all workers, and what is logged of it."""
    job, settings, laps, number = run.job, run.job.optimisation, run.laps, progress.step
    began = time.perf_counter()
    torch.manual_seed(hash((job.seed, number, dist.get_rank())) % 2**63)  # dropout: a restart draws the same numbers
    rate = learning_rate(settings, number)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    counts = counts_of(run.data, work.rows, job.targets)
    batches = [to_device(batch, run.device) for batch in work.batches]
    laps.end("other")
    done = step(
        run.model, run.optimizer, batches, run.objective, counts, max_grad_norm=settings.max_grad_norm, lap=laps.end
    )
    metrics, speed = _reduced(done, batches, laps, run.device)
    took = time.perf_counter() - began
    run.step_seconds.append(took)
    in_doubt = (*progress.in_doubt, _offenders(work, done)) if done.skipped else ()
    if done.skipped:
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        _check_skipped(in_doubt, settings.max_skipped)
    else:
        _check_mapped(metrics, job)
        metrics["grad_norm"] = done.norm.item()
    progress = replace(
        progress, step=number + 1, seconds=progress.seconds + took, skipped=progress.skipped + done.skipped,
        in_doubt=in_doubt,
    )  # fmt: skip
    lengths = run.data.sizes["tokens_s"][work.rows]
    metrics |= {"learning_rate": rate, "seconds": progress.seconds, "skipped_steps": progress.skipped}
    metrics |= {"tokens_a_second": int(lengths.sum()) / took, "padding_share": 1 - int(lengths.sum()) / speed["cells"]}
    metrics |= {"groups_a_second": sum(counts.groups) / took} if run.objective.terms else {}
    metrics |= run.costs.mfu(lengths, took, dist.get_world_size())
    return progress, metrics | time_shares({name: speed[name] for name in LAPS if name in speed})


def _reduced(
    done: Outcome, batches: list[AlignedBatch], laps: Laps, device: torch.device
) -> tuple[Metrics, dict[str, float]]:
    """The sums of a step over all workers: those of its loss, and in one reduction with them padded cells and laps."""
    spent: dict[str, float] = {"cells": sum(batch.input_ids.numel() for batch in batches), **laps.take()}
    totals = global_sums({**done.sums, **spent}, device)
    laps.end("other")
    speed = {name: totals.pop(name) for name in spent}
    return totals, speed


def _export(run: _Run, checkpoints: Checkpoints, validation: Validation, progress: Progress) -> None:
    """The last step's weights, or those of the best validation. Collective.

    Raises ValueError where there should be a best and no validation was finite.
    """
    job, model, exported = run.job, run.model, progress.step
    if job.optimisation.best is not None:
        exported = progress.best_step
        if not exported:
            raise ValueError(f"{job.optimisation.best.metric} was never finite: there is no best step to export")
        restore_weights(checkpoints, model, exported)
    about = {
        "method": job.method.model_dump(mode="json"),
        "steps": progress.step,
        "step": exported,
        "seconds": progress.seconds,
        **cost_of(run.step_seconds, run.device),
        "from": job.model,
        "scores": list(job.shards),
        "aligned": job.aligned,
        "lineage": lineage(job.aligned, job.shards),
        "figures": validation.measure(model),
    }
    export_student(model, job.tokenizer, job.revision, job.export, lora=job.lora, about=about)


def _collated(job: TrainingJob, targets: Literal["response", "all"]) -> Callable[[Sequence[Row]], AlignedBatch]:
    return partial(
        collate,
        top_k=job.method.top_k if isinstance(job.method, Cdm) else None,
        targets=targets,
        whole_documents=CONTEXT.get(job.method.type) == "documents_s",
    )


def _prefetch(data: AlignedData, plan: Iterator[np.ndarray], job: TrainingJob) -> Iterator[Work]:
    """Reads the next step's batches in a thread while this one computes."""
    lengths, collated = data.sizes["tokens_s"], _collated(job, job.targets)
    rank, world = dist.get_rank(), dist.get_world_size()

    def read(rows: np.ndarray) -> Work:
        chunks = micro_batches(rows, lengths, world=world, micro_batch_tokens=job.optimisation.micro_batch_tokens)
        mine = [[data.row(number) for number in chunk] for chunk in chunks[rank::world]]
        return Work(rows, [[row.id for row in chunk] for chunk in mine], [collated(chunk) for chunk in mine])

    with ThreadPoolExecutor(1) as pool:
        upcoming: Future[Work] | None = None
        for rows in plan:
            ready, upcoming = upcoming, pool.submit(read, rows)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()


# --- what is wrong -----------------------------------------------------------------------------------------------


def _offenders(work: Work, done: Outcome) -> tuple[str, ...]:
    """The documents of all workers' micro-batches whose loss was not finite; all of the step where only its gradient
    was not. Collective.
    """
    assert done.finite is not None
    bad = [name for ids, finite in zip(work.ids, done.finite, strict=True) if not finite for name in ids]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (bad, list(itertools.chain.from_iterable(work.ids))))
    found = [name for bad, _ in gathered for name in bad] or [name for _, ids in gathered for name in ids]
    return tuple(sorted(found))


def _check_skipped(in_doubt: tuple[tuple[str, ...], ...], allowed: int) -> None:
    """Raise ValueError where so many steps in a row were skipped, naming their documents."""
    if len(in_doubt) >= allowed:
        names = sorted(set(itertools.chain.from_iterable(in_doubt)))
        more = f" and {len(names) - SHOWN_IDS} more" if len(names) > SHOWN_IDS else ""
        raise ValueError(
            f"{len(in_doubt)} steps in a row had a loss or gradient that is not finite (student.max_skipped), with "
            f"the documents {', '.join(names[:SHOWN_IDS])}{more}; look at their scores, or lower student.learning_rate"
        )


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
