"""What a search found: its trials as a table, the best one's config, and how much each key mattered (layer 2).

STORAGE/searches/<name>-<id>/{trials.parquet, trials.csv, importance.json, best.yaml}; best.yaml is written last
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from cdm import parts
from cdm.config import Config
from cdm.config_search import Search
from cdm.search import Parameters, finite_values, importance, parameter, search_section, trial_config

TABLE, CSV, IMPORTANCE, BEST = "trials.parquet", "trials.csv", "importance.json", "best.yaml"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial. `value` is the metric: at its last validation, and of a finished one the mean over its seeds.

    `spread` is the standard deviation over seeds, `seconds` the time of its training steps, over all seeds.
    """

    id: str
    state: State
    parameters: Parameters
    step: int
    value: float | None
    spread: float | None
    seconds: float


def best_trial(trials: Sequence[Trial], section: Search) -> Trial | None:
    """The best of those that finished; the first of equals."""
    sign = 1 if section.mode == "min" else -1
    finished = [trial for trial in trials if trial.state == "finished"]
    return min(finished, key=lambda trial: sign * _value(trial), default=None)


def ranked(trials: Sequence[Trial], section: Search) -> list[Trial]:
    """Finished trials by their value, then those that were stopped, then those without a value."""
    sign = 1 if section.mode == "min" else -1
    return sorted(trials, key=lambda t: (t.state != "finished", t.value is None, sign * (t.value or 0.0)))


def finished_values(trials: Sequence[Trial]) -> list[tuple[Parameters, float]]:
    return [(trial.parameters, _value(trial)) for trial in trials if trial.state == "finished"]


def _value(trial: Trial) -> float:
    assert trial.value is not None  # it finished
    return trial.value


def write_results(config: Config, trials: Sequence[Trial], best: Trial, folder: str) -> None:
    """All files of a finished search. best.yaml is an ordinary config: `cdm train` takes it."""
    section = search_section(config)
    table = _table(trials, section)
    for name, write in ((TABLE, pq.write_table), (CSV, pyarrow.csv.write_csv)):
        file = io.BytesIO()
        write(table, file)
        parts.write_bytes(folder, name, file.getvalue())
    shares = importance(section, finished_values(trials))
    parts.write_bytes(folder, IMPORTANCE, json.dumps(shares, indent=1).encode())
    values = trial_config(config, best.parameters).model_dump(mode="json", exclude={"search", "compare"})
    head = f"# The best of {len(trials)} trials: {section.metric} {best.value:.6g} (trial {best.id})\n"
    parts.write_bytes(folder, BEST, (head + yaml.safe_dump(values, sort_keys=False)).encode())


def _table(trials: Sequence[Trial], section: Search) -> pa.Table:
    """A row a trial, in the order they began; a column a key, of text where its values are of several types."""
    columns: dict[str, list[Any]] = {
        "trial": [trial.id for trial in trials],
        "state": [trial.state for trial in trials],
        "step": [trial.step for trial in trials],
        section.metric: [trial.value for trial in trials],
        "spread": [trial.spread for trial in trials],
        "seconds": [trial.seconds for trial in trials],
    }
    for name in section.space:
        values = [trial.parameters[name] for trial in trials]
        columns[name] = [json.dumps(value) for value in values] if _is_mixed(section, name) else values
    types = {section.metric: pa.float64(), "spread": pa.float64(), "seconds": pa.float64()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def read_trials(folder: str, section: Search) -> list[Trial] | None:
    """The trials of a finished search, None where it is not finished."""
    if not Path(folder, BEST).exists():
        return None
    found = []
    for row in pq.read_table(Path(folder, TABLE)).to_pylist():
        parameters = {name: json.loads(row[name]) if _is_mixed(section, name) else row[name] for name in section.space}
        found.append(
            Trial(
                row["trial"], row["state"], parameters, row["step"], row[section.metric], row["spread"], row["seconds"]
            )
        )
    return found


def _is_mixed(section: Search, name: str) -> bool:
    """Whether a key's values are of several types; a column then has their JSON."""
    return len({type(parameter(value)) for value in finite_values(section.space[name]) or ()}) > 1


def read_importance(folder: str) -> dict[str, float]:
    shares: dict[str, float] = json.loads(Path(folder, IMPORTANCE).read_text(encoding="utf-8"))
    return shares


def print_trials(trials: Sequence[Trial], section: Search, shares: Mapping[str, float], console: Console) -> None:
    """All trials, the best first, and the importance of the keys."""
    table = Table(title="Trials", title_justify="left")
    names = short_names(section)
    columns = ("trial", "state", "steps", section.metric, *(["spread"] if section.seeds > 1 else []), *names.values())
    for column in columns:
        table.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for trial in ranked(trials, section):
        spread = [_cell(trial.spread)] if section.seeds > 1 else []
        values = [_cell(trial.parameters[name]) for name in names]
        table.add_row(trial.id, trial.state, str(trial.step), _cell(trial.value), *spread, *values)
    console.print(table)
    if shares:
        console.print("importance: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()), markup=False)


def short_names(section: Search) -> dict[str, str]:
    """The keys of a space by their last parts, where these tell them apart."""
    names = {name: name.rpartition(".")[2] for name in section.space}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
