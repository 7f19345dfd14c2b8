"""kill -9, hangs and other numbers of workers while the student trains: the end is that of an undisturbed run."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cdm.student import TrainingJob
from tests import distributed
from tests.distributed import in_checkpoint, in_step
from tests.training import assert_same_curve, assert_same_weights, tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return tiny_job(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def undisturbed(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = replace(job, export=str(folder / "export"))
    return job, distributed.run(job, folder, world=2)


# At which rank, what, and the first steps that may be done again: a checkpoint in flight is lost. On a busy machine the
# short timeout may strike before the fault.
FAULTS = {
    "killed in a step": (1, partial(in_step, 6), {3, 5}),
    "killed while a checkpoint is written": (1, partial(in_checkpoint, 2), {3}),
    "hung while a checkpoint is written": (0, partial(in_checkpoint, 2, signal.SIGSTOP), {1, 3}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_command_goes_on_bit_for_bit(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path, name: str
) -> None:
    rank, fault, firsts = FAULTS[name]
    job = replace(job, export=str(tmp_path / "export"))
    timeout = distributed.HANGS_AFTER if name.startswith("hung") else distributed.NEVER
    before = distributed.run(job, tmp_path, world=2, fault=fault, rank=rank, timeout=timeout)
    assert not Path(job.export).exists()
    resumed = distributed.run(job, tmp_path, world=2)[len(before) :]
    assert resumed[0]["step"] in firsts
    assert_same_curve(resumed, undisturbed[1][int(resumed[0]["step"]) - 1 :], 0.0)
    assert_same_weights(job.export, undisturbed[0].export)


@pytest.fixture(scope="module")
def killed(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers that were killed in their last step."""
    folder = tmp_path_factory.mktemp("killed")
    distributed.run(replace(job, export=str(folder / "export")), folder, world=2, fault=partial(in_step, 6))
    return folder


@pytest.mark.parametrize("world", [1, 4])
def test_a_checkpoint_of_two_workers_goes_on_with_one_and_with_four(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], killed: Path, tmp_path: Path, world: int
) -> None:
    shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints")
    resumed = distributed.run(replace(job, export=str(tmp_path / "export")), tmp_path, world=world)
    assert resumed[0]["step"] in {3, 5}
    assert_same_curve(resumed, undisturbed[1][int(resumed[0]["step"]) - 1 :], 1e-4)
