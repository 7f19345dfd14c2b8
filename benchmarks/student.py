"""Training at small size: what distilling, workers, checkpoints, restarts and data cost, and a peer's epoch.

    CDM_REAL_DATA=FOLDER python -m benchmarks.student

FOLDER holds tokenizers/gpt2, tokenizers/qwen2.5 and instructions/. Two cores; TRL as in `benchmarks.gold`.

- `cdm_over_sft_time`: a step, from `benchmarks.student_step`.
- Ray Train on real text, tiny models, one thread a worker, a checkpoint every EVERY steps: one worker, two workers, and
  two of which one is killed in mid-step. Tokens a second are medians over steps, of elapsed time: the machine must have
  nothing else to do. Tokens a CPU second do not mind, but waiting for one another is not in them.
- `resume_overhead_s`: from the kill until the step that it hit is done. `checkpoint_stall_share`, `data_wait_share`: of
  the first worker's time in the loop, what it waited for a checkpoint's copy and for the next batch.
- `padding_share`: of the cells of all micro-batches of 500 documents, at the config's defaults and at others.
  `pairs_a_token`: what attention computes of them, at the defaults.
- `over_gold`: `benchmarks.gold`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import torch

import cdm.step
import cdm.student
import ray_jobs.train
from benchmarks import gold, runs, student_step
from benchmarks.memory import in_fresh_process
from benchmarks.table import finish, machine, show
from cdm import parts
from cdm.batches import AlignedData, align_part, micro_batches, step_rows
from cdm.checkpoints import TrainingState
from cdm.config import StudentPool
from cdm.config_models import Optimisation
from cdm.corpus import table_of
from cdm.grouping import Grouping
from cdm.journal import NullTracker
from cdm.shards import ROW_GROUP_DOCUMENTS
from cdm.student import TrainingJob
from cdm.tokenizers import load_tokenizer
from ray_jobs.cluster import connect
from ray_jobs.train import run_training

DOCUMENTS = 120
STEPS, EVERY, FATAL = 20, 5, 13
HIDDEN = 128
GOALS = {
    "cdm_over_sft_time": "at most 1.25",
    "checkpoint_stall_share": "at most 0.02",
    "data_wait_share": "at most 0.03",
    "over_gold": "at least 5",
}

Line = dict[str, float]  # figures, or what a worker noted


def measure() -> Iterator[tuple[str, Line]]:
    """All figures, a group at a time with its title."""
    yield "An epoch against TRL 1.16's GOLDTrainer", gold.measure()
    steps = in_fresh_process(student_step.step_seconds, student_step.CPU)
    yield "A step", {"cdm_over_sft_time": steps["cdm"] / steps["sft"]}
    root = Path(tempfile.mkdtemp())
    job = in_fresh_process(prepared, root)
    yield "Micro-batches of 500 responses", in_fresh_process(padding, root)
    yield f"Ray Train, {STEPS} steps, one worker and two", workers(root, job)


def workers(root: Path, job: TrainingJob) -> Line:
    with connect():
        alone, two, killed = (trained(root, job, *asked) for asked in ((1, None), (2, None), (2, FATAL)))
    (kill,) = (line["killed"] for line in killed if "killed" in line)
    resumed = next(line["time"] for line in killed if line.get("step") == FATAL)
    end = next(line for line in two if "loop" in line)
    return {
        "tokens_a_second_1": rate(alone),
        "tokens_a_second_2": rate(two),
        "workers2_over_1_throughput_per_core": rate(two) / 2 / rate(alone),
        "workers2_over_1_tokens_a_cpu_second": cpu_seconds(alone) / cpu_seconds(two),
        "resume_overhead_s": resumed - kill,
        "checkpoint_stall_s": end["stall"] / (STEPS / EVERY),
        "checkpoint_stall_share": end["stall"] / end["loop"],
        "data_wait_share": end["wait"] / end["loop"],
    }


def rate(lines: list[Line]) -> float:
    return statistics.median(line["tokens_a_second"] for line in lines if line.get("step", 0) > 2)


def cpu_seconds(lines: list[Line]) -> float:
    """Of all workers' loops; what they compute is the same with any number of them."""
    return sum(line["cpu"] for line in lines if "cpu" in line)


def prepared(root: Path) -> TrainingJob:
    torch.set_num_threads(1)
    optimisation = Optimisation(
        steps=STEPS, batch_tokens=2048, micro_batch_tokens=1024, precision="float32", max_length=256, warmup_steps=2,
        checkpoint_every=EVERY, validate_every=STEPS, validation_documents=runs.VALIDATION,
    )  # fmt: skip
    texts = runs.documents(runs.dolly()[:DOCUMENTS])
    return runs.training_job(root, *runs.models(root, HIDDEN), texts, optimisation)


