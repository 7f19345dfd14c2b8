"""`ray up` to `ray down` on three machines inside this one, reached over SSH, and what happens when one is lost.

Each machine has its own address, processes, home and temporary folder: see tests/machines.py for what that takes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdm.journal import run_series
from tests import whole
from tests.launched import CONFIG, JOB, RESIZE, RESUME, UPGRADE, WATCH, Launched
from tests.machines import HOME, SHARED, why_not
from tests.scoring import files, wait_for
from tests.training import SAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.machines,
    pytest.mark.skipif(why_not() is not None, reason=f"no machines of our own: {why_not()}"),
]
UNTRAINED = whole.CONFIG["teachers"][0]["model"] | {"training": {"steps": 0}}
ENGINE = {"type": "transformers", "dtype": "float32"}
TEACHER = whole.CONFIG["teachers"][0] | {"model": UNTRAINED, "engine": ENGINE}
CHANGES: dict[str, Any] = {"teachers": [TEACHER], "corpus": whole.CONFIG["corpus"] | {"part_documents": 8}}
APART = ["resources.teacher.custom.teacher=1", "resources.student.custom.student=1"]
SPREAD = ["resources.teacher.actors=2", "resources.teacher.custom.box=1", "resources.student.custom.box=1"]
UNSEEN = ("cdm-*", "*-cdm-*")  # what training makes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Launched]:
    launched = Launched()
    try:
        began = time.monotonic()
        launched.up()
        print(f"ray up, {len(launched.machines) - 1} machines: {time.monotonic() - began:.0f} s")
        yield launched
    finally:
        launched.network.close()


class Store:
    """A storage folder on the shared file system: as the machines see it, and as this process does."""

    def __init__(self, cluster: Launched, name: str) -> None:
        self.there, self.here = f"{SHARED}/{name}", cluster.machines["head"].path(f"{SHARED}/{name}")

    def config(self, options: list[str]) -> list[str]:
        self.here.mkdir(exist_ok=True)
        whole.write_config(self.here, Path(self.there), **CHANGES)
        return [f"{self.there}/config.yaml", *(word for option in options for word in ("--set", option))]

    def copy_without(self, other: Store, *patterns: str) -> Store:
        ignored = shutil.ignore_patterns(*patterns, "reports", "mlflow.db", "tracking")
        shutil.copytree(self.here, other.here, ignore=ignored)
        return other

    def curve(self) -> dict[str, list[tuple[int, float]]]:
        (folder,) = (self.here / "tracking").glob("train-*")
        return {name: points for name, points in run_series(str(folder)).items() if name in SAME}

    def shards(self) -> dict[str, bytes]:
        (folder,) = (self.here / "shards").iterdir()
        return files(folder)


@pytest.fixture(scope="module")
def finished(cluster: Launched) -> Store:
    """A pipeline that nothing disturbed."""
    store = Store(cluster, "finished")
    print(cluster.finished("-m", "ray_jobs.pipeline", *store.config(APART)))
    return store


def test_teacher_and_student_are_on_different_machines(cluster: Launched, finished: Store) -> None:
    found = whole.runs(finished.here)
    assert found["score teacher"].data.tags["cdm.nodes"] == cluster.machines["one"].address
    assert found["train cdm, top_k=20"].data.tags["cdm.nodes"] == cluster.machines["two"].address
    assert [step for step, _ in finished.curve()["loss"]] == list(range(1, 9))


# --- who is let in -----------------------------------------------------------------------------------------------


def test_without_the_token_nobody_is_let_in(cluster: Launched) -> None:
    """A job through the tunnel, and a driver on a machine of the cluster; without a token, and with a wrong one."""
    python = f"{HOME}/cdm/.venv/bin/python"
    driver = [python, "-c", f"import ray; ray.init('{cluster.machines['head'].address}:6379'); print('let in')"]
    assert "let in" in cluster.machines["two"].run("env", "RAY_AUTH_MODE=token", *driver)
    for who in (["RAY_AUTH_MODE=disabled"], ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/hostname"]):
        said = cluster.client(f"env {' '.join(who)} ray job submit -- true", check=False)
        assert "AuthenticationError" in said, said
        said = cluster.machines["two"].run("env", *who, *driver, check=False)
        assert "let in" not in said and "Failed to connect to Ray cluster" in said, said


def test_the_token_is_in_no_log_and_no_command_line(cluster: Launched, finished: Store) -> None:
    token = cluster.token.encode()
    for machine in cluster.machines.values():
        assert not [p for p in machine.processes() if token in b" ".join(map(str.encode, p.cmdline()))]
        logs = [path for path in machine.path("/tmp/ray").rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [path for path in logs if token in path.read_bytes()]
    assert not [path for path in finished.here.rglob("*") if path.is_file() and token in path.read_bytes()]


def test_what_the_head_serves_outside(cluster: Launched) -> None:
    """Dashboard and job server on loopback. Ray's own ports are on the machine's addresses: the network's business."""
    listening = cluster.machines["head"].run("ss", "-Hltn").split("\n")
    assert {line.split()[3] for line in listening if ":8265" in line} == {"127.0.0.1:8265"}


