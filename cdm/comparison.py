"""A comparison, without whoever runs it: its students' configs, and what their figures say with intervals (layer 2).

STORAGE/comparisons/<name>-<id>/{comparison.md, comparison.svg, comparison.json}; comparison.json is written last
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdm import parts
from cdm.config import Config, ConfigError
from cdm.config_compare import Compare
from cdm.search import with_values

JSON, MARKDOWN, FIGURE = "comparison.json", "comparison.md", "comparison.svg"
CONFIDENCE = 0.95
SECTIONS = ("teachers", "generation", "student", "method")
FIXED = ("model", "seed", "steps", "batch_tokens", "max_length")  # of the student: what makes a comparison one
Columns = dict[str, list[Any]]


# --- what is trained ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One student: a variant's config at one seed, an ordinary config."""

    variant: str
    seed: int
    config: Config


def compare_section(config: Config) -> Compare:
    """Raises ConfigError where the config has none."""
    if config.compare is None:
        raise ConfigError(["compare: missing; this section names the variants that are trained"])
    return config.compare


def points(config: Config) -> list[Point]:
    """All variants at the first seed, then at the next one: what is done first can be read as a whole.

    A seed is `student.seed`: the student's initial weights, where the config makes it, and the order of its data. The
    teachers' is left alone. Raises ConfigError with every problem found.
    """
    section = compare_section(config)
    found = problems(config, section)
    if found:
        raise ConfigError(found)
    seeds = range(config.student_seed, config.student_seed + section.seeds)
    return [
        Point(name, seed, with_values(config, {**values, "student.seed": seed}))
        for seed in seeds
        for name, values in section.variants.items()
    ]


def problems(config: Config, section: Compare) -> list[str]:
    """What is wrong with the variants, a line each."""
    found = [problem for name, values in section.variants.items() for problem in _problems(config, name, values)]
    if found:
        return found
    configs = {name: with_values(config, values) for name, values in section.variants.items()}
    for number, (name, one) in enumerate(configs.items()):
        twin = next((other for other in list(configs)[:number] if configs[other] == one), None)
        if twin is not None:
            found.append(f"compare.variants.{name}: the same as {twin}")
    return found


def _problems(config: Config, name: str, values: Mapping[str, Any]) -> Iterable[str]:
    said = f"compare.variants.{name}"
    for key in values:
        first, *rest = key.split(".")
        if first not in SECTIONS:
            yield f"{said}.{key}: variants differ in {', '.join(SECTIONS)}"
        elif first == "student" and (not rest or rest[0] in FIXED):
            yield f"{said}.{key}: the same for all; the student's {', '.join(FIXED)} are not compared"
    try:
        with_values(config, values)
    except ConfigError as error:
        yield from (f"{said}.{problem}" for problem in error.problems)


# --- what came of it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One student's figures on the held-out documents, and what its training took.

    `unmapped`: the first teacher's mass that no student token took, mean over the steps; None where nothing is mapped.
    """

    variant: str
    seed: int
    bits_per_byte: float
    agreement: float | None
    steps: int
    seconds: float
    step_seconds: float | None
    peak_memory_gib: float
    unmapped: float | None


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half of the width of its interval, `CONFIDENCE` of Student's t; of one value none."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:z.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float]) -> Interval:
    """Of independent values with one spread that is not known. Source: Student, Biometrika 6 (1908)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, None)
    from scipy import stats  # a second to import

    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """The difference at equal seeds: what a seed does to both falls out of it."""
    return interval([value - theirs[seed] for seed, value in ours.items()])


def gap_closed(student: float, baseline: float, teacher: float) -> float:
    """The share of the way from the baseline's bits per byte to the teacher's; below 0: worse than the baseline."""
    return (baseline - student) / (baseline - teacher)


