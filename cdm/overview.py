"""What a reviewer sees first: one page a pipeline run and one a search, each a file that stands alone (layer 2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from cdm.batches import Row
from cdm.config import Config
from cdm.config_compare import Compare
from cdm.config_search import Search
from cdm.figures import (
    best_so_far_figure,
    bits_figure,
    coverage_figure,
    has_coverage,
    importance_figure,
    loss_figure,
    parallel_figure,
    svg,
)
from cdm.journal import Series
from cdm.page import Section, alignments, page, side_by_side, table
from cdm.records import EvalReport
from cdm.report import Columns
from cdm.text_view import visible
from cdm.trials import Trial, ranked, short_names

MAPPINGS_SHOWN = 25


@dataclass(frozen=True)
class Reviewed:
    """All that a pipeline's page shows. `runs`: the metrics of each training run, the method's last."""

    config: Config
    code: Mapping[str, str]
    results: Columns
    reports: Sequence[EvalReport]
    runs: Mapping[str, Series]
    rows: Sequence[Row]
    texts: Mapping[str, str]
    scores: Sequence[Section] = ()


def pipeline_page(seen: Reviewed) -> str:
    """Results, curves, coverage, alignments, mappings and completions of one config."""
    found = [
        Section(
            "Held-out documents",
            "Bits per byte: lower is better. Agreement: how often the best next token is the teacher's.",
            table(seen.results),
        )
    ]
    found += seen.scores
    if seen.runs:
        found += _curves(seen)
    if seen.rows:
        found.append(
            Section(
                "Alignment",
                "Responses of the test split, the student's tokens above the first teacher's. A strong border: not one "
                "token each. The darker the ground, the higher the entropy weight of the teacher's token.",
                alignments(seen.rows, seen.texts),
            )
        )
    if seen.reports[-1].mappings:
        found.append(
            Section(
                "Dynamic mappings",
                "Teacher tokens without a twin, and the student's near spellings that took their mass. Mass: the "
                "teacher's probability, summed over groups of the test split. Example: the text around the place (▌) "
                "where the teacher gave it most.",
                _mappings(seen.reports[-1]),
            )
        )
    found += _completions(seen.reports)
    return page(f"{seen.config.name}: {seen.config.method.type}", _subtitle(seen), found)


def _curves(seen: Reviewed) -> list[Section]:
    bits = svg(bits_figure(seen.runs, seen.reports[0].bits_per_byte))
    found = [
        Section(
            "Bits per byte against steps",
            "On the validation split, by models with different tokenizers; the teacher's is on the test split.",
            bits,
        ),
        Section("Loss", "Each term as it is optimised, over all workers.", svg(loss_figure(seen.runs))),
    ]
    note = "What of the teacher's top-k finds a student token: one with the same bytes, a near spelling, or none."
    for name, series in seen.runs.items():
        if has_coverage(series):
            found.append(Section(f"Coverage: {name}", note, svg(coverage_figure(series))))
    return found


def _subtitle(seen: Reviewed) -> str:
    config = seen.config
    teachers = ", ".join(teacher.model.name for teacher in config.teachers)
    said = f"{teachers} to {config.student.model.name}, {config.student.steps} steps, seed {config.seed}"
    if "cdm.commit" in seen.code:
        said += f"; code {seen.code['cdm.commit'][:10]}{' with changes' if seen.code['cdm.dirty'] == 'true' else ''}"
    return said


def _mappings(report: EvalReport) -> str:
    shown = report.mappings[:MAPPINGS_SHOWN]
    columns: Columns = {key: [visible(str(one[key])) for one in shown] for key in ("teacher", "student")}
    columns |= {key: [one[key] for one in shown] for key in ("mass", "groups")}
    return table(columns | {"example": [visible(str(one["example"])) for one in shown]})


def _completions(reports: Sequence[EvalReport]) -> list[Section]:
    """A section a prompt: the reference and a completion a model."""
    with_samples = [report for report in reports if report.samples]
    found = []
    for number, sample in enumerate(with_samples[0].samples if with_samples else ()):
        texts = {"prompt": sample["prompt"], "reference": sample["reference"]}
        texts |= {report.name: report.samples[number]["completion"] for report in with_samples}
        note = "The most probable continuation of each model, cut where the evaluation cuts it."
        found.append(Section(f"Completion {number + 1}", note, side_by_side(texts)))
    return found


def search_page(config: Config, section: Search, trials: Sequence[Trial], shares: Mapping[str, float]) -> str:
    """All trials of a search, which keys mattered, and how the best was found."""
    first = ranked(trials, section)
    columns: Columns = {
        "trial": [trial.id for trial in first],
        "state": [trial.state for trial in first],
        "steps": [trial.step for trial in first],
        section.metric: [trial.value for trial in first],
    }
    if section.seeds > 1:
        columns["spread over seeds"] = [trial.spread for trial in first]
    for name, shown in short_names(section).items():
        columns[shown] = [trial.parameters[name] for trial in first]
    found = [
        Section(
            "Trials", "The best first; a trial that was stopped has the figure of its last validation.", table(columns)
        ),
        Section(
            "Parallel coordinates",
            "A line a trial across its values to its metric. Blue: finished, the stronger the better; green: the best; "
            "grey: stopped.",
            svg(parallel_figure(trials, section)),
        ),
        Section("Best so far", "Trials in the order they began.", svg(best_so_far_figure(trials, section))),
    ]
    if shares:
        note = "How much of the metric's variance over finished trials each key explains; of few trials a hint."
        found.append(Section("Importance", note, svg(importance_figure(shares))))
    seeds = "1 seed" if section.seeds == 1 else f"{section.seeds} seeds"
    subtitle = f"{len(trials)} trials, {section.searcher}, {section.scheduler}, {seeds} a trial"
    return page(f"{config.name}: search", subtitle, found)


def compare_page(config: Config, section: Compare, columns: Columns, teacher: float, drawn: Figure) -> str:
    """The table and the figure of a comparison, and what each variant is."""
    note = (
        f"Mean over {section.seeds} seeds and 95 % intervals. Lower bits per byte are better; the teacher has "
        f"{teacher:.3f}. Differences and gaps are taken at equal seeds."
    )
    asked = {"variant": list(section.variants), "values": [json.dumps(one) for one in section.variants.values()]}
    found = [
        Section("Held-out documents", note, table(columns)),
        Section("The gap to the teacher", f"0 is {section.baseline}, 1 the teacher.", svg(drawn)),
        Section("Variants", "The config with these values.", table(asked)),
    ]
    return page(f"{config.name}: comparison", f"{len(section.variants)} variants, {config.student.steps} steps", found)
