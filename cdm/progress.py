"""A live line a stage: done, rate, time left; plain lines where the output is no terminal, as in job logs."""

from __future__ import annotations

import time
from functools import cache
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
console = Console(highlight=False)
if not console.is_terminal:
    console.width = 110  # job logs are read in editors and browsers


class StageView:
    """`with StageView("score", "documents", 2000) as view: view.update(120, "9.8k tokens/s")`."""

    def __init__(self, title: str, unit: str, total: int | None = None) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._done, self._note, self._printed = 0, "", 0.0
        self._first: tuple[int, float] | None = None  # what an earlier run had done is not this one's rate
        self._live: Progress | None = None

    def __enter__(self) -> StageView:
        self._began = time.monotonic()
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console)
            self._live.start()
            self._task = self._live.add_task(self._title, total=self._total, note="", completed=0)
        return self

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """So many units are done, of so many if that has changed; `note` is shown beside the rate."""
        self._done, self._note, self._total = done, note, total or self._total
        self._first = self._first or (done, time.monotonic())
        if self._live is not None:
            self._live.update(self._task, completed=done, total=self._total, note=self._line_note())
        elif time.monotonic() - max(self._printed, self._began) > PLAIN_SECONDS:
            self._printed = time.monotonic()
            of = f"/{self._total}" if self._total else ""
            console.print(f"  {self._title}: {done}{of} {self._unit}, {self._line_note()}{self._time_left()}")

    def _rate(self) -> float:
        done, began = self._first or (0, self._began)
        return (self._done - done) / max(1e-9, time.monotonic() - began)

    def _line_note(self) -> str:
        return self._note or f"{self._rate():,.1f} {self._unit}/s"

    def _time_left(self) -> str:
        return f", {(self._total - self._done) / self._rate():,.0f} s left" if self._total and self._rate() else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        outcome = "[red]failed[/red]" if kind else "[green]done[/green]"
        seconds = time.monotonic() - self._began
        note = f" ({self._note})" if self._note else ""
        console.print(f"{outcome} {self._title}: {self._done} {self._unit} in {seconds:,.1f} s{note}")


@cache
def skipped(title: str, where: str) -> None:
    """One line for a stage whose output is there already, the first time that it is asked for."""
    console.print(f"[green]have[/green] {title}: {where}")
