"""Workers of `run_training` that die: in a module that Ray's processes can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train

import ray_jobs.train
from cdm.journal import NullTracker
from tests.distributed import in_checkpoint, in_step, log_to

# What strikes in each life of the workers: at which rank, and how. The last life is undisturbed.
LIVES = [
    (0, partial(in_checkpoint, 3)),
    (1, partial(in_step, 3, signal.SIGSTOP)),
]
DOOMED = "doomed"  # a resource of the node that is lost


class FileTracker(NullTracker):
    def __init__(self, folder: Path) -> None:
        self._log = log_to(folder, 0)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._log(step, values)


def watched(config: dict[str, Any], fault: Callable[[int, int, dict[str, float]], Callable[[], None] | None]) -> None:
    """The worker of `run_training`. Its curve goes to a file, and so does the node of each of its lives."""
    folder, rank = Path(config["folder"]), ray.train.get_context().get_world_rank()
    me = ray.get_runtime_context().get_node_id()
    with open(folder / f"rank{rank}.txt", "a+", encoding="utf-8") as file:
        file.seek(0)
        life = len(file.readlines())
        file.write(f"{me}\n")
    (node,) = (node for node in ray.nodes() if node["NodeID"] == me)
    if (strike := fault(life, rank, node["Resources"])) is not None:
        strike()
    ray_jobs.train.open_run = lambda ref: FileTracker(folder)
    ray_jobs.train._worker(config)


def healthy_worker(config: dict[str, Any]) -> None:
    watched(config, lambda life, rank, _: None)


def mortal_worker(config: dict[str, Any]) -> None:
    watched(config, lambda life, rank, _: LIVES[life][1] if life < len(LIVES) and LIVES[life][0] == rank else None)


def worker_on_a_doomed_node(config: dict[str, Any]) -> None:
    """In its sixth step its node dies: the raylet that started it, then it."""

    def strike() -> None:
        in_step(6, before=lambda: os.kill(os.getppid(), signal.SIGKILL))

    watched(config, lambda life, rank, resources: strike if DOOMED in resources else None)
