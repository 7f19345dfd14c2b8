"""Which Ray a stage runs on: the cluster it was submitted to or told of, else one embedded in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import cdm
import ray_jobs
from cdm.config import StudentPool, TeacherPool

OBJECT_STORE_BYTES = 512 * 2**20  # embedded: only part names, counts and metrics pass through it
START_ATTEMPTS = 4
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for entry points of `ray job submit`
EMBEDDED_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray would run workers at nice 15: minutes to start an engine on a busy machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that books no GPU sees none
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the terminal is the progress view's; Ray keeps its own logs
}


@contextmanager
def connect() -> Iterator[None]:
    """Ray for the body: with RAY_ADDRESS set (as it is inside a job) that cluster, else an embedded one.

    On a cluster outside a job, this code goes to the nodes with it; inside a job it is in the job's working directory.
    What was started or joined is left at the end. Token authentication stays at Ray's default, on.
    """
    if ray.is_initialized():
        yield
        return
    _quiet()
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING, runtime_env=_shipped_code())
    else:
        _start_embedded()
    try:
        yield
    finally:
        ray.shutdown()


def use_cpus(cpus: float) -> None:
    """As many threads as this worker has booked CPUs: left alone, each of several workers starts one for every core."""
    torch.set_num_threads(max(1, int(cpus)))


def beside_me() -> dict[str, Any]:
    """Options of an actor without CPUs on this process's own node: whatever other node is lost, it stays."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def my_address() -> str:
    """Of the node that this worker is on, as runs record it."""
    return str(ray.util.get_node_ip_address())


def check_resources(needed: Mapping[str, float], section: str, who: str) -> None:
    """Raise ValueError where an embedded Ray can never give what `who` need at once: Ray itself would wait for ever.

    A cluster is not asked: its autoscaler may bring nodes that are not there yet.
    """
    if "RAY_ADDRESS" in os.environ:
        return
    available = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > available.get(name, 0):
            raise ValueError(
                f"{section}: {who} need {amount:g} {name}, this machine has {available.get(name, 0):g}; "
                "lower it, or set RAY_ADDRESS to a cluster"
            )


def check_pool(pool: TeacherPool | StudentPool, count: int, section: str, who: str) -> None:
    """`check_resources` for `count` actors of a pool."""
    one = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.custom}
    check_resources({name: amount * count for name, amount in one.items()}, section, who)


def root_cause(error: BaseException) -> str:
    """The last line that says what went wrong, through Ray's wrappers."""
    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _start_embedded() -> None:
    for name, value in EMBEDDED_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    for left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises Exception itself where its node does not come up within 30 s
            if "timed out" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise OSError(f"Ray did not start within 30 s, {START_ATTEMPTS} times: is the machine busy?") from error


def _shipped_code() -> dict[str, Any] | None:
    if IN_JOB in os.environ:
        return None
    return {"py_modules": [str(Path(str(package.__file__)).parent) for package in (cdm, ray_jobs)]}


def _quiet() -> None:
    """Ray Data's bars and plans off: the stages have their own progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "progress bars disabled"
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)  # "finished"
