"""A real `mlflow server` on loopback, over sqlite and over PostgreSQL: away at first, then there.

What was kept is sent, artefacts and registry too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from cdm import tracking
from cdm.config import Config, parse_config
from cdm.journal import open_run
from cdm.tracking import CHAMPION, Experiment
from tests.postgres import postgresql
from tests.whole import CONFIG

pytestmark = pytest.mark.slow


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the server keeps runs: the URI of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/server.db"
    else:
        with postgresql() as uri:
            yield uri


@contextmanager
def server(folder: Path, store: str, port: int) -> Iterator[None]:
    options = ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", *options, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, env=dict(os.environ))
        try:
            while not answers(port):
                assert process.poll() is None, (folder / "server.log").read_text()
                threading.Event().wait(0.1)
            yield
        finally:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
            process.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def say(config: Config, folder: Path) -> None:
    """What a command with a training run and a student says."""
    with Experiment(config) as experiment:
        parent = experiment.run("pipeline", "tiny", "p")
        run = experiment.run("train", "train cdm", "abc", parent.ref)
        worker = open_run(run.ref)
        for step in (1, 2, 3):
            worker.metrics(step, {"loss": 1.0 / step})
        parent.text("overview.html", "<html></html>")
        parent.folder("student", str(folder))
        parent.model("tiny", str(folder), 2.5)
        run.close()
        parent.close()


def test_what_a_server_missed_is_sent_when_it_is_there(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    config = parse_config(CONFIG | {"storage": str(tmp_path / "storage"), "tracking": {"type": "mlflow", "uri": uri}})
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text("{}")
    say(config, student)
    assert "2 runs are kept in" in capsys.readouterr().out
    with server(tmp_path, store, port):
        say(config, student)
        assert "kept in" not in capsys.readouterr().out
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("cdm")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert {run.info.status for run in runs.values()} == {"FINISHED"} and set(runs) == {"tiny", "train cdm"}
        history = client.get_metric_history(runs["train cdm"].info.run_id, "loss")
        assert sorted(metric.step for metric in history) == [1, 2, 3]
        assert {file.path for file in client.list_artifacts(runs["tiny"].info.run_id)} == {"overview.html", "student"}
        champion = client.get_model_version_by_alias("tiny", CHAMPION)
        assert champion.run_id == runs["tiny"].info.run_id
        got = client.download_artifacts(champion.run_id, "student", str(tmp_path))
        assert (Path(got) / "config.json").read_text() == "{}"
