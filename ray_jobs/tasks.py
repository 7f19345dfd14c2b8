"""The tasks of `evaluation` over every model: answers by the pool of engines, grades by Ray tasks, then the scores.

Both are parts on disk (`cdm.answers`), so the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray

from cdm import parts
from cdm.answers import (
    AnswerWriter,
    answers_identity,
    grade_part,
    grades_identity,
    part_name,
    read_answers,
    read_grades,
    write_answers,
)
from cdm.config import Config
from cdm.config_models import Pretrained
from cdm.config_tasks import AnyTask, Code
from cdm.corpus import read_documents, table_of
from cdm.harness import harness_scores, run_harness
from cdm.journal import Series
from cdm.models import model_identity
from cdm.parts import Manifest, Part
from cdm.progress import StageView, skipped
from cdm.records import Document
from cdm.scores import Scored, Texts, pass_scores, task_scores
from cdm.tasks import CATEGORY, exercises, exercises_identity
from ray_jobs.pool import PartWorker, make_parts
from ray_jobs.runs import Model, short
from ray_jobs.stages import BEFORE, Pipeline, write_text

PART = 64  # exercises: a part is the unit of work and of restart
METRICS = {"instructions": "rouge_l", "final_number": "exact_match"}


@dataclass(frozen=True)
class TaskPart:
    """One part of a task's exercises under one seed."""

    task: AnyTask
    exercises: str
    part: Part
    number: int

    @property
    def documents(self) -> list[Document]:
        return read_documents(self.exercises, self.part.name, expect=self.part)


class AnswerPart(PartWorker):
    """An actor of the pool: an engine, made once, and the answers to one part of exercises a call."""

    nothing: ClassVar[Mapping[str, Any]] = {"tokens": 0, "answers": 0, "cut": 0}

    def __init__(
        self, writer: Mapping[str, Any], plan: Mapping[str, TaskPart], folder: str, count_attempt: Any
    ) -> None:
        super().__init__(folder, count_attempt)
        self.plan, self.writer = plan, AnswerWriter(**writer)

    def make(self, part: Part) -> None:
        asked = self.plan[part.name]
        write_answers(self.folder, part.name, self.writer(asked.task, asked.documents, asked.number))

    def summary(self, name: str) -> dict[str, Any]:
        answers = read_answers(self.folder, name)
        return {
            "tokens": sum(a.tokens for a in answers),
            "answers": len(answers),
            "cut": sum(a.end == "cut" for a in answers),
        }


class GivenStudent(Pipeline):
    """A pipeline whose only student is a folder that exists: nothing is trained."""

    @staticmethod
    def config_for(config: Config, folder: str) -> Config:
        """The config with the folder in the student's place."""
        student = config.student.model_copy(update={"model": Pretrained(name=os.path.abspath(folder))})
        return config.model_copy(update={"student": student, "baselines": []})

    @cached_property
    def students(self) -> dict[str, str]:
        return {Path(self.student.path).name: self.student.path}

    @cached_property
    def runs(self) -> dict[str, Series]:
        return {}

    def _counted_maps(self) -> dict[str, tuple[str, int]]:
        return {}


def scores_of_tasks(pipeline: Pipeline) -> tuple[list[Scored], dict[str, Texts]]:
    """Every task's scores of every model, in the order of the table of results, and what a reader sees, by task."""
    config = pipeline.config
    plan: dict[str, TaskPart] = {}
    for task in config.evaluation.tasks:
        folder, manifest = _exercises(pipeline, task)
        for part in manifest.parts:
            for number in range(task.seeds):
                name = part_name(task, manifest.fingerprint, part.name, number)
                plan[name] = TaskPart(task, folder, part, number)
    if not plan:
        return [], {}
    folders = {name: _answered(pipeline, name, model, plan) for name, model in _models(pipeline).items()}
    _grade(pipeline, folders, plan)
    found, texts = [], {}
    for task in config.evaluation.tasks:
        of_task = {name: asked for name, asked in plan.items() if asked.task == task}
        found += [one for model, folder in folders.items() for one in _scores(model, folder, task, of_task)]
        texts[task.name] = _texts(folders, of_task)
    return found, texts


def _models(pipeline: Pipeline) -> dict[str, Model]:
    """By the names of the table of results."""
    teacher = pipeline.teachers[0]
    found = {f"teacher, {teacher.name}": teacher}
    for name, folder in pipeline.students.items():
        known = pipeline.student if name == BEFORE else None
        found[name] = known or Model(name, folder, None, model_identity(folder, None))
    return found


def _exercises(pipeline: Pipeline, task: AnyTask) -> tuple[str, Manifest]:
    folder = pipeline.folder("tasks", f"{task.name}-{short(exercises_identity(task))}")
    if not parts.is_finished(folder):
        found = exercises(task)
        names = []
        for place, start in enumerate(range(0, len(found), PART)):
            names.append(f"test-{place:05d}.parquet")
            parts.write_part(folder, names[-1], table_of(found[start : start + PART]))
        parts.finish(folder, {"task": task.name, "type": task.type}, kind="exercises", names=names)
    return folder, parts.read_manifest(folder, {"kind": "exercises"})


