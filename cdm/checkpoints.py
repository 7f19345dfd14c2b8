"""What a training run keeps: sharded checkpoints that any number of workers restores, and the exported student."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from cdm import parts
from cdm.tokenizers import load_tokenizer

Metrics = dict[str, float]
ABOUT = "cdm.json"


class Checkpoints(Protocol):
    """Where checkpoints live. `save` is called by every process and returns when the checkpoint is complete."""

    def latest(self) -> AbstractContextManager[str] | None:
        """A local folder of the newest complete checkpoint, if there is one."""

    def save(self, step: int, write: Callable[[str], None], metrics: Metrics) -> None:
        """Keeps what `write(folder)` writes."""


class FolderCheckpoints:
    """Checkpoints in a folder that every process sees; the newest is kept."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step_????????"))

    def latest(self) -> AbstractContextManager[str] | None:
        return nullcontext(str(self._steps()[-1])) if self._steps() else None

    def save(self, step: int, write: Callable[[str], None], metrics: Metrics) -> None:
        unfinished = self._folder / f"unfinished_{step:08d}"
        unfinished.mkdir(parents=True, exist_ok=True)
        write(str(unfinished))
        dist.barrier()
        if dist.get_rank() == 0:
            older = self._steps()
            os.replace(unfinished, self._folder / f"step_{step:08d}")
            for folder in older:
                shutil.rmtree(folder)
        dist.barrier()


class _TrainingState(Stateful):
    """Everything a step depends on; the schedule and the data position are functions of `step`."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
        self.model, self.optimizer, self.step, self.seconds = model, optimizer, step, seconds

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def save(
    checkpoints: Checkpoints,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    seconds: float,
    metrics: Metrics,
) -> None:
    """A sharded checkpoint after `step` steps that took `seconds` of training. Collective: called by every process."""
    state = _TrainingState(model, optimizer, step, seconds)
    checkpoints.save(step, lambda folder: dcp.save({"training": state}, checkpoint_id=folder), metrics)


def restore(checkpoints: Checkpoints, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Loads the newest checkpoint into model and optimizer. Returns the steps and seconds done. Collective."""
    latest = checkpoints.latest()
    if latest is None:
        return 0, 0.0
    state = _TrainingState(model, optimizer, 0, 0.0)
    with latest as folder:
        dcp.load({"training": state}, checkpoint_id=folder)
    return state.step, state.seconds


def export_model(model: Any, tokenizer: str, revision: str | None, folder: str, about: dict[str, Any]) -> None:
    """Gathers the weights and writes an ordinary Hugging Face folder (safetensors), whole or not at all. Collective.

    `about` goes beside the weights as `cdm.json`: how this student was made.
    """
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        weights = {name.removeprefix("model."): value for name, value in gathered.items()}
        unfinished = Path(f"{folder}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        model.model.save_pretrained(unfinished, state_dict=weights)
        load_tokenizer(tokenizer, revision=revision).hf.save_pretrained(unfinished)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in unfinished.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(unfinished, folder)
        parts.fsync_folder(str(Path(folder).parent))
    dist.barrier()


def read_about(folder: str) -> dict[str, Any]:
    """How an exported student was made."""
    return json.loads((Path(folder) / ABOUT).read_text(encoding="utf-8"))