# --- what happens when something dies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "how"), [("score", "cut"), ("train-step", "kill"), ("train-checkpoint", "cut")], ids=lambda value: value
)
def test_a_lost_machine_costs_time_alone(cluster: Launched, finished: Store, what: str, how: str) -> None:
    """It is cut off, or dies with all its processes, at the worst moment; a spare one takes its place."""
    wait_for(lambda: len(cluster.nodes()) > 3, every=1)  # the one that the test before this has lost is back
    store = finished.copy_without(Store(cluster, f"{what}-{how}"), *(["shards"] if what == "score" else UNSEEN))
    config, doom = store.config(SPREAD), store.here / "doom"
    job = cluster.submit("-m", "tests.doomed", what, f"{store.there}/doom", *config)
    wait_for(lambda: job.poll() is not None or (doom.exists() and doom.read_text()))
    assert job.poll() is None, job.communicate()[0]
    lost, struck = cluster.machines[doom.read_text(encoding="utf-8")], time.monotonic()
    if how == "cut":
        lost.cut()
    else:
        lost.kill()
        lost.start()  # without Ray
    output, _ = job.communicate(timeout=300)
    print(f"{what}, {lost.name} {how}: done {time.monotonic() - struck:.0f} s later")
    if how == "cut":
        lost.cut("up")
    assert job.returncode == 0, output
    if what == "score":
        assert store.shards() == finished.shards()
    else:
        assert store.curve() == finished.curve(), "of two workers again, bit for bit"


def test_a_job_goes_on_where_its_killed_driver_was(cluster: Launched, finished: Store) -> None:
    store = finished.copy_without(Store(cluster, "driver"), *UNSEEN)
    command = ["-m", "ray_jobs.train", *store.config([])]
    job = cluster.submit(*command)
    wait_for(lambda: job.poll() is not None or list((store.here / "runs").glob("cdm-*/step_00000002/.metadata")))
    drivers = [p for p in cluster.machines["head"].processes() if command[1] in p.cmdline()]
    for process in drivers:
        process.kill()
    output, _ = job.communicate(timeout=300)
    assert drivers and job.returncode != 0, output
    began = time.monotonic()
    cluster.finished(*command)
    print(f"resubmitted: done {time.monotonic() - began:.0f} s later")
    assert store.curve() == finished.curve()


def test_a_full_object_store_spills(cluster: Launched, finished: Store) -> None:
    store = finished.copy_without(Store(cluster, "store"), "shards")
    output = cluster.finished("-m", "tests.doomed", "store", "-", *store.config([]))
    assert re.search(r"Spilled \d+ MiB", output), output
    assert store.shards() == finished.shards()


def test_a_full_disk_is_named_and_the_job_goes_on_when_there_is_room(cluster: Launched, finished: Store) -> None:
    store = finished.copy_without(Store(cluster, "disk"), "shards")
    command = ["-m", "ray_jobs.score", *store.config([])]
    with cluster.network.full():
        job = cluster.submit(*command)
        output, _ = job.communicate(timeout=300)
        assert job.returncode != 0 and "No space left" in output, output
    cluster.finished(*command)
    assert store.shards() == finished.shards()


# --- docs/operations.md ------------------------------------------------------------------------------------------


def test_the_other_commands_of_the_page(cluster: Launched, finished: Store) -> None:
    store = finished.copy_without(Store(cluster, "runs"), *UNSEEN)
    config = store.config([])[0]
    cluster.client(JOB.replace(CONFIG, config))
    seen = cluster.client(WATCH)
    for part in ("first", "ray_jobs.pipeline", "Node status", "autoscaler"):
        assert part in seen
    cluster.client(RESIZE)
    cluster.client(RESUME.replace(CONFIG, config))
    assert re.search("'second' succeeded", cluster.client("ray job logs -f second; ray job status second"))
    cluster.client(UPGRADE)


def test_ray_down_leaves_nothing(cluster: Launched) -> None:
    cluster.down()
    began = time.monotonic()
    machines = [machine for name, machine in cluster.machines.items() if name != "client"]
    wait_for(lambda: not any(machine.processes() for machine in machines), every=1)
    print(f"the last process ended {time.monotonic() - began:.0f} s after ray down")
