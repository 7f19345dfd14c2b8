"""What models scored, how sure that is, and where one is worse than another (layer 2).

A score is a ratio of sums over documents (`cdm.intervals`); everything here follows from what each document adds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from cdm.evaluation import LN2
from cdm.intervals import LEVEL, RESAMPLES, Interval, Ratio, difference, interval, pass_at_k
from cdm.records import EvalReport

HELD_OUT = "held-out"
REGRESSIONS = 5  # shown of each comparison
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Scored:
    """One model's score in one metric. seeds: the score under each seed, where answers were sampled more than once.

    categories: of each document, or empty.
    """

    model: str
    task: str
    metric: str
    ids: tuple[str, ...]
    ratio: Ratio
    seeds: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()
    higher_is_better: bool = True

    @cached_property
    def interval(self) -> Interval:
        return interval(self.ratio)

    @property
    def documents(self) -> np.ndarray:
        """Each document's own score [D]; NaN where it has none."""
        above, below = self.ratio.above, self.ratio.below
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)


@dataclass(frozen=True)
class Texts:
    """What a reader sees of a task's documents, by id: prompts, references, and each model's answer."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


# --- from what was measured --------------------------------------------------------------------------------------


def held_out_scores(reports: Sequence[EvalReport]) -> list[Scored]:
    """Bits per byte and agreement of each report that says what each document adds."""
    found = []
    for report in (one for one in reports if one.sums):
        sums = {name: np.asarray(values, np.float64) for name, values in report.sums.items()}
        bits = Ratio(sums["nats"], sums["bytes"] * LN2)
        found.append(Scored(report.name, HELD_OUT, "bits_per_byte", tuple(report.ids), bits, higher_is_better=False))
        if sums["shared"].any():
            ratio = Ratio(sums["agreed"], sums["shared"])
            found.append(Scored(report.name, HELD_OUT, "agreement", tuple(report.ids), ratio))
    return found


def task_scores(
    model: str, task: str, metric: str, ids: Sequence[str], values: np.ndarray, categories: Sequence[str] = ()
) -> Scored:
    """The mean of values [D, S] over documents and seeds; documents are drawn whole, with all their seeds."""
    seeds = tuple(values.mean(0).tolist()) if values.shape[1] > 1 else ()
    return Scored(model, task, metric, tuple(ids), Ratio.mean(values.mean(1)), seeds, tuple(categories))


def pass_scores(
    model: str, task: str, k: int, ids: Sequence[str], values: np.ndarray, categories: Sequence[str] = ()
) -> Scored:
    """pass@k, 0 to 100, of programs that scored values [D, S]: 100 passes."""
    if k == 1:
        return task_scores(model, task, "pass@1", ids, values, categories)
    samples = values.shape[1]
    found = [100 * pass_at_k(samples, int((row == 100).sum()), k) for row in values]
    return Scored(model, task, f"pass@{k}", tuple(ids), Ratio.mean(np.array(found)), (), tuple(categories))


# --- the report --------------------------------------------------------------------------------------------------


def summary(scored: Scored) -> dict[str, Any]:
    """A score with its interval, its spread over seeds and its categories, as plain values."""
    found: dict[str, Any] = {"model": scored.model, "task": scored.task, "metric": scored.metric}
    found |= _plain(scored.interval) | {"documents": len(scored.ids)}
    if scored.seeds:
        found |= {"seeds": list(scored.seeds), "spread": float(np.std(scored.seeds, ddof=1))}
    if scored.categories:
        found["categories"] = by_category(scored)
    return found


def by_category(scored: Scored) -> dict[str, dict[str, Any]]:
    """The score on the documents of each category."""
    categories = np.array(scored.categories)
    found = {}
    for name in sorted(set(scored.categories)):
        inside = categories == name
        ratio = Ratio(scored.ratio.above[inside], scored.ratio.below[inside])
        if ratio.below.any():
            found[name] = _plain(interval(ratio)) | {"documents": int(inside.sum())}
    return found


def comparison(one: Scored, other: Scored, texts: Texts) -> dict[str, Any]:
    """one - other on the same documents, and the documents on which `one` is worse by most.

    Raises ValueError where the documents differ.
    """
    if one.ids != other.ids:
        raise ValueError(f"{one.task}: {one.model} and {other.model} were not measured on the same documents")
    found: dict[str, Any] = {"task": one.task, "metric": one.metric, "model": one.model, "against": other.model}
    return found | _plain(difference(one.ratio, other.ratio)) | {"regressions": regressions(one, other, texts)}


def regressions(one: Scored, other: Scored, texts: Texts) -> list[dict[str, Any]]:
    """The worst first. Scores are each document's own."""
    sign = 1 if one.higher_is_better else -1
    mine, theirs = one.documents, other.documents
    change = sign * (mine - theirs)
    worst = [place for place in np.argsort(change, kind="stable")[:REGRESSIONS] if change[place] < 0]
    found = []
    for place in worst:
        identity = one.ids[place]
        row: dict[str, Any] = {"id": identity, "score": float(mine[place]), "against": float(theirs[place])}
        if one.categories:
            row["category"] = one.categories[place]
        if identity in texts.prompts:
            row |= {"prompt": texts.prompts[identity], "reference": texts.references[identity]}
        answers = {model: texts.answers.get(model, {}).get(identity) for model in (one.model, other.model)}
        found.append(row | {"answers": {model: text for model, text in answers.items() if text is not None}})
    return found


