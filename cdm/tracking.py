"""MLflow: the logs that runs keep on disk (`cdm.journal`), sent to a server by a thread of the driver.

Nothing else talks to MLflow, so a server that is slow or away stalls nobody, only one process ever opens the database,
and what was not sent is sent by the next command in the same storage folder. Sending twice changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the sender itself tries again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from cdm import parts
from cdm.config import Config, Mlflow, NoTracking, digest, storage_path
from cdm.journal import FOLDER, Journal, RunRef, read_events, run_facts, run_folders
from cdm.progress import console

for _name in ("mlflow.store.db.utils", "alembic"):  # they tell of every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

POLL_SECONDS = 2.0
LAST_SECONDS = 30.0  # at the end of a command: no longer is waited for a server
BATCH = 900  # MLflow takes 1,000 metrics and 100 parameters or tags a call
CHAMPION = "champion"
FAULTS = (MlflowException, OSError)  # OSError: requests' errors too


class Experiment:
    """The runs of a config. Made once, by the driver; as a context it sends what the runs say until its end."""

    def __init__(self, config: Config) -> None:
        self._storage = storage_path(config)
        section = config.tracking
        self._sender = Sender(self._storage, tracking_uri(config), section) if isinstance(section, Mlflow) else None

    def run(self, stage: str, name: str, identity: str, parent: RunRef | None = None) -> Journal:
        """The run of this stage and identity: the one there is, reopened, or a new one below `parent`."""
        journal = Journal(RunRef(f"{self._storage}/{FOLDER}/{stage}-{identity}"))
        if not run_facts(journal.ref.folder).run:
            above = Path(parent.folder).name if parent else None
            journal.write("run", {"stage": stage, "name": name, "identity": identity, "parent": above})
        journal.write("status", "RUNNING")
        return journal

    def __enter__(self) -> Experiment:
        if self._sender is not None:
            self._sender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sender is not None:
            self._sender.close()


def tracking_uri(config: Config) -> str:
    """The config's server, or the sqlite database in its storage folder (made here).

    Raises ValueError where nothing is tracked.
    """
    section, storage = config.tracking, storage_path(config)
    if isinstance(section, NoTracking):
        raise ValueError("tracking.type is none: there are no runs to show")
    if section.uri:
        return section.uri
    Path(storage).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{storage}/mlflow.db"


def code_version() -> dict[str, str]:
    """Tags of the code that runs: its commit, and whether files differ from it; none where it is no git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    commit, changes = (
        subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    if commit.returncode or changes.returncode:  # a checkout of another user, say
        return {}
    return {"cdm.commit": commit.stdout.strip(), "cdm.dirty": str(bool(changes.stdout.strip())).lower()}


# --- sending -----------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """How far a run's log has been sent to one server: its run there, and a byte offset a file."""

    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)


