"""A run's log on disk: what there is to know of it, a line of JSON each, in the order it happened (layer 2).

Whatever a run says is written here first and nothing waits for a server: `cdm.tracking` sends it on. Each writer has a
file of its own in the run's folder: the driver, and the first worker of a training run, which may be on another node.

    STORAGE/tracking/<stage>-<identity>/{driver,worker}.jsonl, artifacts/
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tracking"  # in the storage folder
ARTIFACTS = "artifacts"
ONCE = ("table", "artifact", "dataset", "model")
Writer = Literal["driver", "worker"]
Series = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class RunRef:
    """What a worker needs to log into a run that the driver opened."""

    folder: str


class Tracker(Protocol):
    """One run's log, as a worker sees it."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...


class NullTracker:
    """Logs nothing: every worker but the first."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...


class Journal:
    """One writer's end of a run's log. Steps that it has already are left out, so a resumed run logs nothing twice."""

    def __init__(self, ref: RunRef, writer: Writer = "driver") -> None:
        self.ref = ref
        self._path = Path(ref.folder, f"{writer}.jsonl")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self._path)
        events = read_events(self._path)[0]
        self.last_steps = {name: series[-1][0] for name, series in _series(events).items()}
        self._said = {_canonical(event) for event in events}
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (as long as the run)
        self._lock = threading.Lock()  # system metrics come from a thread of their own

    def write(self, kind: str, values: Any) -> None:
        """One event. It is in the operating system's hands when this returns: it outlives the process."""
        with self._lock:
            self._file.write(json.dumps({"time": int(time.time() * 1000), kind: values}) + "\n")
            self._file.flush()

    def write_once(self, kind: str, values: Any) -> None:
        """An event that a command which finds all done does not say again."""
        event = _canonical({kind: values})
        if event not in self._said:
            self._said.add(event)
            self.write(kind, values)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        new = {name: value for name, value in values.items() if step > self.last_steps.get(name, -1)}
        if new:
            self.last_steps |= dict.fromkeys(new, step)
            self.write("metrics", {"step": step, "values": new})

    def params(self, values: dict[str, Any]) -> None:
        self.write("params", flatten(values))

    def tags(self, values: dict[str, str]) -> None:
        self.write("tags", values)

    def table(self, name: str, columns: dict[str, list[Any]]) -> None:
        self.write_once("table", {"name": f"{name}.json", "columns": columns})

    def text(self, name: str, text: str) -> None:
        file = self._artifact(name)
        file.write_text(text, encoding="utf-8")
        self.write("artifact", {"path": str(file)})

    def figure(self, name: str, figure: Figure) -> None:
        file = self._artifact(name)
        figure.savefig(file, dpi=150)
        self.write("artifact", {"path": str(file)})

    def folder(self, name: str, path: str) -> None:
        """A folder that exists elsewhere (an exported student), to be kept with the run as `name`."""
        self.write_once("artifact", {"path": path, "to": name})

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """What the run read: a folder with a manifest, by its fingerprint."""
        self.write_once("dataset", {"name": name, "digest": digest, "source": source, "context": context})

    def model(self, name: str, folder: str, quality: float) -> None:
        """A student for the registry; `quality` (bits per byte) decides whether it is the new champion."""
        self.write_once("model", {"name": name, "folder": folder, "quality": quality})

    def flush(self) -> None:
        """On the disk, not only in the operating system's hands."""
        os.fsync(self._file.fileno())

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self.write("status", status)
        self.flush()

    def _artifact(self, name: str) -> Path:
        file = Path(self.ref.folder, ARTIFACTS, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


@contextmanager
def closing(run: Journal) -> Iterator[None]:
    """Ends a stage's run as what it was: finished, failed, or killed by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        run.close("KILLED")
        raise
    except BaseException:
        run.close("FAILED")
        raise
    run.close()


def open_run(ref: RunRef | None) -> Tracker:
    """A worker's end of a run that the driver opened."""
    return NullTracker() if ref is None else Journal(ref, "worker")


# --- reading -----------------------------------------------------------------------------------------------------


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file from a byte on, and where the next one begins. No file: none."""
    if not path.exists():
        return [], 0
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def read_series(path: Path) -> Series:
    """A file's metrics by name: (step, value), in the order of the steps."""
    return _series(read_events(path)[0])


def _series(events: list[dict[str, Any]]) -> Series:
    series: Series = {}
    for logged in (event["metrics"] for event in events if "metrics" in event):
        for name, value in logged["values"].items():
            series.setdefault(name, []).append((logged["step"], value))
    return series


def _canonical(event: dict[str, Any]) -> str:
    """An event without its time, of the kinds that are said once; of others nothing."""
    said = {kind: values for kind, values in event.items() if kind in ONCE}
    return json.dumps(said, sort_keys=True)


def run_series(folder: str) -> Series:
    """A run's metrics by name, of all its writers."""
    found: Series = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for name, points in read_series(path).items():
            found[name] = sorted(found.get(name, []) + points)
    return found


@dataclass(frozen=True)
class RunFacts:
    """What a run's log says of it besides metrics."""

    folder: str
    run: dict[str, Any]
    params: dict[str, Any]
    tags: dict[str, str]
    datasets: tuple[dict[str, str], ...]
    status: str


def run_facts(folder: str) -> RunFacts:
    """A run's name, stage, identity and parent (`run`), parameters, tags, datasets and state. The last one counts."""
    run: dict[str, Any] = {}
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}
    datasets: dict[str, dict[str, str]] = {}
    status = "RUNNING"
    for event in read_events(Path(folder, "driver.jsonl"))[0]:
        run |= event.get("run", {})
        params |= event.get("params", {})
        tags |= event.get("tags", {})
        status = event.get("status", status)
        if "dataset" in event:
            datasets[event["dataset"]["name"]] = event["dataset"]
    return RunFacts(folder, run, params, tags, tuple(datasets.values()), status)


def run_folders(storage: str) -> Iterator[str]:
    """The folders of all runs of a storage folder."""
    for path in sorted(Path(storage, FOLDER).glob("*/driver.jsonl")):
        yield str(path.parent)


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


def _cut_torn_line(path: Path) -> None:
    """A writer that was killed may have left half a line: it was never there for a reader either."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