def trained(root: Path, job: TrainingJob, workers: int, fatal: int | None) -> list[Line]:
    """What the workers noted, and the one that was killed in step `fatal`."""
    name = f"run-{workers}-{fatal}"
    job = replace(job, export=str(root / f"{name}-export"))
    ray_jobs.train._worker = mortal_worker if fatal else measured_worker
    pool = StudentPool(workers=workers, max_failures=1)
    run_training(job, pool, folder=str(root / "runs"), name=name, run=None, on_metrics=lambda step, metrics: None)
    lines = (root / "runs" / name / "notes.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- in a worker -------------------------------------------------------------------------------------------------


class Notes(NullTracker):
    def __init__(self, folder: str) -> None:
        self._file = Path(folder) / "notes.jsonl"

    def add(self, **values: float) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.add(step=step, time=time.time(), tokens_a_second=values["tokens_a_second"])


def measured_worker(config: dict[str, Any]) -> None:
    """The worker of `run_training`, with a watch on what its loop waits for."""
    notes, spent = Notes(config["folder"]), {"stall": 0.0, "wait": 0.0}
    read, save = cdm.student._prefetch, TrainingState.save

    def watched_read(*arguments: Any, **options: Any) -> Iterator[Any]:
        began, used, works = time.perf_counter(), time.process_time(), read(*arguments, **options)
        next_work = next(works, None)  # the first is there before the loop has anything to do
        while next_work is not None:
            yield next_work
            start = time.perf_counter()
            next_work = next(works, None)
            spent["wait"] += time.perf_counter() - start
        notes.add(cpu=time.process_time() - used)
        if ray.train.get_context().get_world_rank() == 0:
            notes.add(loop=time.perf_counter() - began, **spent)

    def watched_save(*arguments: Any) -> None:
        start = time.perf_counter()
        save(*arguments)
        spent["stall"] += time.perf_counter() - start

    cdm.student._prefetch, TrainingState.save = watched_read, watched_save  # type: ignore[method-assign, assignment]
    ray_jobs.train.open_run = lambda ref: notes
    ray_jobs.train._worker(config)


def mortal_worker(config: dict[str, Any]) -> None:
    """The same, but the second worker dies in step FATAL of its first life, before the update."""
    first_life = Path(config["folder"]) / "first-life"
    if ray.train.get_context().get_world_rank() == 1 and not first_life.exists():
        first_life.touch()
        clip, calls = torch.nn.utils.clip_grad_norm_, []

        def strike(*arguments: Any, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == FATAL:
                Notes(config["folder"]).add(killed=time.time())
                os.kill(os.getpid(), signal.SIGKILL)
            return clip(*arguments, **options)

        cdm.step.torch.nn.utils.clip_grad_norm_ = strike
    measured_worker(config)


# --- padding -----------------------------------------------------------------------------------------------------


def padding(root: Path) -> Line:
    """Of one epoch: at the config's defaults, with smaller micro-batches, with eight workers and more tokens."""
    corpus, folder = str(root / "padding-corpus"), str(root / "padding")
    parts.write_part(corpus, runs.PARTS[0], table_of(runs.documents(runs.dolly())))
    grouping = Grouping("exact", load_tokenizer(str(root / "student")))
    table, _ = align_part(corpus, [], runs.PARTS[0], grouping, max_length=Optimisation(steps=1).max_length)
    parts.write_part(folder, runs.PARTS[0], table, row_group_size=ROW_GROUP_DOCUMENTS)
    parts.finish(folder, {}, kind="aligned")
    data = AlignedData.open(folder, (), "train")
    share, pairs = padded(data, Optimisation(steps=1), world=2)
    return {
        "padding_share": share,
        "pairs_a_token": pairs,
        "padding_share_micro_2048": padded(data, Optimisation(steps=1, micro_batch_tokens=2048), world=2)[0],
        "padding_share_8_workers": padded(
            data, Optimisation(steps=1, batch_tokens=131_072, micro_batch_tokens=8192), world=8
        )[0],
    }


def padded(data: AlignedData, asked: Optimisation, world: int) -> tuple[float, float]:
    """The share of an epoch's cells without a token; pairs of positions that attention takes, a token."""
    lengths, tokens, cells, pairs, rows = data.sizes["tokens_s"], 0, 0, 0, 0
    for step in step_rows(data, seed=0, batch_tokens=asked.batch_tokens):
        for chunk in micro_batches(step, lengths, world=world, micro_batch_tokens=asked.micro_batch_tokens):
            width = int(lengths[chunk].max(initial=0))
            tokens += int(lengths[chunk].sum())
            cells += len(chunk) * width
            pairs += len(chunk) * width**2
        rows += len(step)
        if rows >= len(data):
            return 1 - tokens / cells, pairs / tokens
    raise AssertionError("an epoch ends")


def main() -> None:
    print(f"Training at small size, {machine()}\n")
    figures: Line = {}
    for title, found in measure():
        show(title, ["figure", "goal", "measured"], [[n, GOALS.get(n, ""), f"{v:,.4g}"] for n, v in found.items()])
        figures |= found
    finish(figures)


if __name__ == "__main__":
    main()
