"""Scores, differences and regressions as parts of a page (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cdm.page import Section, side_by_side, table
from cdm.scores import HELD_OUT, Scored, category_columns, comparison_columns, score_columns

SHOWN = 3  # regressions of a task


def score_sections(scored: Sequence[Scored], compared: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What the tasks say, by category too, against each other model, and where the last model is worse than the one
    before it in the table.
    """
    found = []
    if any(one.task != HELD_OUT for one in scored):
        note = "Means over documents; ±: half of the 95 % interval from a bootstrap over documents."
        found.append(Section("Tasks", note, table(score_columns(scored))))
    if any(one.categories for one in scored):
        found.append(Section("By category", "95 % intervals.", table(category_columns(scored))))
    if compared:
        note = "The last model less each other on the same documents: a paired bootstrap, 95 % intervals."
        found.append(Section("Differences", note, table(comparison_columns(compared))))
        found += _regressions([one for one in compared if one["against"] == compared[-1]["against"]])
    return found


def _regressions(compared: Sequence[Mapping[str, Any]]) -> list[Section]:
    found = []
    for one in compared:
        shown = [row for row in one["regressions"] if "prompt" in row][:SHOWN]
        for number, row in enumerate(shown, start=1):
            texts = {"prompt": row["prompt"], "reference": row["reference"], **row["answers"]}
            note = f"{one['model']}: {row['score']:.4g}, {one['against']}: {row['against']:.4g}."
            found.append(Section(f"Regression {number}: {one['task']} {one['metric']}", note, side_by_side(texts)))
    return found
