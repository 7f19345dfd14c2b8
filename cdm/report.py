"""What a person reads at the end: the table of results, sample completions, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cdm.export import ABOUT, read_about
from cdm.journal import Series
from cdm.records import EvalReport
from cdm.scores import held_out_scores

Columns = dict[str, list[Any]]
HALF = " ±"  # ends the name of a column with half the width of a 95 % interval


def results(reports: Sequence[EvalReport], folders: dict[str, str]) -> Columns:
    """One row a model. Training seconds are those of the student's steps, over restarts, without start-up."""
    about = [_about(folders.get(report.name)) for report in reports]
    scored = {(one.model, one.metric): one.interval.half_width for one in held_out_scores(reports)}
    bits, agreement = (
        [_rounded(scored.get((report.name, metric))) for report in reports] for metric in ("bits_per_byte", "agreement")
    )
    return {
        "model": [report.name for report in reports],
        "steps": [one.get("steps") for one in about],
        "bits per byte": [round(report.bits_per_byte, 4) for report in reports],
        "bits per byte ±": bits,
        "agreement": [None if r.agreement is None else round(r.agreement, 4) for r in reports],
        "agreement ±": agreement,
        "training seconds": [round(one["seconds"], 1) if "seconds" in one else None for one in about],
        "evaluation seconds": [round(report.seconds, 1) for report in reports],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _about(folder: str | None) -> dict[str, Any]:
    return read_about(folder) if folder and (Path(folder) / ABOUT).exists() else {}


def checkpoints(folder: str, series: Series) -> Columns:
    """The checkpoints that a training run left in its folder: where each is, and the figures of its step."""
    found = sorted(Path(folder).glob("step_*"))
    steps = [int(path.name.removeprefix("step_")) for path in found]
    columns: Columns = {"step": steps, "path": [str(path) for path in found]}
    for name in ("loss", *(name for name in series if name.startswith("validation_"))):
        at = dict(series.get(name, []))
        columns[name] = [at.get(step) for step in steps]
    return columns


def print_results(columns: Columns, console: Console, title: str = "Held-out documents") -> None:
    """A table in which half the width of an interval stands behind its value."""
    shown = with_half_widths(columns)
    table = Table(title=title, title_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*map(_cell, row))
    console.print(table)


def with_half_widths(columns: Columns) -> Columns:
    """Each column `NAME ±` joined to the column NAME."""
    shown: Columns = {}
    for name, values in columns.items():
        if name.endswith(HALF):
            before = shown[name.removesuffix(HALF)]
            joined = zip(before, values, strict=True)
            shown[name.removesuffix(HALF)] = [v if w is None else f"{_cell(v)} ± {w:,}" for v, w in joined]
        else:
            shown[name] = list(values)
    return shown


def description(columns: Columns) -> str:
    """What MLflow shows on a run's first page: a table in Markdown, and where the rest is."""
    shown = with_half_widths(columns)
    rows = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    lines = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join([*lines, "", "All there is to see: `overview.html` under *Artifacts*."])


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,}"


def print_samples(report: EvalReport, console: Console) -> None:
    for sample in report.samples:
        console.rule(f"[bold]{report.name}: a completion", align="left")
        console.print(sample["prompt"].strip(), style="dim", markup=False)
        console.print(sample["completion"].rstrip() or "(nothing)", markup=False)


def results_figure(columns: Columns) -> Figure:
    """Bits per byte and agreement, a bar a model."""
    figure = Figure(figsize=(9, 0.6 + 0.45 * len(columns["model"])), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(columns["model"])
    for axes, key, unit in ((left, "bits per byte", "bits per byte, lower is better"), (right, "agreement", "share")):
        values = [value or 0.0 for value in columns[key]]
        widths = [width or 0.0 for width in columns[key + HALF]]
        bars = axes.barh(names, values, xerr=widths, color="#3b6ea5", ecolor="#8a949e", error_kw={"elinewidth": 1})
        axes.bar_label(bars, labels=[f"{value:.3f}" for value in values], padding=3, fontsize=8)
        axes.set_xlabel(unit if key == "bits per byte" else "agreement with the teacher's next token, share")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    return figure


def samples_table(reports: Sequence[EvalReport]) -> Columns:
    """Completions side by side: prompt, reference, then a column a model."""
    first = next((report for report in reports if report.samples), None)
    if first is None:
        return {}
    columns: Columns = {key: [sample[key] for sample in first.samples] for key in ("prompt", "reference")}
    for report in reports:
        if report.samples:
            columns[report.name] = [sample["completion"] for sample in report.samples]
    return columns


def mappings_table(report: EvalReport) -> Columns:
    """The dynamic mappings that moved most mass (`cdm.mappings`), a row each."""
    return {key: [one[key] for one in report.mappings] for key in report.mappings[0]}
