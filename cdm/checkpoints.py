"""What a training run keeps while it runs: sharded checkpoints that any number of workers restores (layer 2)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from cdm import parts

Metrics = dict[str, float]
Write = Callable[[str], Future[Any]]
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Checkpoints(Protocol):
    """Where checkpoints live. Every process calls all of it."""

    def latest(self) -> AbstractContextManager[str] | None:
        """A local folder of the newest whole checkpoint, if there is one."""

    def at(self, step: int) -> AbstractContextManager[str]:
        """A local folder of the whole checkpoint of a step that is kept."""

    def save(self, step: int, write: Write, metrics: Metrics) -> None:
        """Keeps what `write(folder)` is writing, once the future that it returns is done.

        Kept are the newest and that of `metrics["best_step"]`. Only one is written at a time: waits for the one before,
        and raises what went wrong with it.
        """

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong."""


def finish(written: Future[Any]) -> None:
    """Waits until a checkpoint's files are written. Raises OSError naming the process that could not.

    torch's own error is a BaseException, which those who wait in a thread do not expect.
    """
    try:
        written.result()
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank} could not write its part of a checkpoint: {fault}") from error


class FolderCheckpoints:
    """Checkpoints in a folder that every process sees: the newest `keep` and the best."""

    def __init__(self, folder: str, *, keep: int = 2) -> None:
        self._folder, self._keep = Path(folder), keep
        self._thread = ThreadPoolExecutor(1)
        self._saved: Future[None] | None = None

    def latest(self) -> AbstractContextManager[str] | None:
        steps = self._steps()
        return nullcontext(str(steps[-1])) if steps else None

    def at(self, step: int) -> AbstractContextManager[str]:
        self.wait()
        dist.barrier()  # the first process publishes
        return nullcontext(str(self._of(step)))

    def save(self, step: int, write: Write, metrics: Metrics) -> None:
        self.wait()
        unfinished = self._folder / f"unfinished_{step:08d}"
        best = self._of(int(metrics.get("best_step", 0)))
        self._saved = self._thread.submit(self._publish, write(str(unfinished)), unfinished, self._of(step), best)

    def wait(self) -> None:
        if self._saved is not None:
            self._saved.result()

    def _publish(self, written: Future[Any], unfinished: Path, whole: Path, best: Path) -> None:
        finish(written)  # the first process's is done when all are
        if dist.get_rank() == 0:
            os.replace(unfinished, whole)
            parts.fsync_folder(str(self._folder))
            for folder in self._steps()[: -self._keep]:
                if folder != best:
                    shutil.rmtree(folder)

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step_????????"))

    def _of(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"


@dataclass(frozen=True)
class Progress:
    """What a run has done, beside its weights and its optimiser's state.

    seconds: of the steps, over restarts. best: the value of the validation metric at best_step, the best so far; stale:
    validations since. skipped: steps without an update; in_doubt: the documents of those that came last, in a row.
    """

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    skipped: int = 0
    in_doubt: tuple[tuple[str, ...], ...] = ()


class TrainingState(Stateful):
    """Everything a step depends on. The schedule, the order of the data and random numbers are functions of the step.

    Weights that are not trained are those of the model that the run began with, and are not kept.
    identity: which run this is, in plain values. A checkpoint of another is refused.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> None:
        self.model, self.optimizer, self.identity = model, optimizer, identity
        self.progress = Progress()
        # A group of its own: what a thread sends while it writes must not meet what a step sends.
        self._group = dist.new_group(backend="gloo", timeout=_group_timeout())

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED)
        return {"model": model, "optimizer": optimizer, "progress": json.dumps(asdict(self.progress))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=TRAINED)
        progress = json.loads(state["progress"])
        self.progress = Progress(**progress | {"in_doubt": tuple(map(tuple, progress["in_doubt"]))})

    def save(self, checkpoints: Checkpoints, progress: Progress, metrics: Metrics) -> None:
        """A sharded checkpoint of now, written while training goes on. Collective; waits for a copy in memory alone."""
        self.progress = progress
        checkpoints.save(progress.step, self._write, metrics | {"best_step": progress.best_step})

    def _write(self, folder: str) -> Future[Any]:
        content = {"identity": json.dumps(self.identity), "training": self}
        writing = dcp.async_save(content, checkpoint_id=folder, process_group=self._group)
        assert isinstance(writing, Future)
        return writing

    def restore(self, checkpoints: Checkpoints) -> Progress:
        """Loads the newest checkpoint, if there is one. Returns what is done. Collective.

        Raises ValueError where it is of another run, naming what differs.
        """
        latest = checkpoints.latest()
        if latest is None:
            return Progress()
        with latest as folder:
            found = {"identity": ""}
            dcp.load(found, checkpoint_id=folder)
            check_identity(folder, json.loads(found["identity"]), self.identity)
            dcp.load({"training": self}, checkpoint_id=folder)
        return self.progress


class _Weights(Stateful):
    """The weights of a training state alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model, options=TRAINED)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"], options=TRAINED)


def restore_weights(checkpoints: Checkpoints, model: torch.nn.Module, step: int) -> None:
    """Loads the weights of the checkpoint of a step. Collective."""
    with checkpoints.at(step) as folder:
        dcp.load({"training": _Weights(model)}, checkpoint_id=folder)


def check_identity(folder: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises ValueError naming what differs between a checkpoint's run and this one."""
    here = json.loads(json.dumps(here))  # as the checkpoint holds it: tuples are lists
    if differing := [key for key in sorted(there | here) if there.get(key) != here.get(key)]:
        found = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)
        raise ValueError(f"{folder} is a checkpoint of another run: {found}; give this run a folder of its own")


def _group_timeout() -> timedelta:
    """That of the group that trains: a hanging process is noticed as soon while a checkpoint is written."""
    world = dist.group.WORLD
    assert world is not None
    return world._get_backend(world._device_types[0]).options._timeout