@dataclass(frozen=True)
class Summary:
    """One variant over its seeds. difference: bits per byte above the baseline's. gap: the share of the way from
    baseline to teacher; gap_a_minute: the same over the minutes of its training steps. Both are None where the baseline
    is as good as the teacher. All three are taken at equal seeds.
    """

    variant: str
    seeds: int
    bits_per_byte: Interval
    difference: Interval
    agreement: Interval | None
    gap: Interval | None
    gap_a_minute: Interval | None
    step_seconds: Interval | None
    peak_memory_gib: float
    unmapped: float | None


def summaries(section: Compare, teacher: float, results: Sequence[Result]) -> list[Summary]:
    """A line a variant, the lowest bits per byte first. teacher: its bits per byte on the same documents."""
    by_variant = {name: [one for one in results if one.variant == name] for name in section.variants}
    baseline = {one.seed: one for one in by_variant[section.baseline]}
    found = [_summary(ours, baseline, teacher) for ours in by_variant.values() if ours]
    return sorted(found, key=lambda one: one.bits_per_byte.mean)


def _summary(ours: Sequence[Result], baseline: Mapping[int, Result], teacher: float) -> Summary:
    to_beat = {seed: one.bits_per_byte for seed, one in baseline.items()}
    bits = {one.seed: one.bits_per_byte for one in ours}
    gap = {}
    if all(bits_s > teacher for bits_s in to_beat.values()):
        gap = {one.seed: gap_closed(one.bits_per_byte, to_beat[one.seed], teacher) for one in ours}
    agreement = [one.agreement for one in ours if one.agreement is not None]
    times = [one.step_seconds for one in ours if one.step_seconds is not None]
    unmapped = [one.unmapped for one in ours if one.unmapped is not None]
    return Summary(
        variant=ours[0].variant,
        seeds=len(ours),
        bits_per_byte=interval(list(bits.values())),
        difference=paired(bits, to_beat),
        agreement=interval(agreement) if agreement else None,
        gap=interval(list(gap.values())) if gap else None,
        gap_a_minute=interval([60 * gap[one.seed] / one.seconds for one in ours]) if gap else None,
        step_seconds=interval(times) if times else None,
        peak_memory_gib=max(one.peak_memory_gib for one in ours),
        unmapped=float(np.mean(unmapped)) if unmapped else None,
    )


# --- what is shown -----------------------------------------------------------------------------------------------


def table_columns(found: Sequence[Summary], section: Compare) -> Columns:
    """Text, a row a variant: what the terminal, Markdown and the page show."""
    rows = [
        {
            "variant": one.variant,
            "bits per byte": str(one.bits_per_byte),
            f"less than {section.baseline}": str(Interval(-one.difference.mean, one.difference.half)),
            "gap closed": _text(one.gap),
            "a minute": _text(one.gap_a_minute),
            "agreement": _text(one.agreement),
            "s a step": "-" if one.step_seconds is None else f"{one.step_seconds.mean:.3f}",
            "peak GiB": f"{one.peak_memory_gib:.2f}",
            "unmapped": "-" if one.unmapped is None else f"{one.unmapped:.3f}",
        }
        for one in found
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _text(value: Interval | None) -> str:
    return "-" if value is None else str(value)


def markdown(columns: Columns) -> str:
    names = list(columns)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n"


def print_comparison(columns: Columns, teacher: float, console: Console) -> None:
    title = f"Held-out documents; the teacher has {teacher:.3f} bits per byte"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "variant" else "right", min_width=6)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)


def write_comparison(
    folder: str, teacher: float, results: Sequence[Result], found: Sequence[Summary], columns: Columns, drawn: str
) -> None:
    """The files of a finished comparison."""
    values = {
        "teacher_bits_per_byte": teacher,
        "confidence": CONFIDENCE,
        "summary": [asdict(one) for one in found],
        "students": [asdict(one) for one in results],
    }
    parts.write_bytes(folder, MARKDOWN, markdown(columns).encode())
    parts.write_bytes(folder, FIGURE, drawn.encode())
    parts.write_bytes(folder, JSON, json.dumps(values, indent=1).encode())
