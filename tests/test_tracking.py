"""Runs' logs on disk, and MLflow on a real sqlite database and behind a port where nobody answers."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cdm import tracking
from cdm.config import Config, parse_config
from cdm.journal import (
    Journal,
    NullTracker,
    RunRef,
    closing,
    flatten,
    open_run,
    read_events,
    run_facts,
    run_folders,
    run_series,
)
from cdm.tracking import Experiment, Sender, code_version, system_metrics, tracking_uri
from tests.whole import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(CONFIG | {"storage": str(tmp_path)})


def client(config: Config) -> MlflowClient:
    return MlflowClient(tracking_uri(config))


def sent(config: Config) -> dict[str, Any]:
    """MLflow's runs by name, after what the logs hold was sent."""
    with Experiment(config):
        pass
    found = client(config)
    experiment = found.get_experiment_by_name("cdm")
    return {run.info.run_name: run for run in found.search_runs([experiment.experiment_id])}


# --- the log -----------------------------------------------------------------------------------------------------


def test_a_run_is_found_again_by_its_identity(config: Config) -> None:
    first = Experiment(config).run("train", "train cdm", "abc")
    first.close()
    again = Experiment(config).run("train", "train cdm", "abc")
    other = Experiment(config).run("train", "train cdm", "abd")
    assert again.ref == first.ref != other.ref
    assert run_facts(first.ref.folder).status == "RUNNING"
    again.close("FAILED")
    assert run_facts(first.ref.folder).status == "FAILED"
    assert (
        sent(config)["train cdm"].info.status in ("FAILED", "RUNNING") and len(list(run_folders(config.storage))) == 2
    )


def test_steps_that_were_logged_are_not_logged_again(config: Config) -> None:
    run = Experiment(config).run("train", "train cdm", "abc")
    worker = open_run(run.ref)
    for step in (1, 2, 3):
        worker.metrics(step, {"loss": float(step)})
    resumed = open_run(run.ref)  # as a worker does after a restart from the checkpoint of step 1
    for step in (2, 3, 4):
        resumed.metrics(step, {"loss": 10.0 * step, "validation": 1.0})
    assert run_series(run.ref.folder) == {
        "loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)],
        "validation": [(2, 1.0), (3, 1.0), (4, 1.0)],
    }


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_of_a_killed_writer_is_as_if_never_written(tmp_path: Path, cut: int) -> None:
    ref = RunRef(str(tmp_path))
    worker = Journal(ref, "worker")
    for step in (1, 2):
        worker.metrics(step, {"loss": 1.0})
    file = tmp_path / "worker.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    events, offset = read_events(file)
    assert len(events) == 1 and offset < file.stat().st_size
    again = Journal(ref, "worker")
    again.metrics(2, {"loss": 2.0})
    assert run_series(str(tmp_path))["loss"] == [(1, 1.0), (2, 2.0)]
    assert read_events(file, offset)[0][0]["metrics"] == {"step": 2, "values": {"loss": 2.0}}


