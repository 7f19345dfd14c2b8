"""`python -m tests.doomed WHAT DOOM CONFIG [--set KEY=VALUE]...`: a stage on a cluster that is about to lose a machine.

The first process of the stage on the machine of this name gets as far as WHAT says, writes its machine's address to the
file DOOM and waits for its end, so that whoever watches can strike at that moment. The others go on.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ray_jobs.score
import ray_jobs.train
from cdm.parts import Part
from ray_jobs.pipeline import main
from ray_jobs.score import PlacedScorePart
from tests.distributed import in_checkpoint, in_step

DOOMED = "two"
worker = ray_jobs.train._worker


def wait_for_the_end(doom: str) -> None:
    Path(doom).write_text(DOOMED, encoding="utf-8")
    signal.pause()


def here(doom: str) -> bool:
    return os.uname().nodename == DOOMED and not Path(doom).exists()


class DoomedScorePart(PlacedScorePart):
    """Its second part is not made."""

    doom: ClassVar[str]
    begun = 0

    def make(self, part: Part) -> None:
        self.begun += 1
        if self.begun == 2 and here(self.doom):
            wait_for_the_end(self.doom)
        super().make(part)


def doomed_worker(config: dict[str, Any], *, what: str, doom: str) -> None:
    if here(doom):
        before = partial(wait_for_the_end, doom)
        STRIKES[what](3, before=before)
    worker(config)


STRIKES = {"train-step": in_step, "train-checkpoint": in_checkpoint}

if __name__ == "__main__":
    what, doom = sys.argv[1:3]
    del sys.argv[1:3]
    if what == "score":
        DoomedScorePart.doom = doom
        ray_jobs.score.PlacedScorePart = DoomedScorePart
        main("score")
    ray_jobs.train._worker = partial(doomed_worker, what=what, doom=doom)
    main("train")
