"""What a training run keeps while it runs: sharded checkpoints that any number of workers restores (layer 2)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

Metrics = dict[str, float]
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Checkpoints(Protocol):
    """Where checkpoints live. `save` is called by every process and returns when the checkpoint is complete."""

    def latest(self) -> AbstractContextManager[str] | None:
        """A local folder of the newest complete checkpoint, if there is one."""

    def at(self, step: int) -> AbstractContextManager[str]:
        """A local folder of the complete checkpoint of a step that is kept."""

    def save(self, step: int, write: Callable[[str], None], metrics: Metrics) -> None:
        """Keeps what `write(folder)` writes, and besides the newest that of step `metrics["best_step"]`, 0: none."""


class FolderCheckpoints:
    """Checkpoints in a folder that every process sees; the newest and the best are kept."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step_????????"))

    def latest(self) -> AbstractContextManager[str] | None:
        return nullcontext(str(self._steps()[-1])) if self._steps() else None

    def at(self, step: int) -> AbstractContextManager[str]:
        return nullcontext(str(self._folder / f"step_{step:08d}"))

    def save(self, step: int, write: Callable[[str], None], metrics: Metrics) -> None:
        best = f"step_{int(metrics['best_step']):08d}"
        unfinished = self._folder / f"unfinished_{step:08d}"
        unfinished.mkdir(parents=True, exist_ok=True)
        write(str(unfinished))
        dist.barrier()
        if dist.get_rank() == 0:
            older = self._steps()
            os.replace(unfinished, self._folder / f"step_{step:08d}")
            for folder in older:
                if folder.name != best:
                    shutil.rmtree(folder)
        dist.barrier()


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


class _TrainingState(Stateful):
    """Everything a step depends on; the schedule and the data position are functions of the step.

    Weights that are not trained are those of the model that the run began with, and are not kept.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        self.model, self.optimizer, self.progress = model, optimizer, progress

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINED)
        return {"model": model, "optimizer": optimizer, "progress": json.dumps(asdict(self.progress))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=TRAINED)
        progress = json.loads(state["progress"])
        self.progress = Progress(**progress | {"in_doubt": tuple(map(tuple, progress["in_doubt"]))})


class _Weights(Stateful):
    """The weights of a training state alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model, options=TRAINED)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"], options=TRAINED)


def save(
    checkpoints: Checkpoints,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    metrics: Metrics,
) -> None:
    """A sharded checkpoint. Collective: called by every process."""
    state = _TrainingState(model, optimizer, progress)
    checkpoints.save(
        progress.step,
        lambda folder: dcp.save({"training": state}, checkpoint_id=folder),
        metrics | {"best_step": progress.best_step},
    )


def restore(checkpoints: Checkpoints, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Loads the newest checkpoint into model and optimizer. Returns what is done. Collective."""
    latest = checkpoints.latest()
    if latest is None:
        return Progress()
    state = _TrainingState(model, optimizer, Progress())
    with latest as folder:
        dcp.load({"training": state}, checkpoint_id=folder)
    return state.progress


def restore_weights(checkpoints: Checkpoints, model: torch.nn.Module, step: int) -> None:
    """Loads the weights of the checkpoint of a step. Collective."""
    with checkpoints.at(step) as folder:
        dcp.load({"training": _Weights(model)}, checkpoint_id=folder)
