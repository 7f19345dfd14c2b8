"""A config in miniature: all its stages on a few documents and steps, for their logs to say how fast this place is."""

from __future__ import annotations

from typing import Any

from cdm.config import Config, parse_config, storage_path
from cdm.corpus_size import MEASURED
from ray_jobs.pipeline import run_stages

DOCUMENTS = 400
STEPS = 10
PARTS_AN_ENGINE = 4


def measure(config: Config) -> int:
    """Runs the miniature in STORAGE/measured and returns its exit code. What is there already is not run again."""
    return run_stages(miniature(config), "pipeline")


def miniature(config: Config) -> Config:
    """The same models, methods and resources; little data, few steps, no tasks, nothing tracked."""
    values: dict[str, Any] = config.model_dump(mode="json")
    documents = min(DOCUMENTS, config.corpus.max_documents or DOCUMENTS)
    engines = config.resources.teacher.actors
    values["storage"] = storage_path(config, MEASURED)
    values["tracking"] = {"type": "none"}
    values["search"] = None
    values["evaluation"] |= {"tasks": [], "harness": []}
    values["corpus"] |= {
        "max_documents": documents,
        "part_documents": max(1, documents // (engines * PARTS_AN_ENGINE)),
        "validation_share": 0.05,
        "test_share": 0.1,
    }
    trained = [section["model"].get("training") for section in [*values["teachers"], values["student"]]]
    for section in [values["student"], *(one for one in trained if one and one["steps"])]:
        section |= {"steps": STEPS, "validate_every": STEPS, "checkpoint_every": STEPS, "best": None}
    return parse_config(values)
