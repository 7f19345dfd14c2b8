"""EleutherAI's lm-eval as one more source of scores, where it is installed (layer 2).

It is no part of the pinned set: `pip install lm-eval` beside it. Its tasks that run what a model wrote are refused, as
it would run that without a sandbox: `evaluation.tasks` has `type: code` for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdm.intervals import Ratio
from cdm.scores import Scored

LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity", "ter", "brier_score")


def harness_problems() -> list[str]:
    """Why lm-eval cannot be asked."""
    if importlib.util.find_spec("lm_eval") is None:
        return ["evaluation.harness: lm-eval is not installed here: pip install lm-eval, or leave out these tasks"]
    return []


def run_harness(
    model: str, *, revision: str | None, tasks: Sequence[str], limit: int | None, dtype: str
) -> list[dict[str, Any]]:
    """What lm-eval measures of a model: {task, metric, value, ids, values}, a dictionary a metric.

    values: each document's, empty where the metric is no mean of them (the interval is then unknown). Raises ValueError
    for a task that lm-eval does not know, and for one that would run what the model wrote.
    """
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"evaluation.harness: lm-eval has no task {', '.join(unknown)}; `lm_eval --tasks list` has all"
        )
    arguments = {"pretrained": model, "dtype": dtype} | ({"revision": revision} if revision else {})
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            device="cuda" if torch.cuda.is_available() else "cpu",
            tasks=list(tasks),
            limit=limit,
            log_samples=True,
            task_manager=manager,
        )
    except ValueError as error:
        if "unsafe" in str(error):
            raise ValueError(
                f"evaluation.harness: {', '.join(tasks)}: lm-eval would run what the model wrote without a sandbox; "
                "take evaluation.tasks with type: code instead"
            ) from error
        raise
    return [
        row for name in found["results"] for row in _rows(name, found["results"][name], found["samples"].get(name, []))
    ]


def _rows(task: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys of results are `metric,filter`."""
    rows = []
    for key, value in results.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        of_filter = [sample for sample in samples if sample.get("filter", how) == how and metric in sample]
        values = [sample[metric] for sample in of_filter]
        plain = all(isinstance(one, int | float) for one in values)
        whole = plain and bool(values) and bool(np.isclose(np.mean(values), value))
        rows.append(
            {
                "task": task,
                "metric": metric if how == "none" else f"{metric}, {how}",
                "value": float(value),
                "ids": [str(sample["doc_id"]) for sample in of_filter] if whole else [],
                "values": [float(one) for one in values] if whole else [],
            }
        )
    return rows


def harness_scores(model: str, rows: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """As scores. A metric that is no mean over documents is one document's: its interval has no width."""
    found = []
    for row in rows:
        values = np.array(row["values"] or [row["value"]])
        name = row["metric"].split(",")[0]
        one = Scored(
            model, row["task"], row["metric"], tuple(row["ids"]) or ("all",), Ratio.mean(values),
            higher_is_better=name not in LOWER_IS_BETTER,
        )  # fmt: skip
        found.append(one)
    return found
