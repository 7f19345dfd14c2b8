"""Figures of runs and searches, in one style: legible on light and on dark, axes named with their units (layer 2)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cdm.comparison import Interval, Summary
from cdm.config_compare import Compare
from cdm.config_search import Choice, LogUniform, Search
from cdm.journal import Series
from cdm.trials import Trial, best_trial

COLOURS = ("#3b82c4", "#d9822b", "#3f9e6b", "#c2517f", "#8a6fd1", "#7f8c3a")  # told apart by most eyes, on both grounds
GREY = "#9aa3ad"  # what is there and not in question, on both grounds
INK = "#5f6770"  # text and axes where the ground is white
CURRENT = "#010203"  # stands for the page's own text colour in an SVG
TERMS = (
    ("loss", "loss (nats)"), ("ce", "cross-entropy (nats a token)"), ("kd", "KD (nats a group)"),
    ("d1", "D1 (nats a group)"), ("d2", "D2 (nats a group)"), ("grad_norm", "gradient norm"),
)  # fmt: skip
MASSES = (
    ("mass_exact", "exact", COLOURS[0]), ("mass_dynamic", "dynamic", COLOURS[1]),
    ("mass_unmapped", "unmapped", GREY),
)  # fmt: skip


def svg(figure: Figure) -> str:
    """A figure for a page: no ground of its own, text and axes in the page's colour."""
    file = io.StringIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
        _ink(axes, CURRENT)
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_color(CURRENT)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cdm"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :].replace(CURRENT, "currentColor")


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    _ink(axes, INK)


def _ink(axes: Axes, colour: str) -> None:
    axes.tick_params(colors=colour, which="both")
    for spine in axes.spines.values():
        spine.set_color(colour)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(colour)


def _legend(axes: Axes, **where: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, **where)


# --- a run's metrics ---------------------------------------------------------------------------------------------


def loss_figure(runs: Mapping[str, Series]) -> Figure:
    """The terms of the loss and the gradient norm against steps, a line a run; with several teachers a line each."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (term, unit) in zip(figure.subplots(2, 3).flat, TERMS, strict=True):
        for number, (name, series) in enumerate(runs.items()):
            for style, key in zip(("-", "--", ":", "-."), _named(series, term), strict=False):
                label = name if key == term else f"{name}, {key.rpartition('.')[0]}"
                axes.plot(*zip(*series[key], strict=True), style, color=_colour(number), linewidth=1.2, label=label)
        _style(axes, "step", "")
        axes.set_title(unit, loc="left", fontsize=9, color=INK)
        if axes is figure.axes[0] or any(len(_named(series, term)) > 1 for series in runs.values()):
            _legend(axes)
    return figure


def _named(series: Series, term: str) -> list[str]:
    """A metric, or the same of each of several teachers."""
    return [name for name in series if name == term or name.endswith(f".{term}")]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def has_coverage(series: Series) -> bool:
    """Whether a run has a term that maps a teacher's tokens."""
    return bool(_named(series, "mass_exact"))


