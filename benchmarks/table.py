"""What every benchmark prints: the machine, a table of figures, and one JSON object on the last line."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

console = Console(width=120, highlight=False)


def machine() -> str:
    """The processor and how many cores of it this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'an unnamed processor'}"


def real_data() -> Path:
    """The folder with `tokenizers/` and `instructions/` that CDM_REAL_DATA names. Raises ValueError without it."""
    folder = Path(os.environ.get("CDM_REAL_DATA", ""))
    if not (folder / "tokenizers").is_dir() or not (folder / "instructions").is_dir():
        raise ValueError("CDM_REAL_DATA must name a folder with tokenizers/ and instructions/")
    return folder


def cpu_seconds(call: Callable[[], object], repetitions: int) -> float:
    """Median CPU seconds of `call`, which ran once before so that nothing is compiled meanwhile."""
    call()
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def finish(figures: Mapping[str, float]) -> None:
    """The last line: all figures, to four digits, as one JSON object."""
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))
