"""Ray Train around `cdm.student.train`: workers, restarts, checkpoints in the run's folder."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from cdm.checkpoints import Metrics, Write, finish
from cdm.config import StudentPool
from cdm.journal import RunRef, Tracker, open_run
from cdm.student import TrainingJob, train
from cdm.tracking import system_metrics
from ray_jobs.cluster import beside_me, my_address, use_cpus

OnMetrics = Callable[[int, Metrics], None]
POLL_SECONDS = 0.5
SCORE = "score"


class RayCheckpoints:
    """Ray Train's own: workers write into the run's folder and report it, Ray Train removes what is not kept.

    A report arrives when the checkpoint is whole, and after what was logged so far: a run that goes on from it never
    makes earlier steps again. One whose report had not arrived is written again.
    """

    def __init__(self, folder: str, tracker: Tracker) -> None:
        self._folder, self._tracker = folder, tracker
        self._written: Future[Any] | None = None

    def latest(self) -> AbstractContextManager[str] | None:
        checkpoint = ray.train.get_checkpoint()
        return checkpoint.as_directory() if checkpoint else None

    def at(self, step: int) -> AbstractContextManager[str]:
        self.wait()
        return nullcontext(os.path.join(self._folder, f"step_{step:08d}"))

    def save(self, step: int, write: Write, metrics: Metrics) -> None:
        self.wait()
        name = f"step_{step:08d}"
        folder = os.path.join(self._folder, name)
        self._written = written = write(folder)

        def when_whole(checkpoint: Checkpoint, _: str) -> Checkpoint:
            finish(written)
            self._tracker.flush()
            return checkpoint

        # Ray Train keeps the highest scores and the newest: the last that was the best is the best.
        score = step if metrics.get("best_step") == step else 0
        ray.train.report(
            metrics | {"step": step, SCORE: score},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=when_whole,
            delete_local_checkpoint_after_upload=False,  # it is where it stays
        )

    def wait(self) -> None:
        if self._written is not None:
            finish(self._written)


class FailAtOnce(UserCallback):
    """Ends a run whose workers say that what they were asked or given is wrong: starting them again cannot help.

    What is raised here is the controller's error, which Ray Train does not retry. Where some worker died as well, the
    ValueError may be what that did to the others.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors = list(worker_exceptions.values())
        if all(isinstance(error, ValueError) for error in errors):
            raise errors[0]


@ray.remote
class Board:
    """What rank 0 last said, for the driver's progress line, and where all ranks are or have been."""

    def __init__(self) -> None:
        self._last: tuple[int, Metrics] = (0, {})
        self._nodes: set[str] = set()

    def join(self, address: str) -> None:
        self._nodes.add(address)

    def write(self, step: int, metrics: Metrics) -> None:
        self._last = (step, metrics)

    def read(self) -> tuple[int, Metrics, set[str]]:
        return *self._last, self._nodes


@ray.remote(num_cpus=0)
class Bookings:
    """What the workers of runs have booked, given back when the process that started a run is gone.

    Ray keeps a placement group until its whole job ends. Ray Train has a cleaner, but that asks a dashboard, and finds
    none where Ray is embedded or several run on the machine. An actor of the driver's; a call a run.
    """

    async def watch(self, board: Any, group: PlacementGroup) -> None:
        """`board` dies with the process that made it, and so does the controller of the run."""
        while True:
            try:
                await board.read.remote()
            except ActorDiedError:
                remove_placement_group(group)
                return
            except ActorUnavailableError:  # its node does not answer for a moment
                pass
            await asyncio.sleep(POLL_SECONDS)


def run_training(
    job: TrainingJob,
    pool: StudentPool,
    *,
    folder: str,
    name: str,
    run: RunRef | None,
    on_metrics: OnMetrics,
    bookings: Any = None,
) -> list[str]:
    """Trains on the pool's workers until the student is exported; resumes what `folder/name` holds.

    Returns the addresses of the nodes that its workers were on. `bookings`: an actor `Bookings`, for a process that may
    die before those that work on Ray together with it.

    Workers that die or hang are started again from the last checkpoint, `pool.max_failures` times; then
    ray.train.TrainingFailedError. With `pool.min_workers` there may be fewer of them than were asked for.
    A ValueError of `cdm.student.train` is raised at once, as it is.
    """
    board = Board.options(**beside_me()).remote()  # type: ignore[attr-defined]
    work = {"job": job, "run": run, "board": board, "cpus": pool.cpus, "folder": os.path.join(folder, name)}
    work |= {"bookings": bookings}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=work,
        torch_config=TorchConfig(timeout_s=pool.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=pool.workers if pool.min_workers is None else (pool.min_workers, pool.workers),
            use_gpu=pool.gpus > 0,
            resources_per_worker={"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {}), **pool.custom},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=pool.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=job.optimisation.keep_checkpoints,
                checkpoint_score_attribute=SCORE,
            ),
            callbacks=[FailAtOnce()],
        ),
    )
    try:
        with _Watch(board, on_metrics) as watch:
            trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, ValueError):
            raise error.controller_failure from error
        raise
    return sorted(watch.nodes)


def _worker(config: dict[str, Any]) -> None:
    use_cpus(config["cpus"])
    config["board"].join.remote(my_address())
    first = ray.train.get_context().get_world_rank() == 0
    if first and config["bookings"] is not None:
        config["bookings"].watch.remote(config["board"], get_current_placement_group())
    tracker = open_run(config["run"] if first else None)

    def on_metrics(step: int, metrics: Metrics) -> None:
        if first:
            tracker.metrics(step, metrics)
            config["board"].write.remote(step, metrics)

    with system_metrics(tracker):
        train(config["job"], RayCheckpoints(config["folder"], tracker), on_metrics)
    tracker.flush()


class _Watch:
    """Polls the board in a thread while `fit` blocks."""

    def __init__(self, board: Any, on_metrics: OnMetrics) -> None:
        self._board, self._on_metrics = board, on_metrics
        self.nodes: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(POLL_SECONDS)
            try:
                step, metrics, self.nodes = ray.get(self._board.read.remote())
            except RayActorError:  # it was killed: the run goes on without a progress line
                return
            if step:
                self._on_metrics(step, metrics)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("train")
