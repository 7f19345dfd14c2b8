"""MLflow on a real sqlite database: runs found again, nothing logged twice, nested by tags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cdm.config import Config, parse_config
from cdm.tracking import Experiment, MlflowTracker, NullTracker, flatten, open_run, tracking_uri
from tests.whole import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(CONFIG | {"storage": str(tmp_path)})


def client(config: Config) -> MlflowClient:
    return MlflowClient(tracking_uri(config))


def test_a_run_is_found_again_by_its_identity(config: Config) -> None:
    first = Experiment(config).run("train", "train cdm", "abc")
    first.close()
    again = Experiment(config).run("train", "train cdm", "abc")
    other = Experiment(config).run("train", "train cdm", "abd")
    assert isinstance(first, MlflowTracker) and isinstance(again, MlflowTracker) and isinstance(other, MlflowTracker)
    assert again.ref == first.ref != other.ref
    assert client(config).get_run(first.ref.run_id).info.status == "RUNNING"
    again.close("FAILED")
    assert client(config).get_run(first.ref.run_id).info.status == "FAILED"


def test_steps_that_were_logged_are_not_logged_again(config: Config) -> None:
    run = Experiment(config).run("train", "train cdm", "abc")
    assert isinstance(run, MlflowTracker)
    for step in (1, 2, 3):
        run.metrics(step, {"loss": float(step)})
    run.close()
    resumed = open_run(run.ref)  # as a worker does after a restart from the checkpoint of step 1
    for step in (2, 3, 4):
        resumed.metrics(step, {"loss": 10.0 * step, "validation": 1.0})
    resumed.close()
    history = client(config).get_metric_history(run.ref.run_id, "loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert len(client(config).get_metric_history(run.ref.run_id, "validation")) == 3


def test_more_metrics_than_one_call_takes_all_arrive(config: Config) -> None:
    run = Experiment(config).run("train", "train cdm", "abc")
    assert isinstance(run, MlflowTracker)
    for step in range(300):
        run.metrics(step, {f"m{i}": float(step) for i in range(7)})
    run.close()
    assert len(client(config).get_metric_history(run.ref.run_id, "m6")) == 300


def test_stages_hang_below_the_pipeline_and_tables_are_kept_once(config: Config) -> None:
    experiment = Experiment(config)
    parent = experiment.run("pipeline", "tiny", "p")
    child = experiment.run("score", "score teacher", "s", parent)
    assert isinstance(parent, MlflowTracker) and isinstance(child, MlflowTracker)
    parent.params(config.model_dump(mode="json"))
    parent.params(config.model_dump(mode="json"))
    for _ in range(2):
        parent.table("results", {"model": ["a", "b"], "bits per byte": [1.5, None]})
    tags = client(config).get_run(child.ref.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.ref.run_id and tags["cdm.stage"] == "score"
    run = client(config).get_run(parent.ref.run_id)
    assert run.data.params["student.learning_rate"] == "0.0001" and run.data.params["teachers.0.top_k"] == "20"
    file = client(config).download_artifacts(run.info.run_id, "results.json")
    table = json.loads(Path(file).read_text(encoding="utf-8"))
    assert table == {"columns": ["model", "bits per byte"], "data": [["a", 1.5], ["b", None]]}


def test_without_tracking_nothing_is_made(config: Config, tmp_path: Path) -> None:
    quiet = parse_config(CONFIG | {"storage": str(tmp_path), "tracking": {"type": "none"}})
    run = Experiment(quiet).run("train", "train cdm", "abc")
    assert isinstance(run, NullTracker) and isinstance(open_run(None), NullTracker)
    run.metrics(1, {"loss": 1.0})
    run.close()
    assert not (tmp_path / "mlflow.db").exists()
    with pytest.raises(ValueError, match="type is none"):
        tracking_uri(quiet)


def test_flatten_names_lists_by_position() -> None:
    assert flatten({"a": [{"b": 1}, {"b": 2}], "c": {"d": None}}) == {"a.0.b": 1, "a.1.b": 2, "c.d": None}
