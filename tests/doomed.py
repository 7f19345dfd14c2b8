"""`python -m tests.doomed WHAT DOOM CONFIG [--set KEY=VALUE]...`: a stage on a cluster that is about to lose a machine.

The first process of the stage that gets as far as WHAT says, on any machine but `one`, writes the name of its machine
to the file DOOM and waits for its end, so that whoever watches can strike at that moment. The others go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import ray

import ray_jobs.score
import ray_jobs.train
from cdm.parts import Part
from ray_jobs.pipeline import main
from ray_jobs.score import PlacedScorePart
from tests.distributed import in_checkpoint, in_step

SPARED = "one"
STRIKES = {"train-step": in_step, "train-checkpoint": in_checkpoint}


def wait_for_the_end(doom: str) -> None:
    """Unless another process waits for its own already."""
    try:
        with open(doom, "x", encoding="utf-8") as file:
            file.write(os.uname().nodename)
    except FileExistsError:
        return
    signal.pause()


class DoomedScorePart(PlacedScorePart):
    """Its second part is not made."""

    doom: ClassVar[str]
    begun = 0

    def make(self, part: Part) -> None:
        self.begun += 1
        if self.begun == 2 and os.uname().nodename != SPARED:
            wait_for_the_end(self.doom)
        super().make(part)


def doomed_worker(what: str, doom: str) -> Callable[[dict[str, Any]], None]:
    """The worker of `run_training`, which gets into its third step or checkpoint."""

    def run(config: dict[str, Any]) -> None:
        from ray_jobs.train import _worker  # in the worker's process, where it is what it was

        if os.uname().nodename != SPARED and not os.path.exists(doom):
            STRIKES[what](3, signal.SIGCONT, partial(wait_for_the_end, doom))
        _worker(config)

    return run


def fill_the_store(megabytes: int = 64, times: int = 6) -> list[ray.ObjectRef]:
    """More than the store of the driver's machine holds, all of it in use."""
    ray.init(log_to_driver=False)
    held = [ray.put(np.full(megabytes * 2**20, i, np.uint8)) for i in range(times)]
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only"], check=True)
    return held


if __name__ == "__main__":
    what, doom = sys.argv[1:3]
    del sys.argv[1:3]
    if what == "score":
        DoomedScorePart.doom = doom
        ray_jobs.score.PlacedScorePart = DoomedScorePart
        main("score")
    elif what == "store":
        held = fill_the_store()
        main("score")
    else:
        ray_jobs.train._worker = doomed_worker(what, doom)
        main("train")