def test_a_run_ends_as_what_it_was(config: Config) -> None:
    for error, status in ((None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")):
        run = Experiment(config).run("train", "train", status)
        try:
            with closing(run):
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError) as raised:
            assert type(raised) is error
        assert run_facts(run.ref.folder).status == status


def test_only_the_first_worker_logs() -> None:
    tracker = open_run(None)
    assert isinstance(tracker, NullTracker)
    tracker.metrics(1, {"loss": 1.0})
    tracker.flush()


def test_flatten_names_lists_by_position() -> None:
    assert flatten({"a": [{"b": 1}, {"b": 2}], "c": {"d": None}}) == {"a.0.b": 1, "a.1.b": 2, "c.d": None}


def test_system_metrics_go_on_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        worker = Journal(RunRef(str(tmp_path)), "worker")
        before = worker.last_steps.get("system/cpu_utilization_percentage", -1)
        with system_metrics(worker, seconds=0.01):
            while worker.last_steps.get("system/cpu_utilization_percentage", -1) < before + 2:
                time.sleep(0.001)
    series = run_series(str(tmp_path))
    steps = [step for step, _ in series["system/cpu_utilization_percentage"]]
    assert steps == list(range(len(steps))) and len(steps) >= 4
    assert all(value > 0 for _, value in series["system/system_memory_usage_megabytes"])


# --- sent --------------------------------------------------------------------------------------------------------


def test_all_that_a_run_says_arrives_once_however_often_it_is_sent(config: Config) -> None:
    experiment = Experiment(config)
    parent = experiment.run("pipeline", "tiny", "p")
    child = experiment.run("score", "score teacher", "s", parent.ref)
    parent.params(config.model_dump(mode="json"))
    worker = open_run(child.ref)
    for step in range(300):
        worker.metrics(step, {f"m{i}": float(step) for i in range(7)})
    for _ in range(2):
        parent.table("results", {"model": ["a", "b"], "bits per byte": [1.5, None]})
    child.tags({"cdm.shards": "there"})
    child.dataset("corpus", "f" * 64, "/storage/corpus/abc", "scoring")
    child.close()
    first = sent(config)
    parent.params(config.model_copy(update={"storage": "elsewhere"}).model_dump(mode="json"))
    for state in Path(config.storage, "tracking").glob("*/sent-*.json"):  # as if killed between sending and noting it
        state.unlink()
    again = sent(config)
    assert {name: run.info.run_id for name, run in first.items()} == {n: run.info.run_id for n, run in again.items()}
    score, top = again["score teacher"], again["tiny"]
    assert score.data.tags["mlflow.parentRunId"] == top.info.run_id and score.data.tags["cdm.shards"] == "there"
    assert (score.info.status, top.info.status) == ("FINISHED", "RUNNING")
    assert [(one.dataset.name, one.dataset.digest) for one in score.inputs.dataset_inputs] == [("corpus", "f" * 36)]
    assert top.data.params["student.learning_rate"] == "0.0001" and top.data.params["storage"] == config.storage
    history = client(config).get_metric_history(score.info.run_id, "m6")
    assert sorted(metric.step for metric in history) == list(range(300))
    file = client(config).download_artifacts(top.info.run_id, "results.json")
    table = json.loads(Path(file).read_text(encoding="utf-8"))
    assert table == {"columns": ["model", "bits per byte"], "data": [["a", 1.5], ["b", None]]}


def test_the_champion_is_the_best_student(config: Config, tmp_path: Path) -> None:
    experiment = Experiment(config)
    for name, quality in (("first", 2.5), ("better", 2.25), ("worse", 2.75)):
        folder = tmp_path / "students" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        run = experiment.run("train", name, name)
        run.folder("student", str(folder))
        run.model("tiny", str(folder), quality)
        runs = sent(config)
        run.model("tiny", str(folder), quality)  # a command that finds all done says it again
        sent(config)
    found = client(config)
    assert len(found.search_model_versions("name = 'tiny'")) == 3
    champion = found.get_model_version_by_alias("tiny", tracking.CHAMPION)
    assert champion.tags["cdm.folder"] == str(tmp_path / "students" / "better")
    assert [artifact.path for artifact in found.list_artifacts(runs["better"].info.run_id, "student")] == [
        "student/config.json"
    ]


def test_a_server_that_is_away_is_waited_for_by_nobody(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens at the port: the run is kept, the command says so, and the next one sends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    away = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": f"http://127.0.0.1:{port}"})}
    )
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.05)
    with Experiment(away) as experiment:
        run = experiment.run("train", "train cdm", "abc")
        worker = open_run(run.ref)
        for step in (1, 2):
            worker.metrics(step, {"loss": 0.5})
        run.close()
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"127.0.0.1:{port}" in said and "1 runs are kept in" in said and "the next command sends them" in said
    assert run_series(run.ref.folder) == {"loss": [(1, 0.5), (2, 0.5)]}
    there = sent(config)["train cdm"]
    assert there.info.status == "FINISHED" and there.data.metrics == {"loss": 0.5}


def test_a_server_that_hangs_ends_no_command_later_than_said(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.2)
    with socket.socket() as deaf:  # takes connections, never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        uri = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        experiment = Experiment(config)
        experiment.run("train", "train cdm", "abc").close()
        sender = Sender(config.storage, uri, config.tracking)  # type: ignore[arg-type]
        sender.start()
        sender.close()
    assert "no answer within 0.2 s" in capsys.readouterr().out


def test_without_tracking_the_log_is_kept_and_sent_nowhere(tmp_path: Path) -> None:
    quiet = parse_config(CONFIG | {"storage": str(tmp_path), "tracking": {"type": "none"}})
    with Experiment(quiet) as experiment:
        experiment.run("train", "train cdm", "abc").close()
    assert not (tmp_path / "mlflow.db").exists() and len(list(run_folders(str(tmp_path)))) == 1
    with pytest.raises(ValueError, match="type is none"):
        tracking_uri(quiet)


def test_the_code_is_named_where_it_is_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = code_version()
    assert found == {} or (len(found["cdm.commit"]) == 40 and found["cdm.dirty"] in ("true", "false"))
    monkeypatch.setattr(tracking.shutil, "which", lambda name: None)
    assert code_version() == {}
