"""A real search on the tiny pipeline's scores, its workers on all CPUs of two; killed and gone on with."""

from __future__ import annotations

import signal
import subprocess
import threading
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from cdm.config import load_config
from cdm.journal import run_facts, run_folders, run_series
from tests.whole import CONFIG, finish, start, students, without_the_student, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

SPACE = {"student.learning_rate": {"type": "choice", "values": [1e-2, 1e-5, 1e-6]}}
SEARCH = {"space": SPACE, "searcher": "grid", "grace_steps": 4, "seeds": 2}


def kill(process: subprocess.Popen[str]) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    finish(process)


def scores(storage: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for stage in ("shards", "corpus") for path in (storage / stage).rglob("*")}


def test_a_killed_search_goes_on_and_scores_nothing(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """One trial of two seeds that finishes, two that the scheduler stops; the driver is killed while the first trains.

    A trial begins when the one before it was stopped: its workers have given back the CPUs, which are all there are.
    """
    storage = tmp_path / "storage"
    without_the_student(finished[0], storage)
    before = scores(storage)
    student = {**CONFIG["student"], "validate_every": 2}  # type: ignore[dict-item]
    config = write_config(tmp_path, storage, search=SEARCH, student=student)
    process = start("search", config)
    while not list((storage / "searches").glob("*/trials/*/run-0/step_*")):
        assert process.poll() is None, finish(process)
        threading.Event().wait(0.05)
    kill(process)
    (begun,) = (path.name for path in (storage / "searches").glob("*/trials/*"))

    again = start("search", config)
    output = finish(again)
    assert again.returncode == 0, output
    assert "have score teacher" in output and "done score" not in output and scores(storage) == before
    assert "Traceback" not in output and "Warning" not in output
    (folder,) = (storage / "searches").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "best.yaml", "trials.csv", "trials.parquet", "importance.json",
    }, "no checkpoint is left"  # fmt: skip
    best, other, last = pq.read_table(folder / "trials.parquet").to_pylist()
    states = [(row["state"], row["step"]) for row in (best, other, last)]
    assert states == [("finished", 8), ("stopped", 4), ("stopped", 4)]
    assert best["spread"] > 0 and other["spread"] is None
    assert best["trial"] == begun and best["validation_bits_per_byte"] < other["validation_bits_per_byte"]
    assert load_config(folder / "best.yaml").student.learning_rate == 1e-2

    runs = {facts.run["name"]: facts for facts in map(run_facts, run_folders(str(storage)))}
    for row in (best, other, last):
        trial = runs[f"trial {row['trial']}"]
        assert (trial.status, trial.run["parent"]) == ("FINISHED", Path(runs["tiny"].folder).name)
        steps = [step for step, _ in run_series(trial.folder)["loss"]]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= row["step"], "no step is lost or twice"
    assert runs[f"trial {other['trial']}"].tags["cdm.stopped"] == "at step 4"
    seed = runs[f"trial {best['trial']}-seed1"]
    assert (seed.status, seed.run["parent"]) == ("FINISHED", Path(runs[f"trial {best['trial']}"].folder).name)

    once_more = finish(start("search", config, "--retrain", "8"))
    assert "have search" in once_more and "have train cdm" in once_more, "it is the best trial's student"
    table = output[output.index("Trials") : output.index("best config")]
    assert table in once_more
    assert len([path for path in students(storage) if "-cdm-" in path.name]) == 1
    assert yaml.safe_load((folder / "best.yaml").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--set", "search.max_concurrent=9"], 1, "the workers of 9 trials at once need 18 CPU"),
        (["--set", "search.metric=loss"], 2, "search.metric: 'loss' is not known; one of validation_bits_per_byte"),
    ],
)
def test_what_can_never_work_is_said_at_once(tmp_path: Path, options: list[str], code: int, line: str) -> None:
    process = start("search", write_config(tmp_path, tmp_path / "storage", search=SEARCH), *options)
    output = finish(process)
    assert process.returncode == code and line in output and "Traceback" not in output
    assert not (tmp_path / "storage" / "searches").exists() and not (tmp_path / "storage" / "corpus").exists()
