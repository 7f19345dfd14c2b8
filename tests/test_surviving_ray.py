"""Ray Train starts workers again that were killed or hang, and goes on with fewer of them where a node is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

import ray_jobs.train
from cdm.config import StudentPool
from cdm.config_methods import Alm
from cdm.student import TrainingJob
from ray_jobs.cluster import connect
from ray_jobs.train import run_training
from tests import distributed, tiny
from tests.distributed import read_metrics
from tests.mortal import DOOMED, LIVES, healthy_worker, mortal_worker, worker_on_a_doomed_node
from tests.training import assert_same_curve, assert_same_weights, tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.long]


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


def lives(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank{rank}.txt").read_text(encoding="utf-8").split()


def run(worker: Callable[[dict], None], job: TrainingJob, pool: StudentPool, folder: Path) -> list[dict]:
    """Every step that was made, those that were lost too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_jobs.train, "_worker", worker)
        run_training(job, pool, folder=str(folder), name="run", run=None, on_metrics=lambda step, metrics: None)
    return read_metrics(folder / "run")


# --- one node ----------------------------------------------------------------------------------------------------


def test_workers_that_die_and_hang_are_started_again_and_end_bit_for_bit(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path
) -> None:
    job = replace(job, export=str(tmp_path / "export"))
    with connect():
        pool = StudentPool(workers=2, max_failures=len(LIVES) + 2, timeout_s=10)  # a busy machine may seem to hang
        curve = run(mortal_worker, job, pool, tmp_path)
    assert len(lives(tmp_path / "run", 0)) > len(LIVES)
    assert len(curve) < len(LIVES) * 12, "no life went on where the one before it was"
    for metrics in curve:
        assert_same_curve([metrics], [undisturbed[1][int(metrics["step"]) - 1]], 0.0)
    assert {m["step"] for m in curve} == set(range(1, 13))
    assert_same_weights(job.export, undisturbed[0].export)
    assert len(list((tmp_path / "run").glob("step_*"))) == job.optimisation.keep_checkpoints


def test_what_a_restart_cannot_help_ends_the_run_at_once(tmp_path: Path) -> None:
    """Every document is poisoned: the error names those of two steps, and nobody starts again."""
    everything = [document.id for document in tiny.documents(48)]
    job = replace(tiny_job(tmp_path / "job", poisoned=everything), method=Alm(type="alm"))
    job = replace(job, optimisation=job.optimisation.model_copy(update={"max_skipped": 2}))
    with connect(), pytest.raises(ValueError, match=r"^2 steps in a row .* with the documents \d\d-lines, ") as raised:
        run(healthy_worker, job, StudentPool(workers=2, max_failures=3), tmp_path)
    assert str(raised.value).endswith("look at their scores, or lower student.learning_rate")
    assert len(lives(tmp_path / "run", 0)) == len(lives(tmp_path / "run", 1)) == 1


# --- two nodes ---------------------------------------------------------------------------------------------------


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
    pool = StudentPool(workers=2, min_workers=1, max_failures=2, timeout_s=60)
    curve = run(worker_on_a_doomed_node, job, pool, tmp_path)
    first, second = lives(tmp_path / "run", 0)
    (other,) = lives(tmp_path / "run", 1)
    assert first != other, "both workers were on one node"
    assert {node["NodeID"] for node in ray.nodes() if node["Alive"]} == {second}
    for metrics in curve:
        assert_same_curve([metrics], [undisturbed[1][int(metrics["step"]) - 1]], 1e-4)
    assert curve[-1]["step"] == 12 and Path(job.export).exists()
