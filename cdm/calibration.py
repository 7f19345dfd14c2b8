"""What earlier runs of a storage folder say about speed: rates and seconds, off their logs (layer 2)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm.config import Config, ConfigError, parse_config
from cdm.journal import Series, read_events, run_facts, run_folders, run_series

WARM_UP = 3  # steps whose time is that of compiling and of first allocations
NOT_ASKED = {"storage", "resources", "tracking", "search"}  # of a config: where it runs and what is searched


@dataclass(frozen=True)
class Record:
    """One finished stage. kind: scoring, training, evaluation; title: the stage's own (`train cdm`, `score NAME`).

    tokens_a_second: of one process (engine, worker), start-up left out; None: none was logged. seconds: of the whole
    stage, None where it was interrupted and went on. fixed: of them, those before and after the work.
    """

    kind: str
    title: str
    model: str
    method: str
    config: Config
    tokens_a_second: float | None
    seconds: float | None
    fixed: float | None


@dataclass(frozen=True)
class Records:
    """runs: finished stages with a run of their own. others: (config, title, seconds) of those within a pipeline's."""

    runs: tuple[Record, ...]
    others: tuple[tuple[Config, str, float], ...]

    def took(self, config: Config, title: str) -> float | None:
        """Seconds of the stage of this title in a finished run of just this config; None: there was none.

        A title may stand there twice (the alignment for a model that is pretrained, and the student's): the sum.
        """
        asked = config.model_dump(exclude=NOT_ASKED)
        timed = [(r.config, r.title, r.seconds) for r in self.runs if r.seconds is not None]
        every = [*timed, *self.others]
        same = [took for ran, name, took in every if name == title and ran.model_dump(exclude=NOT_ASKED) == asked]
        return sum(same) if same else None


def read_records(storages: Sequence[str], *, gpus: bool) -> Records:
    """Of all finished stages in these storage folders that ran with GPUs, or without."""
    runs: list[Record] = []
    others: list[tuple[Config, str, float]] = []
    for folder in (folder for storage in storages for folder in run_folders(storage)):
        facts = run_facts(folder)
        above = str(Path(folder).parent / facts.run.get("parent", "")) if facts.run.get("parent") else folder
        config = _config(above)
        if config is None or gpus != bool(config.resources.teacher.gpus or config.resources.student.gpus):
            continue
        if facts.run.get("parent") is None:
            others += [(config, name, value) for name, value in _seconds(run_series(folder))]
        elif facts.status == "FINISHED":
            runs += _records(folder, facts.run, facts.tags, config)
    return Records(tuple(runs), tuple(others))


def _seconds(series: Series) -> Iterator[tuple[str, float]]:
    for name, points in series.items():
        if name.startswith("seconds."):
            yield from ((name.removeprefix("seconds."), value) for _, value in points)


def _records(folder: str, run: dict[str, Any], tags: Mapping[str, str], config: Config) -> Iterator[Record]:
    series, seconds, title = run_series(folder), _undisturbed_seconds(folder), run["name"]
    if run["stage"] == "score" and series.get("seconds_scored"):
        worked, tokens = (series[name][-1][1] for name in ("seconds_scored", "tokens_scored"))
        pool = config.resources.teacher
        fixed = None if seconds is None else max(0.0, seconds - worked)
        rate = tokens / worked / pool.actors
        yield Record("scoring", title, title.removeprefix("score "), "", config, rate, seconds, fixed)
    elif run["stage"] == "train" and len(series.get("seconds", [])) > WARM_UP + 1:
        stepped = series["seconds"][-1][1]
        fixed = None if seconds is None else max(0.0, seconds - stepped)
        rate = _step_rate(series) / config.resources.student.workers
        model = _without_digest(tags["cdm.from"])
        method = "pretrain" if title.startswith("pretrain ") else tags["cdm.method"]
        yield Record("training", title, model, method, config, rate, seconds, fixed)
    elif run["stage"] == "evaluate":
        yield Record("evaluation", title, "", "", config, None, seconds, seconds)


def _step_rate(series: Series) -> float:
    """Tokens a second over all steps but the first ones."""
    ends = dict(series["seconds"])
    steps = sorted(ends)[WARM_UP:]
    took = {step: ends[step] - ends[step - 1] for step in steps if step - 1 in ends}
    rates = dict(series["tokens_a_second"])
    return sum(rates[step] * seconds for step, seconds in took.items()) / sum(took.values())


def _undisturbed_seconds(folder: str) -> float | None:
    """From the start to the end of a run that was started once."""
    events = read_events(Path(folder, "driver.jsonl"))[0]
    started = [event["time"] for event in events if event.get("status") == "RUNNING"]
    ended = [event["time"] for event in events if event.get("status") == "FINISHED"]
    return (ended[-1] - started[0]) / 1e3 if len(started) == 1 and ended else None


def _without_digest(path: str) -> str:
    """`.../models/tiny-0123456789ab.initial` -> `tiny`; a name on the hub is left as it is."""
    name = re.sub(r"-[0-9a-f]{12}(\.initial)?$", "", Path(path).name)
    return name if name != Path(path).name else path


def _config(folder: str) -> Config | None:
    """The config of the run above; None where a version of other keys wrote it."""
    params = run_facts(folder).params
    if not params:
        return None
    try:
        return parse_config(_nested(params))
    except ConfigError:
        return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `journal.flatten`; keys that are numbers make lists."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return _listed(tree)


def _listed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if tree and all(key.isdigit() for key in tree):
        return [_listed(tree[key]) for key in sorted(tree, key=int)]
    return {key: _listed(value) for key, value in tree.items()}