def coverage_figure(series: Series) -> Figure:
    """Where the teacher's mass goes, against steps: a row a teacher."""
    exact = _named(series, "mass_exact")
    figure = Figure(figsize=(10, 2.8 * len(exact)), layout="constrained")
    for axes, key in zip(np.atleast_1d(figure.subplots(len(exact), 1)), exact, strict=True):
        prefix = key.removesuffix("mass_exact")
        steps = [step for step, _ in series[key]]
        shares = [[value for _, value in series[f"{prefix}{name}"]] for name, _, _ in MASSES]
        _, labels, colours = zip(*MASSES, strict=True)
        axes.stackplot(steps, shares, labels=labels, colors=colours, alpha=0.85)
        axes.set_ylim(0, 1)
        _style(axes, "step", f"{prefix.rstrip('.')} teacher's mass (share a group)".strip())
        _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def bits_figure(runs: Mapping[str, Series], teacher: float | None) -> Figure:
    """Bits per byte of the validation split against steps, a line a run; the teacher's on the test split, dashed."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, series) in enumerate(runs.items()):
        points = series.get("validation_bits_per_byte", [])
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-", color=_colour(number), linewidth=1.4, markersize=3.5, label=name
            )
    if teacher is not None:
        axes.axhline(teacher, linestyle="--", linewidth=1, color=INK, label="teacher, test split")
    _style(axes, "step", "bits per byte, lower is better")
    _legend(axes)
    return figure


# --- comparisons -------------------------------------------------------------------------------------------------


def comparison_figure(found: Sequence[Summary], section: Compare) -> Figure:
    """The share of the gap that each variant closes, at equal steps and a minute of its steps; where there is no gap,
    bits per byte above the baseline's. 95 % intervals.
    """
    shown = [one for one in found if one.variant != section.baseline]
    gaps = [(one.gap, one.gap_a_minute) for one in shown if one.gap is not None and one.gap_a_minute is not None]
    closed = f"gap from {section.baseline} to the teacher closed, share"
    panels: dict[str, Sequence[Interval]] = {f"bits per byte above {section.baseline}": [x.difference for x in shown]}
    if gaps:
        panels = dict(zip((f"{closed}, equal steps", f"{closed} a minute"), zip(*gaps, strict=True), strict=True))
    figure = Figure(figsize=(10, 1.1 + 0.27 * len(shown)), layout="constrained")
    drawn = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (name, intervals), colour in zip(drawn, panels.items(), COLOURS, strict=False):
        means, halves = [one.mean for one in intervals], [one.half or 0.0 for one in intervals]
        axes.errorbar(means, range(len(shown)), xerr=halves, fmt="o", color=colour, markersize=4, linewidth=1.2)
        axes.axvline(0, linestyle="--", linewidth=1, color=INK)
        _style(axes, name, "")
    axes.set_yticks(range(len(shown)), [one.variant for one in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    return figure


# --- searches ----------------------------------------------------------------------------------------------------


def best_so_far_figure(trials: Sequence[Trial], section: Search) -> Figure:
    """The metric of each trial in the order they began, and the best of those that had finished."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    numbered = [(n, trial) for n, trial in enumerate(trials, start=1) if trial.value is not None]
    for state, marker, colour in (("finished", "o", COLOURS[0]), ("stopped", "x", COLOURS[1])):
        points = [(n, trial.value) for n, trial in numbered if trial.state == state]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=state)
    finished = [(n, trial.value) for n, trial in numbered if trial.state == "finished"]
    if finished:
        better = np.minimum.accumulate if section.mode == "min" else np.maximum.accumulate
        numbers, values = zip(*finished, strict=True)
        numbers, values = (*numbers, numbered[-1][0]), (*values, values[-1])  # up to the last trial
        axes.step(numbers, better(values), where="post", color=COLOURS[2], linewidth=1.4, label="best so far")
    _style(axes, "trial, in the order they began", section.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return figure


def importance_figure(shares: Mapping[str, float]) -> Figure:
    """What each key explains of the metric's variance over finished trials."""
    figure = Figure(figsize=(10, 0.9 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(shares), list(shares.values()), color=COLOURS[0], height=0.6)
    axes.bar_label(bars, labels=[f"{share:.0%}" for share in shares.values()], padding=3, fontsize=8, color=INK)
    axes.invert_yaxis()
    _style(axes, "share of the variance (fANOVA)", "")
    axes.margins(x=0.1)
    return figure


def parallel_figure(trials: Sequence[Trial], section: Search) -> Figure:
    """A line a trial across its parameters to its metric; finished ones in colour, the best one thick."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    shown = [trial for trial in trials if trial.value is not None]
    columns = {name: _heights(section, name, [trial.parameters[name] for trial in shown]) for name in section.space}
    values = [float(trial.value or 0.0) for trial in shown]
    low, high = min(values, default=0.0), max(values, default=1.0)
    metric = [(value - low) / ((high - low) or 1.0) for value in values]
    best = best_trial(shown, section)
    for number, trial in enumerate(shown):
        heights = [column[0][number] for column in columns.values()] + [metric[number]]
        quality = metric[number] if section.mode == "max" else 1 - metric[number]
        finished, width = trial.state == "finished", 3.0 if trial is best else 1.2
        colour = COLOURS[2] if trial is best else COLOURS[0] if finished else GREY
        axes.plot(heights, color=colour, alpha=0.35 + 0.6 * quality if finished else 0.45, linewidth=width)
    ends = [column[1] for column in columns.values()] + [(_short(low), _short(high))]
    for place, (bottom, top) in enumerate(ends):
        axes.axvline(place, color=INK, linewidth=0.8)
        axes.text(place, -0.03, bottom, ha="center", va="top", fontsize=8, color=INK)
        axes.text(place, 1.03, top, ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xticks(range(len(ends)), [*section.space, section.metric], fontsize=8)
    axes.set_ylim(-0.12, 1.12)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, colors=INK)
    axes.spines[:].set_visible(False)
    return figure


def _heights(section: Search, name: str, values: Sequence[Any]) -> tuple[list[float], tuple[str, str]]:
    """Where each value is between the ends of its axis, 0 to 1, and what stands at the ends."""
    distribution = section.space[name]
    if isinstance(distribution, Choice):
        labels = list(dict.fromkeys(json.dumps(value) for value in values))
        last = max(1, len(labels) - 1)
        heights = [labels.index(json.dumps(value)) / last for value in values]
        return heights, (labels[0].strip('"')[:24], labels[-1].strip('"')[:24]) if labels else ("", "")
    scale = math.log if isinstance(distribution, LogUniform) else float
    low, high = scale(distribution.low), scale(distribution.high)
    ends = (_short(distribution.low), _short(distribution.high))
    return [(scale(value) - low) / (high - low) for value in values], ends


def _short(value: float) -> str:
    return f"{value:.4g}"
