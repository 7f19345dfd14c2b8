"""A real `ray start --head` on loopback: the pipeline submitted as a job, its status, logs and exit code."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cdm.config import load_config
from ray_jobs.cluster import IN_JOB
from ray_jobs.pipeline import preflight
from tests.whole import ROOT, runs, students, without_the_student, write_config

pytestmark = pytest.mark.slow

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh head node, with token authentication on."""
    # Not below pytest's own folder: the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        token.chmod(0o600)
        dashboard, gcs = free_port(), free_port()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": folder,
        }
        options = [f"--port={gcs}", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--dashboard-port={dashboard}"]
        options += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--object-store-memory={200 * 2**20}"]
        command = [*RAY, "start", "--head", *options, "--disable-usage-stats", "--block"]
        with open(Path(folder) / "head.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            addresses = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "GCS": f"127.0.0.1:{gcs}"}
            client = environment | addresses
            wait_for_the_job_server(client, process, log.name)
            yield client
        finally:
            with suppress(psutil.NoSuchProcess):
                for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                    child.kill()
            process.wait(60)


def wait_for_the_job_server(client: dict[str, str], process: subprocess.Popen[bytes], log: str) -> None:
    for _ in range(60):
        done = subprocess.run([*RAY, "job", "list"], env=client, capture_output=True, check=False, timeout=120)
        if done.returncode == 0:
            return
        assert process.poll() is None, Path(log).read_text(encoding="utf-8")
    raise AssertionError(done.stderr.decode())


def submit(client: dict[str, str], folder: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Submits from the project's files alone and waits; the finished client and the job's id."""
    name = f"job-{secrets.token_hex(4)}"
    options = ["--working-dir", str(ROOT), "--submission-id", name, "--runtime-env-json"]
    excludes = '{"excludes": [".venv", ".git", "outputs", ".hypothesis", ".mypy_cache", ".pytest_cache"]}'
    full = [*RAY, "job", "submit", *options, excludes, "--", *command]
    done = subprocess.run(full, env=client, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    return done, name


def test_a_submitted_pipeline_ends_with_its_table(
    head: dict[str, str], finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    without_the_student(finished[0], tmp_path / "storage")
    config = write_config(tmp_path, tmp_path / "storage")
    done, name = submit(head, tmp_path, sys.executable, "-m", "ray_jobs.pipeline", config)
    assert done.returncode == 0, done.stdout + done.stderr
    status = subprocess.run([*RAY, "job", "status", name], env=head, capture_output=True, text=True, check=True)
    assert "succeeded" in (status.stdout + status.stderr).lower()
    logs = subprocess.run([*RAY, "job", "logs", name], env=head, capture_output=True, text=True, check=True).stdout
    for text in ("have score teacher", "done train cdm", "bits per byte", "student, cdm"):
        assert text in logs
    assert any("-cdm-" in folder.name for folder in students(tmp_path / "storage"))
    assert runs(tmp_path / "storage")["tiny"].info.status == "FINISHED"


def test_a_failing_job_says_why_and_fails(head: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "storage")
    done, name = submit(
        head, tmp_path, sys.executable, "-m", "ray_jobs.pipeline", config, "--set", "student.learning_rat=1"
    )
    assert done.returncode != 0
    status = subprocess.run([*RAY, "job", "status", name], env=head, capture_output=True, text=True, check=False)
    assert "failed" in (status.stdout + status.stderr).lower()
    assert re.search(r"exit code 2\b", status.stdout + status.stderr + done.stdout + done.stderr)
    logs = subprocess.run([*RAY, "job", "logs", name], env=head, capture_output=True, text=True, check=False).stdout
    assert "student.learning_rat: unknown key; did you mean learning_rate?" in logs


def test_a_job_with_a_relative_storage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_JOB, "{}")
    config = load_config(write_config(tmp_path, tmp_path / "storage"), ["storage=outputs"])
    (problem,) = preflight(config)
    assert "outputs would be lost with the job's working directory" in problem


def test_a_client_without_the_token_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    stranger = {key: value for key, value in head.items() if "AUTH" not in key} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [*RAY, "job", "submit", "--", "true"], env=stranger, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0 and re.search("401|[Uu]nauth|token", done.stdout + done.stderr)


def test_a_driver_without_the_token_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    stranger = {key: value for key, value in head.items() if "AUTH" not in key} | {"HOME": str(tmp_path)}
    program = "import os, ray; ray.init(os.environ['GCS']); print('let in')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=stranger, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0 and "let in" not in done.stdout and "Failed to connect to Ray cluster" in done.stderr
