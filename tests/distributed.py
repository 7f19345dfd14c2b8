"""Runs `cdm.student.train` in real processes of a gloo group, as torchrun would, and keeps its metrics."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cdm.checkpoints import FolderCheckpoints
from cdm.student import TrainingJob, train


def run(job: TrainingJob, folder: Path, world: int, *, die_after: int | None = None) -> list[dict[str, float]]:
    """Metrics of every step, in order. With `die_after` every process kills itself (SIGKILL) after that step."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    arguments = (world, str(store), job, str(folder), die_after)
    context = mp.spawn(_worker, arguments, nprocs=world, join=False, start_method="spawn")
    if die_after is None:
        while not context.join():
            pass
    else:
        for process in context.processes:
            process.join()
        codes = [process.exitcode for process in context.processes]
        assert -signal.SIGKILL in codes and 0 not in codes  # a peer may see the connection break first
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _worker(rank: int, world: int, store: str, job: TrainingJob, folder: str, die_after: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        if step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    train(job, FolderCheckpoints(str(Path(folder) / "checkpoints")), on_metrics)
    dist.destroy_process_group()
