"""Ray Train around `cdm.student.train`: workers, restarts, checkpoints in the run's folder."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cdm.config import StudentPool
from cdm.journal import RunRef, Tracker, open_run
from cdm.student import Metrics, TrainingJob, train
from cdm.tracking import system_metrics
from ray_jobs.cluster import use_cpus

OnMetrics = Callable[[int, Metrics], None]
POLL_SECONDS = 0.5


class RayCheckpoints:
    """Ray Train's own: each worker reports the files it wrote, the run's folder holds the last two whole ones.

    What was logged so far is sent first: a run that goes on from a checkpoint never makes earlier steps again.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def latest(self) -> AbstractContextManager[str] | None:
        checkpoint = ray.train.get_checkpoint()
        return checkpoint.as_directory() if checkpoint else None

    def save(self, step: int, write: Callable[[str], None], metrics: Metrics) -> None:
        self._tracker.flush()
        with tempfile.TemporaryDirectory() as folder:
            write(folder)
            checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(metrics | {"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step_{step:08d}")


@ray.remote(num_cpus=0)
class Board:
    """What rank 0 last said, for the driver's progress line."""

    def __init__(self) -> None:
        self._last: tuple[int, Metrics] = (0, {})

    def write(self, step: int, metrics: Metrics) -> None:
        self._last = (step, metrics)

    def read(self) -> tuple[int, Metrics]:
        return self._last


def run_training(
    job: TrainingJob, pool: StudentPool, *, folder: str, name: str, run: RunRef | None, on_metrics: OnMetrics
) -> None:
    """Trains on the pool's workers until the student is exported; resumes what `folder/name` holds.

    A dead worker is restarted from the last checkpoint, `pool.max_failures` times; then ray.train.TrainingFailedError.
    """
    board = Board.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "run": run, "board": board, "cpus": pool.cpus},
        torch_config=TorchConfig(timeout_s=pool.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=pool.workers,
            use_gpu=pool.gpus > 0,
            resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {}), **pool.custom},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=pool.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    with _Watch(board, on_metrics):
        trainer.fit()


def _worker(config: dict[str, Any]) -> None:
    use_cpus(config["cpus"])
    first = ray.train.get_context().get_world_rank() == 0
    tracker = open_run(config["run"] if first else None)

    def on_metrics(step: int, metrics: Metrics) -> None:
        if first:
            tracker.metrics(step, metrics)
            config["board"].write.remote(step, metrics)

    with system_metrics(tracker):
        train(config["job"], RayCheckpoints(tracker), on_metrics)
    tracker.flush()


class _Watch:
    """Polls the board in a thread while `fit` blocks."""

    def __init__(self, board: Any, on_metrics: OnMetrics) -> None:
        self._board, self._on_metrics = board, on_metrics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                step, metrics = ray.get(self._board.read.remote())
            except RayActorError:  # its node is gone: the run goes on without a progress line
                return
            if step:
                self._on_metrics(step, metrics)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("train")
