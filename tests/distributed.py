"""Runs `cdm.student.train` in real processes of a gloo group, as torchrun would, and keeps its metrics."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemWriter

import cdm.step
from cdm.checkpoints import FolderCheckpoints
from cdm.student import TrainingJob, train

Fault = Callable[[], None]
HANGS_AFTER = timedelta(seconds=8)
NEVER = timedelta(minutes=10)


def run(
    job: TrainingJob,
    folder: Path,
    world: int,
    *,
    fault: Fault | None = None,
    rank: int | None = None,
    timeout: timedelta = NEVER,
) -> list[dict[str, float]]:
    """Metrics of every step, in order. `fault` is set up in every process, or in that of one rank, before it trains.

    timeout: until a process that hangs is noticed. With a fault every process must end badly: the one that has it, and
    those that notice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    arguments = (world, str(store), job, str(folder), fault, rank, timeout)
    context = mp.spawn(_worker, arguments, nprocs=world, join=False, start_method="spawn")
    if fault is None:
        while not context.join():
            pass
    else:
        survivors = [process for i, process in enumerate(context.processes) if rank is None or i != rank]
        for process in survivors:
            process.join(300)
        context.processes[rank or 0].kill()  # a stopped one ends by nothing else
        context.processes[rank or 0].join()
        codes = [process.exitcode for process in context.processes]
        assert 0 not in codes and None not in codes
    return read_metrics(folder)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def log_to(folder: Path, rank: int) -> Callable[[int, dict[str, float]], None]:
    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    return on_metrics


def _worker(
    rank: int,
    world: int,
    store: str,
    job: TrainingJob,
    folder: str,
    fault: Fault | None,
    victim: int | None,
    timeout: timedelta,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    if fault is not None and victim in (None, rank):
        fault()
    keep = job.optimisation.keep_checkpoints
    train(job, FolderCheckpoints(str(Path(folder) / "checkpoints"), keep=keep), log_to(Path(folder), rank))
    dist.destroy_process_group()


# --- faults: set up in a process, they strike later --------------------------------------------------------------


def in_step(number: int, what: signal.Signals = signal.SIGKILL, before: Fault = lambda: None) -> None:
    """The process gets a signal in its `number`-th step: the gradients are there, the update is not."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def strike(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == number:
            before()
            os.kill(os.getpid(), what)
        return clip(*arguments, **options)

    cdm.step.torch.nn.utils.clip_grad_norm_ = strike


def in_checkpoint(number: int, what: signal.Signals = signal.SIGKILL, before: Fault = lambda: None) -> None:
    """The process gets a signal while it writes its `number`-th checkpoint: its files are there, the table is not."""
    write, calls = FileSystemWriter.write_data, []

    def strike(*arguments: object) -> object:
        calls.append(1)
        done = write(*arguments)
        if len(calls) == number:
            done.wait()
            before()
            os.kill(os.getpid(), what)
        return done

    FileSystemWriter.write_data = strike
