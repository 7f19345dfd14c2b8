"""A real search on the tiny pipeline's scores, two trials at once on two CPUs; killed and gone on with."""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cdm.config import load_config
from cdm.journal import run_facts, run_folders, run_series
from tests.whole import finish, start, without_the_student, write_config

pytestmark = pytest.mark.slow

SEARCH = {
    "space": {
        "student.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
        "method.threshold": {"type": "choice", "values": [0.3, 0.2]},
    },
    "trials": 3,
    "searcher": "random",
    "scheduler": "none",
    "max_concurrent": 2,
}
RESOURCES = {"student": {"workers": 1}}


def kill(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    finish(process)


def scores(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for stage in ("shards", "corpus") for path in (storage / stage).rglob("*")}


def test_a_killed_search_goes_on_and_scores_nothing(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    without_the_student(finished[0], storage)
    before = scores(storage)
    config = write_config(tmp_path, storage, search=SEARCH, resources=RESOURCES)
    process = start("search", config)
    while not list((storage / "searches").glob("*/trials/*/run-0/step_*")):
        assert process.poll() is None, finish(process)
        threading.Event().wait(0.05)
    kill(process)
    begun = {path.name for path in (storage / "searches").glob("*/trials/*")}
    assert begun and not list((storage / "searches").glob("*/best.yaml"))

    again = start("search", config, "--retrain", "10")
    output = finish(again)
    assert again.returncode == 0, output
    assert "have score teacher" in output and "done score" not in output and scores(storage) == before
    assert "Traceback" not in output and "Warning" not in output
    (folder,) = (storage / "searches").iterdir()
    assert {path.name for path in folder.iterdir()} >= {"best.yaml", "trials.csv", "trials.parquet", "importance.json"}
    assert not (folder / "trials").exists() and not (folder / "tune").exists(), "no checkpoint is left"
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished"] * 3 and begun <= {row["trial"] for row in rows}
    best = min(rows, key=lambda row: row["validation_bits_per_byte"])
    asked = load_config(folder / "best.yaml")
    assert (asked.student.learning_rate, asked.method.model_dump()["threshold"]) == (
        best["student.learning_rate"], best["method.threshold"],
    )  # fmt: skip
    assert f"student, 10 steps: {storage}/students/tiny-cdm-" in output

    runs = {facts.run["name"]: facts for facts in map(run_facts, run_folders(str(storage)))}
    for row in rows:
        trial = runs[f"trial {row['trial']}"]
        assert (trial.status, trial.run["parent"]) == ("FINISHED", Path(runs["tiny"].folder).name)
        assert [step for step, _ in run_series(trial.folder)["loss"]] == list(range(1, 9)), "no step is lost or twice"


def test_a_best_config_is_trained_already_and_a_search_is_not_run_again(
    finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    """A grid of one stopped and one finished trial; then the commands that a person gives next."""
    storage = tmp_path / "storage"
    without_the_student(finished[0], storage)
    space = {"student.learning_rate": {"type": "choice", "values": [1e-2, 1e-5]}}
    section = {"space": space, "searcher": "grid", "grace_steps": 4}
    changes = {"student": {**load(finished[1])["student"], "validate_every": 2}, "resources": RESOURCES}
    config = write_config(tmp_path, storage, search=section, **changes)
    output = finish(start("search", config))
    (folder,) = (storage / "searches").iterdir()
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [(row["state"], row["step"]) for row in rows] == [("finished", 8), ("stopped", 4)], output
    runs = {facts.run["name"]: facts for facts in map(run_facts, run_folders(str(storage)))}
    stopped = runs[f"trial {rows[1]['trial']}"]
    assert stopped.status == "FINISHED" and stopped.tags["cdm.stopped"] == "at step 4"
    trained = finish(start("train", f"{folder}/best.yaml"))
    assert "have train cdm" in trained
    once_more = finish(start("search", config))
    assert "have search" in once_more and "done " not in once_more
    table = output[output.index("Trials") : output.index("best config")]
    assert table in once_more


def load(config: str) -> dict:
    import yaml

    return yaml.safe_load(Path(config).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--set", "search.max_concurrent=9"], 1, "the workers of 9 trials at once need 9 CPU"),
        (["--set", "search.metric=loss"], 2, "search.metric: 'loss' is not known; one of validation_bits_per_byte"),
        (["--set", "search.space={student.stepz: {type: choice, values: [1]}}"], 2, "student.stepz: unknown key"),
    ],
)
def test_what_can_never_work_is_said_at_once(tmp_path: Path, options: list[str], code: int, line: str) -> None:
    config = write_config(tmp_path, tmp_path / "storage", search=SEARCH, resources=RESOURCES)
    process = start("search", config, *options)
    output = finish(process)
    assert process.returncode == code and line in output and "Traceback" not in output.replace("traceback:", "")
    assert not (tmp_path / "storage" / "searches").exists() and not (tmp_path / "storage" / "corpus").exists()