def comparisons(scored: Sequence[Scored], texts: Mapping[str, Texts]) -> list[dict[str, Any]]:
    """The last model against each of the others, in every metric that both have."""
    last = scored[-1].model
    by_key = {(one.task, one.metric, one.model): one for one in scored}
    return [
        comparison(by_key[one.task, one.metric, last], one, texts.get(one.task, Texts()))
        for one in scored
        if one.model != last and (one.task, one.metric, last) in by_key
    ]


def score_report(scored: Sequence[Scored], compared: Sequence[Mapping[str, Any]]) -> str:
    """All of it as JSON."""
    how = {"level": LEVEL, "resamples": RESAMPLES}
    return json.dumps(how | {"scores": [summary(one) for one in scored], "comparisons": list(compared)}, indent=1)


def _plain(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


# --- tables ------------------------------------------------------------------------------------------------------


def score_columns(scored: Sequence[Scored]) -> Columns:
    """One row a model, a column a task's metric and one of half an interval's width; held-out figures are elsewhere."""
    tasks = [one for one in scored if one.task != HELD_OUT]
    models = list(dict.fromkeys(one.model for one in tasks))
    columns: Columns = {"model": models}
    for key in dict.fromkeys((one.task, one.metric) for one in tasks):
        of_model = {one.model: one.interval for one in tasks if (one.task, one.metric) == key}
        found = [of_model.get(model) for model in models]
        name = " ".join(key)
        columns[name] = [None if one is None else round(one.value, 2) for one in found]
        columns[f"{name} ±"] = [None if one is None else round(one.half_width, 2) for one in found]
    return columns


def category_columns(scored: Sequence[Scored]) -> Columns:
    """One row a model, metric and category."""
    rows = [
        (one.model, f"{one.task} {one.metric}", name, found["documents"], found["value"], found["low"], found["high"])
        for one in scored
        for name, found in (by_category(one) if one.categories else {}).items()
    ]
    names = ("model", "score", "category", "documents", "value", "low", "high")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def comparison_columns(compared: Sequence[Mapping[str, Any]]) -> Columns:
    """One row a comparison: the difference and its interval."""
    names = {"model": "model", "against": "against", "task": "task", "metric": "metric", "difference": "value"}
    names |= {"low": "low", "high": "high"}
    return {shown: [one[name] for one in compared] for shown, name in names.items()}
