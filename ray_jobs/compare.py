"""A comparison: ordinary training runs, several at once, which share all that precedes them; each then evaluated.

What is done is the students' folders and their reports, so a command that was cut short goes on, and another
comparison that asks for the same student finds it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray
from ray.exceptions import RayError

from cdm import parts
from cdm.comparison import Result, compare_section, points
from cdm.config import Config, ConfigError, StudentPool, digest, storage_path
from cdm.export import read_about
from cdm.journal import FOLDER, Journal, RunRef, run_series
from cdm.progress import StageView
from cdm.records import EvalReport
from cdm.student import TrainingJob
from cdm.tracking import Experiment
from ray_jobs.cluster import check_pool, root_cause
from ray_jobs.evaluate import EvaluationJob, evaluate
from ray_jobs.runs import open_top_run, short, what_is_asked
from ray_jobs.stages import Pipeline
from ray_jobs.train import run_training


@dataclass(frozen=True)
class Student:
    """One student and what its driver is given. report: the file of its evaluation; checkpoints: its run's folder."""

    variant: str
    seed: int
    job: TrainingJob
    evaluation: EvaluationJob
    report: Path
    checkpoints: Path
    pool: StudentPool

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def identity(self) -> str:
        return self.job.export.rpartition("-")[2]

    @property
    def done(self) -> bool:
        return Path(self.job.export).exists() and self.report.exists()


def compare_problems(config: Config) -> list[str]:
    """What is wrong with a config's `compare` section, a line each."""
    try:
        points(config)
    except ConfigError as error:
        return error.problems
    return []


def open_comparison(config: Config) -> tuple[Experiment, Journal, str]:
    """Where it is tracked, its run and its folder. Raises ValueError where its students can never fit at once."""
    section, pool = compare_section(config), config.resources.student
    at_once = f"the workers of {section.max_concurrent} students at once"
    check_pool(pool, pool.workers * section.max_concurrent, "compare.max_concurrent, resources.student", at_once)
    identity = short(what_is_asked(config), section.model_dump(mode="json", exclude={"max_concurrent"}))
    experiment = Experiment(config)
    run = open_top_run(experiment, config, "compare", identity)
    return experiment, run, storage_path(config, "comparisons", f"{config.name}-{identity}")


def compare(config: Config, run: Journal) -> tuple[float, list[Result]]:
    """The teacher's bits per byte, and every student's result.

    Raises ValueError naming a student that could not be trained, when all others have been.
    """
    base = Pipeline(config, run)
    evaluation = replace(base.evaluation_job(), samples=0)
    students = prepared(config, run, evaluation)
    with StageView("compare", "students", len(students)) as view:
        failed = _run(
            [student for student in students if not student.done],
            lambda student: base.training_run(f"train {student.title}", student.job, student.identity),
            compare_section(config).max_concurrent,
            lambda note: view.update(sum(student.done for student in students), note),
        )
    if failed:
        raise ValueError(f"compare: {len(failed)} of {len(students)} students failed; {failed[0]}")
    (teacher,) = evaluate(evaluation, "teacher", {}, config.resources.student, on_progress=lambda done: None)
    return teacher.bits_per_byte, [_result(config, student) for student in students]


def prepared(config: Config, run: Journal, evaluation: EvaluationJob) -> list[Student]:
    """Every student, with all that it reads made: once for those whose configs differ in the method alone."""
    pipelines: dict[str, Pipeline] = {}
    found = []
    for point in points(config):
        shared = digest(point.config.model_dump(mode="json", exclude={"method", "baselines"}))
        pipeline = pipelines.setdefault(shared, Pipeline(point.config, run))
        job = pipeline.job(point.config.method)
        name = Path(job.export).name
        measured = short(config.evaluation, parts.read_manifest(evaluation.aligned).fingerprint, name)
        student = Student(
            point.variant, point.seed, job, evaluation, pool=config.resources.student,
            report=Path(pipeline.folder("reports", f"{measured}.json")),
            checkpoints=Path(pipeline.folder("runs", name)),
        )  # fmt: skip
        found.append(student)
    return found


def _run(
    waiting: list[Student],
    open_run: Callable[[Student], Journal],
    at_once: int,
    on_progress: Callable[[str], None],
) -> list[str]:
    """Drives so many students at once to their reports. Returns a line for each that failed."""
    pending: dict[ray.ObjectRef, tuple[Student, Journal]] = {}
    failed = []
    on_progress("")
    while waiting or pending:
        while waiting and len(pending) < at_once:
            student = waiting.pop(0)
            run = open_run(student)
            pending[_driver.remote(student, run.ref)] = student, run
        (ended,), _ = ray.wait(list(pending))
        student, run = pending.pop(ended)
        try:
            run.metrics(student.job.optimisation.steps, ray.get(ended))
        except RayError as error:
            run.close("FAILED")
            failed.append(f"{student.title}: {root_cause(error)}")
            continue
        run.close()
        on_progress(student.title)
    return failed


@ray.remote(num_cpus=0, max_retries=0)
def _driver(student: Student, run: RunRef) -> dict[str, float]:
    """Books no CPU: the workers that it waits for do. Returns what the student's run is told of the evaluation."""
    if not Path(student.job.export).exists():
        student.checkpoints.parent.mkdir(parents=True, exist_ok=True)
        Path(student.job.export).parent.mkdir(parents=True, exist_ok=True)
        run_training(
            student.job, student.pool, folder=str(student.checkpoints.parent), name=student.checkpoints.name,
            run=run, on_metrics=lambda step, metrics: None,
        )  # fmt: skip
    shutil.rmtree(student.checkpoints, ignore_errors=True)
    folders = {student.title: (student.job.export, None)}
    _, report = evaluate(student.evaluation, "teacher", folders, student.pool, on_progress=lambda done: None)
    parts.write_bytes(str(student.report.parent), student.report.name, json.dumps([asdict(report)]).encode())
    return {"bits_per_byte": report.bits_per_byte, "agreement": report.agreement or 0.0}


def _result(config: Config, student: Student) -> Result:
    (report,) = (EvalReport(**one) for one in json.loads(student.report.read_text(encoding="utf-8")))
    about = read_about(student.job.export)
    series = run_series(storage_path(config, FOLDER, f"train-{student.identity}"))
    unmapped = [value for name in ("mass_unmapped", "teacher0.mass_unmapped") for _, value in series.get(name, [])]
    return Result(
        student.variant,
        student.seed,
        bits_per_byte=report.bits_per_byte,
        agreement=report.agreement,
        steps=about["steps"],
        seconds=about["seconds"],
        step_seconds=about.get("step_seconds"),
        peak_memory_gib=about["peak_memory_gib"],
        unmapped=sum(unmapped) / len(unmapped) if unmapped else None,
    )


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("compare")
