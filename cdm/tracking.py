"""MLflow, behind a Tracker that is passed in. The driver creates every run; workers get its id and never make one.

A run is found again by its identity, so that a stage that goes on after a kill goes on in its own run, and steps that
were logged before the kill are not logged twice.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from cdm.config import AnyTracking, Config, NoTracking, storage_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

for _name in ("mlflow.store.db.utils", "alembic"):  # they tell of every table they make
    logging.getLogger(_name).setLevel(logging.WARNING)

FLUSH_SECONDS = 5.0
BATCH = 900  # MLflow takes 1,000 metrics and 100 parameters a call


@dataclass(frozen=True)
class RunRef:
    """What a worker needs to log into a run that the driver made."""

    uri: str
    run_id: str


class Tracker(Protocol):
    """One run's log."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def params(self, values: dict[str, Any]) -> None: ...
    def tags(self, values: dict[str, str]) -> None: ...
    def table(self, name: str, columns: dict[str, list[Any]]) -> None: ...
    def text(self, name: str, text: str) -> None: ...
    def figure(self, name: str, figure: Figure) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: str = "FINISHED") -> None: ...


class NullTracker:
    """Logs nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def params(self, values: dict[str, Any]) -> None: ...
    def tags(self, values: dict[str, str]) -> None: ...
    def table(self, name: str, columns: dict[str, list[Any]]) -> None: ...
    def text(self, name: str, text: str) -> None: ...
    def figure(self, name: str, figure: Figure) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: str = "FINISHED") -> None: ...


class MlflowTracker:
    """Logs into an existing run, metrics in batches. Steps that the run has already are left out.

    `flush` may be called from another thread than the rest.
    """

    def __init__(self, ref: RunRef) -> None:
        self.ref = ref
        self._client = MlflowClient(ref.uri)
        self._pending: deque[Metric] = deque()
        self._flushing = threading.Lock()
        self._flushed = time.monotonic()
        self._known = set(self._client.get_run(ref.run_id).data.metrics)
        self._last: dict[str, int] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        for name, value in values.items():
            if step > self._last_step(name):
                self._pending.append(Metric(name, value, now, step))
                self._last[name] = step
        if len(self._pending) >= BATCH - 100 or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _last_step(self, name: str) -> int:
        if name not in self._last:
            history = self._client.get_metric_history(self.ref.run_id, name) if name in self._known else []
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]

    def flush(self) -> None:
        """Sends what is pending."""
        with self._flushing:
            while self._pending:
                batch = [self._pending.popleft() for _ in range(min(BATCH, len(self._pending)))]
                self._client.log_batch(self.ref.run_id, metrics=batch)
            self._flushed = time.monotonic()

    def params(self, values: dict[str, Any]) -> None:
        known = self._client.get_run(self.ref.run_id).data.params
        new = [Param(name, str(value)[:6000]) for name, value in flatten(values).items() if name not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self.ref.run_id, params=new[start : start + 100])

    def tags(self, values: dict[str, str]) -> None:
        self._client.log_batch(self.ref.run_id, tags=[RunTag(name, value) for name, value in values.items()])

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        file = f"{name}.json"
        if file not in {artifact.path for artifact in self._client.list_artifacts(self.ref.run_id)}:  # MLflow appends
            self._client.log_table(self.ref.run_id, columns, file)

    def text(self, name: str, text: str) -> None:
        self._client.log_text(self.ref.run_id, text, name)

    def figure(self, name: str, figure: Figure) -> None:
        self._client.log_figure(self.ref.run_id, figure, name)

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is pending and ends the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self._client.set_terminated(self.ref.run_id, status)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections and lists as dotted names: `teachers.0.top_k`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(items, dict):
            flat |= flatten({str(k): v for k, v in items.items()}, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = items
    return flat


class Experiment:
    """Where the runs of a config go. Made once, by the driver: parallel first starts race the database's migration."""

    def __init__(self, config: Config) -> None:
        section: AnyTracking = config.tracking
        if isinstance(section, NoTracking):
            self._client = None
            return
        self.uri = tracking_uri(config)
        self._client = MlflowClient(self.uri)
        found = self._client.get_experiment_by_name(section.experiment)
        artifacts = None if section.uri else f"{storage_path(config)}/mlartifacts"
        self._id = found.experiment_id if found else self._client.create_experiment(section.experiment, artifacts)

    def run(self, stage: str, name: str, identity: str, parent: Tracker | None = None) -> Tracker:
        """The run of this stage and identity: the one there is, reopened, or a new one below `parent`."""
        if self._client is None:
            return NullTracker()
        tags = {"cdm.stage": stage, "cdm.identity": identity}
        if isinstance(parent, MlflowTracker):
            tags[MLFLOW_PARENT_RUN_ID] = parent.ref.run_id
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([self._id], wanted, max_results=1)
        run = found[0] if found else self._client.create_run(self._id, tags=tags, run_name=name)
        if found:
            self._client.update_run(run.info.run_id, status="RUNNING")
        return MlflowTracker(RunRef(self.uri, run.info.run_id))


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


def open_run(ref: RunRef | None) -> Tracker:
    """A worker's end of a run that the driver made."""
    return NullTracker() if ref is None else MlflowTracker(ref)
