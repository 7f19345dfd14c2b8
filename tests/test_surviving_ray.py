"""Ray Train starts workers again that were killed or hang, and goes on with fewer of them where a node is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

import ray_jobs.train
from cdm.config import StudentPool
from cdm.journal import NullTracker
from cdm.student import TrainingJob
from ray_jobs.cluster import connect
from ray_jobs.train import run_training
from tests import distributed
from tests.distributed import in_checkpoint, in_step, log_to, read_metrics
from tests.training import assert_same_curve, assert_same_weights, tiny_job

pytestmark = pytest.mark.slow

# What strikes in each life of the workers: at which rank, and how. The last life is undisturbed.
LIVES = [
    (1, partial(in_step, 6)),
    (0, partial(in_checkpoint, 2)),
    (0, partial(in_step, 3, signal.SIGSTOP)),
]
DOOMED = "doomed"  # a resource of the node that is lost


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    job = tiny_job(tmp_path_factory.mktemp("student"))
    return replace(job, optimisation=job.optimisation.model_copy(update={"steps": 12}))


@pytest.fixture(scope="module")
def undisturbed(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = replace(job, export=str(folder / "export"))
    return job, distributed.run(job, folder, world=2)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_worker_niceness", "0")


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


def lives(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank{rank}.txt").read_text(encoding="utf-8").split()


def run(worker: Callable[[dict], None], job: TrainingJob, pool: StudentPool, folder: Path) -> list[dict]:
    """Every step that was made, those that were lost too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_jobs.train, "_worker", worker)
        run_training(job, pool, folder=str(folder), name="run", run=None, on_metrics=lambda step, metrics: None)
    return read_metrics(folder / "run")


# --- one node ----------------------------------------------------------------------------------------------------


def mortal_worker(config: dict[str, Any]) -> None:
    watched(config, lambda life, rank, _: LIVES[life][1] if life < len(LIVES) and LIVES[life][0] == rank else None)


def test_workers_killed_and_hung_are_started_again_and_end_bit_for_bit(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path
) -> None:
    job = replace(job, export=str(tmp_path / "export"))
    with connect():
        curve = run(mortal_worker, job, StudentPool(workers=2, max_failures=len(LIVES), timeout_s=5), tmp_path)
    assert len(lives(tmp_path / "run", 0)) == len(LIVES) + 1
    assert len(curve) < sum(range(12))
    for metrics in curve:
        assert_same_curve([metrics], [undisturbed[1][int(metrics["step"]) - 1]], 0.0)
    assert {m["step"] for m in curve} == set(range(1, 13))
    assert_same_weights(job.export, undisturbed[0].export)
    assert len(list((tmp_path / "run").glob("step_*"))) == job.optimisation.keep_checkpoints


# --- two nodes ---------------------------------------------------------------------------------------------------


def worker_on_a_doomed_node(config: dict[str, Any]) -> None:
    """In its sixth step its node dies: the raylet that started it, then it."""

    def strike() -> None:
        in_step(6, before=lambda: os.kill(os.getppid(), signal.SIGKILL))

    watched(config, lambda life, rank, resources: strike if DOOMED in resources else None)


@pytest.fixture
def two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, resources={DOOMED: 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_lost_node_is_a_smaller_world(
    two_nodes: None, job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path
) -> None:
    job = replace(job, export=str(tmp_path / "export"))
    pool = StudentPool(workers=2, min_workers=1, max_failures=1, timeout_s=30)
    curve = run(worker_on_a_doomed_node, job, pool, tmp_path)
    first, second = lives(tmp_path / "run", 0)
    (other,) = lives(tmp_path / "run", 1)
    assert first != other, "both workers were on one node"
    assert {node["NodeID"] for node in ray.nodes() if node["Alive"]} == {second}
    for metrics in curve:
        assert_same_curve([metrics], [undisturbed[1][int(metrics["step"]) - 1]], 1e-4)
    assert curve[-1]["step"] == 12 and Path(job.export).exists()