class Sender:
    """Sends the logs of a storage folder's runs to one MLflow server, in a thread, until it is closed."""

    def __init__(self, storage: str, uri: str, section: Mlflow) -> None:
        self._storage, self._uri, self._section = storage, uri, section
        self._state_name = f"sent-{digest(uri)[:12]}.json"  # another server gets everything
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)  # daemon: a server that hangs holds nobody
        self._problem: str | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Sends what is left; says so where the server does not take it in time."""
        self._stop.set()
        self._thread.join(None if self._uri.startswith("sqlite:") else LAST_SECONDS)  # our own file always answers
        waiting = [folder for folder in run_folders(self._storage) if self._unsent(folder)]
        if waiting:
            reason = self._problem or f"no answer within {LAST_SECONDS:g} s"
            self._say(
                f"{len(waiting)} runs are kept in {self._storage}/{FOLDER}, the next command sends them: {reason}"
            )

    def _run(self) -> None:
        client: MlflowClient | None = None
        last = False
        while not last:
            last = self._stop.wait(POLL_SECONDS)  # whoever closes has written all it has to say
            try:
                client = client or MlflowClient(self._uri)
                experiment = _experiment_id(client, self._section, self._storage)
                for folder in run_folders(self._storage):
                    if self._unsent(folder):
                        self._send(client, experiment, folder)
                self._problem = None
            except FAULTS as error:
                first = self._problem is None
                self._problem = " ".join(str(error).split())[:200]
                if first and not last:
                    self._say(f"no answer, runs are kept in {self._storage}/{FOLDER} until there is: {self._problem}")

    def _say(self, text: str) -> None:
        console.print(f"[yellow]MLflow[/yellow] {self._uri}: ", end="", soft_wrap=True)
        console.print(text, markup=False, soft_wrap=True)

    def _state(self, folder: str) -> Sent:
        file = Path(folder, self._state_name)
        return Sent(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else Sent()

    def _unsent(self, folder: str) -> bool:
        offsets = self._state(folder).offsets
        return any(path.stat().st_size > offsets.get(path.name, 0) for path in Path(folder).glob("*.jsonl"))

    def _send(self, client: MlflowClient, experiment: str, folder: str) -> None:
        sent = self._state(folder)
        sent.run_id = sent.run_id or self._run_id(client, experiment, folder)
        events: list[dict[str, Any]] = []
        for path in sorted(Path(folder).glob("*.jsonl")):
            new, sent.offsets[path.name] = read_events(path, sent.offsets.get(path.name, 0))
            events += new
        send_events(client, sent.run_id, events)
        parts.write_bytes(folder, self._state_name, json.dumps(vars(sent)).encode())

    def _run_id(self, client: MlflowClient, experiment: str, folder: str) -> str:
        """The run on the server: found by its tags, else made, its parent before it."""
        run = run_facts(folder).run
        tags = {"cdm.stage": run["stage"], "cdm.identity": run["identity"]}
        if run["parent"]:
            above = str(Path(folder).with_name(run["parent"]))
            parent = self._state(above)
            if parent.run_id is None:
                parent.run_id = self._run_id(client, experiment, above)
                parts.write_bytes(above, self._state_name, json.dumps(vars(parent)).encode())
            tags[MLFLOW_PARENT_RUN_ID] = parent.run_id
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([experiment], wanted, max_results=1)
        return str((found[0] if found else client.create_run(experiment, tags=tags, run_name=run["name"])).info.run_id)


def _experiment_id(client: MlflowClient, section: Mlflow, storage: str) -> str:
    found = client.get_experiment_by_name(section.experiment)
    artifacts = None if section.uri else f"{storage}/mlartifacts"
    return str(found.experiment_id if found else client.create_experiment(section.experiment, artifacts))


def send_events(client: MlflowClient, run_id: str, events: list[dict[str, Any]]) -> None:
    """Events of one run, in calls as large as MLflow takes; the state of the run comes last."""
    known = client.get_run(run_id).data.params if any("params" in event for event in events) else {}
    metrics: list[Metric] = []
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}
    status: str | None = None
    for event in events:
        params |= event.get("params", {})
        tags |= event.get("tags", {})
        status = event.get("status", status)
        logged = event.get("metrics", {"values": {}})
        metrics += [Metric(name, value, event["time"], logged["step"]) for name, value in logged["values"].items()]
    new = [Param(name, str(value)[:6000]) for name, value in params.items() if name not in known]
    for some in _batches(metrics, BATCH):
        client.log_batch(run_id, metrics=some)
    for some in _batches(new, 100):
        client.log_batch(run_id, params=some)
    for some in _batches([RunTag(name, value) for name, value in tags.items()], 100):
        client.log_batch(run_id, tags=some)
    _send_artifacts(client, run_id, events)
    if status is not None:
        ended = status != "RUNNING"
        client.set_terminated(run_id, status) if ended else client.update_run(run_id, status=status)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _send_artifacts(client: MlflowClient, run_id: str, events: list[dict[str, Any]]) -> None:
    tables = {event["table"]["name"]: event["table"]["columns"] for event in events if "table" in event}
    there = {artifact.path for artifact in client.list_artifacts(run_id)} if tables else set()
    for name, columns in tables.items():
        if name not in there:  # MLflow appends to a table
            client.log_table(run_id, columns, name)
    files = {(e["artifact"]["path"], e["artifact"].get("to")): None for e in events if "artifact" in e}
    for path, to in files:
        if Path(path).is_dir():
            client.log_artifacts(run_id, path, to)
        elif Path(path).exists():
            client.log_artifact(run_id, path, to)
    inputs = [event["dataset"] for event in events if "dataset" in event]
    if inputs:
        client.log_inputs(run_id, [_dataset(**one) for one in inputs])
    for event in events:
        if "model" in event:
            _register(client, run_id, **event["model"])


def _dataset(name: str, digest: str, source: str, context: str) -> DatasetInput:
    dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": source}))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _register(client: MlflowClient, run_id: str, name: str, folder: str, quality: float) -> None:
    """A version a student's folder; `champion` is the one of the lowest bits per byte, the newest of equals."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((one for one in versions if one.tags.get("cdm.folder") == folder), None)
    if version is None:
        tags = {"cdm.folder": folder, "cdm.bits_per_byte": f"{quality:.6f}"}
        source = f"{client.get_run(run_id).info.artifact_uri}/student"
        version = client.create_model_version(name, source, run_id, tags=tags)
    best = min((float(one.tags["cdm.bits_per_byte"]) for one in versions), default=quality)
    if quality <= best:
        client.set_registered_model_alias(name, CHAMPION, version.version)


@contextmanager
def system_metrics(tracker: Any, seconds: float = 10.0) -> Iterator[None]:
    """Logs this node's processors, memory, disk, network and GPUs while the body runs, as MLflow itself names them."""
    if not isinstance(tracker, Journal):
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_sample, args=(tracker, seconds, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _sample(journal: Journal, seconds: float, stop: threading.Event) -> None:
    monitors = _monitors()
    while not stop.wait(seconds):
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        known = max((journal.last_steps.get(name, -1) for name in values), default=-1)
        journal.metrics(known + 1, values)


def _monitors() -> list[Any]:
    import torch
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    return [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *([GPUMonitor()] if torch.cuda.is_available() else [])]