def _answered(pipeline: Pipeline, name: str, model: Model, plan: Mapping[str, TaskPart]) -> str:
    """The folder with one model's answers to all of them."""
    config = pipeline.config
    engine = (config.evaluation.engine or config.teachers[0].engine).model_dump()
    identity = answers_identity(model.identity, engine, config.answer_length, config.seed)
    folder = pipeline.folder("answers", f"{Path(model.path).name}-{short(identity)}")
    missing = parts.missing_parts(folder, list(plan))
    if not missing:
        skipped(f"answer {name}", folder)
        return folder
    writer = {
        "model": model.path, "revision": model.revision, "engine": engine,
        "max_length": config.answer_length, "seed": config.seed,
    }  # fmt: skip
    todo = [Part(one, plan[one].part.rows, plan[one].part.bytes, plan[one].part.sha256) for one in missing]
    counts: Counter[str] = Counter()
    with StageView(f"answer {name}", "answers", sum(part.rows for part in todo)) as view:
        arguments = {"writer": writer, "plan": dict(plan), "folder": folder}
        for row in make_parts(AnswerPart, arguments, todo, config.resources.teacher):
            counts.update({key: row[key] for key in AnswerPart.nothing})
            view.update(counts["answers"], f"{counts['tokens']:,} tokens, {counts['cut']} cut at max_tokens")
    return folder


def _grades_folder(answers: str, task: AnyTask) -> str:
    return f"{answers}/grades-{grades_identity(task)[:12]}"


def _grade(pipeline: Pipeline, folders: Mapping[str, str], plan: Mapping[str, TaskPart]) -> None:
    task = ray.remote(num_cpus=1)(_grade_one)
    missing = []
    for folder in dict.fromkeys(folders.values()):
        for name, asked in plan.items():
            if not parts.part_exists(_grades_folder(folder, asked.task), name):
                missing.append((asked, folder, name))
    if not missing:
        return
    with StageView("grade", "parts", len(missing)) as view:
        pending = [task.remote(*one) for one in missing]
        while pending:
            done, pending = ray.wait(pending)
            ray.get(done)
            view.update(len(missing) - len(pending))


def _grade_one(asked: TaskPart, answers: str, name: str) -> None:
    grade_part(asked.task, asked.documents, answers, _grades_folder(answers, asked.task), name)


def _scores(model: str, folder: str, task: AnyTask, plan: Mapping[str, TaskPart]) -> list[Scored]:
    grades: list[dict[str, float]] = [{} for _ in range(task.seeds)]
    categories: dict[str, str] = {}
    for name, asked in plan.items():
        grades[asked.number] |= {row["id"]: row["score"] for row in read_grades(_grades_folder(folder, task), name)}
        categories |= {one.id: one.metadata[CATEGORY] for one in asked.documents if CATEGORY in one.metadata}
    ids = list(grades[0])
    values = np.array([[of_seed[one] for of_seed in grades] for one in ids])
    of_ids = [categories[one] for one in ids] if categories else []
    if isinstance(task, Code):
        return [pass_scores(model, task.name, k, ids, values, of_ids) for k in task.k]
    return [task_scores(model, task.name, METRICS[task.type], ids, values, of_ids)]


def _texts(folders: Mapping[str, str], plan: Mapping[str, TaskPart]) -> Texts:
    """Of the first seed."""
    prompts: dict[str, str] = {}
    references: dict[str, str] = {}
    answers: dict[str, dict[str, str]] = {model: {} for model in folders}
    for name, asked in plan.items():
        if asked.number == 0:
            prompts |= {one.id: one.prompt[-1].content for one in asked.documents}
            references |= {one.id: one.response or one.metadata.get("tests", "") for one in asked.documents}
            for model, folder in folders.items():
                answers[model] |= {one.id: one.text for one in read_answers(folder, name)}
    return Texts(prompts, references, answers)


# --- lm-eval -----------------------------------------------------------------------------------------------------


def scores_of_harness(pipeline: Pipeline) -> list[Scored]:
    """What lm-eval says of every model, a Ray task a model; a file each, so that none is asked twice."""
    config = pipeline.config
    asked = config.evaluation.harness
    if not asked:
        return []
    pool = config.resources.teacher
    task = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, resources=pool.custom or None)(run_harness)
    engine = config.evaluation.engine or config.teachers[0].engine
    found = []
    for name, model in _models(pipeline).items():
        options = {"tasks": asked, "limit": config.evaluation.harness_limit, "dtype": engine.dtype}
        file = Path(pipeline.folder("harness", f"{short(model.identity, options)}.json"))
        if file.exists():
            skipped(f"lm-eval {name}", str(file))
        else:
            with StageView(f"lm-eval {name}", "tasks", len(asked)) as view:
                results = ray.get(task.remote(model.path, revision=model.revision, **options))
                write_text(file, json.dumps(results))
                view.update(len(asked))
        found += harness_scores(name, json.loads(file.read_text(encoding="utf-8")))
    return found
