"""A real search that is killed again and again: does it end with the right count, without a lost trial?

    python -m benchmarks.search_kills CONFIG [--retrain STEPS] [--set KEY=VALUE]...

Runs `cdm search` on the config and kills it (SIGKILL) each time while a trial trains that has a checkpoint: first the
driver with all its processes, later the driver alone, at last the process of a trial, from which the search goes on by
itself. Prints what happened when, and as the last line JSON:

- `trials`: rows of the table, and how many of each state; `lost`: trials that a killed search knew and it has not.
- `peak_mb`, `left_mb`: what the search's folder took at most, sampled, and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from cdm.config import load_config, storage_path
from cdm.journal import run_facts, run_folders
from cdm.search import search_section, trial_count
from cdm.trials import TABLE

Strike = tuple[int, Callable[[psutil.Process], None]]  # at so many ended trials, what is killed
POLL_SECONDS = 0.2
TRIAL = "ray::ImplicitFunc"  # as Tune names the process of a trial


@dataclass
class Watch:
    """What the disk says of a search that runs."""

    storage: Path
    peak: int = 0
    known: set[str] = field(default_factory=set)

    def look(self) -> None:
        self.peak = max(self.peak, self.size())
        self.known |= {path.name for path in self.found("searches/*/trials/*")}

    def size(self) -> int:
        walked = os.walk(self.storage / "searches")
        return sum(size_of(Path(folder, name)) for folder, _, names in walked for name in names)

    def found(self, pattern: str) -> list[Path]:
        try:
            return list(self.storage.glob(pattern))
        except FileNotFoundError:  # a trial's folder that was removed meanwhile
            return []

    def ended(self) -> int:
        facts = map(run_facts, run_folders(str(self.storage)))
        return sum(one.run["stage"] == "trial" and one.status != "RUNNING" for one in facts)

    def training(self) -> bool:
        return bool(self.found("searches/*/trials/*/run-0/step_*/.metadata"))


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a checkpoint that was removed
        return 0


def kill_all(driver: psutil.Process) -> None:
    for process in [driver, *driver.children(recursive=True)]:
        kill(process)


def kill_driver(driver: psutil.Process) -> None:
    kill(driver)


def kill_trial(driver: psutil.Process) -> None:
    for process in driver.children(recursive=True):
        if process.name().startswith(TRIAL) or any(TRIAL in word for word in process.cmdline()):
            kill(process)


def kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def runs(command: list[str], watch: Watch, plan: list[Strike]) -> Iterator[str]:
    """Starts the search as often as it takes; a kill when so many trials have ended and one trains."""
    began = time.monotonic()
    while True:
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None:
            watch.look()
            if plan and watch.ended() >= plan[0][0] and watch.training():
                ended, (_, strike) = watch.ended(), plan.pop(0)
                strike(psutil.Process(process.pid))
                yield f"{time.monotonic() - began:.0f} s: {strike.__name__}, {ended} trials had ended"
                if strike is not kill_trial:
                    process.wait()
            time.sleep(POLL_SECONDS)
        if process.returncode != -signal.SIGKILL:
            yield f"{time.monotonic() - began:.0f} s: exit code {process.returncode}"
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_kills")
    parser.add_argument("config")
    parser.add_argument("--retrain", type=int, metavar="STEPS")
    parser.add_argument("--set", dest="overrides", action="append", metavar="KEY=VALUE", default=[])
    asked = parser.parse_args()
    config = load_config(asked.config, asked.overrides)
    count = trial_count(search_section(config))
    command = [sys.executable, "-m", "cdm.cli", "search", asked.config]
    command += [word for value in asked.overrides for word in ("--set", value)]
    command += ["--retrain", str(asked.retrain)] if asked.retrain else []
    watch = Watch(Path(storage_path(config)))
    plan: list[Strike] = [(count // 4, kill_all), (count // 2, kill_driver), (3 * count // 4, kill_trial)]
    happened = list(said(runs(command, watch, plan)))
    (folder,) = watch.storage.glob(f"searches/{config.name}-*")
    rows = pq.read_table(folder / TABLE).to_pylist()
    figures = {
        "happened": happened,
        "trials": len(rows),
        **{state: sum(row["state"] == state for row in rows) for state in ("finished", "stopped", "failed")},
        "lost": len(watch.known - {row["trial"] for row in rows}),
        "peak_mb": round(watch.peak / 1e6, 1),
        "left_mb": round(watch.size() / 1e6, 3),
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))


def said(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        print(f"--- {line}", flush=True)
        yield line


if __name__ == "__main__":
    main()
