"""A config from the command line to the exit code: `python -m ray_jobs.pipeline CONFIG` is `cdm pipeline CONFIG`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from ray.exceptions import RayError
from ray.train import TrainingFailedError

from cdm import sandbox
from cdm.checks import check_problems
from cdm.comparison import (
    MARKDOWN,
    compare_section,
    print_comparison,
    summaries,
    table_columns,
    write_comparison,
)
from cdm.config import Config, ConfigError, load_config, storage_path
from cdm.config_models import Pretrain, Student, Teacher
from cdm.config_search import Search
from cdm.config_tasks import Code
from cdm.evaluation import held_out, sample_prompts
from cdm.figures import (
    best_so_far_figure,
    bits_figure,
    comparison_figure,
    coverage_figure,
    has_coverage,
    importance_figure,
    loss_figure,
    parallel_figure,
    svg,
)
from cdm.harness import harness_problems
from cdm.journal import ARTIFACTS, Journal, closing
from cdm.models import check_pair, context_problems
from cdm.overview import Reviewed, compare_page, pipeline_page, search_page
from cdm.page import Section
from cdm.preflight import device_bytes, memory_problems
from cdm.progress import console
from cdm.report import (
    Columns,
    description,
    mappings_table,
    print_results,
    print_samples,
    results,
    results_figure,
    samples_table,
)
from cdm.score_view import score_sections
from cdm.scores import (
    HELD_OUT,
    Scored,
    category_columns,
    comparison_columns,
    comparisons,
    held_out_scores,
    score_columns,
    score_report,
)
from cdm.search import search_section, trial_config
from cdm.tracking import code_version
from cdm.trials import BEST, Trial, best_trial, print_trials, ranked, read_importance
from ray_jobs.cluster import IN_JOB, check_pool, connect, root_cause
from ray_jobs.compare import compare, compare_problems, open_comparison
from ray_jobs.runs import short, what_is_asked
from ray_jobs.search import open_search, search, search_problems
from ray_jobs.stages import Pipeline, write_text
from ray_jobs.tasks import GivenStudent, scores_of_harness, scores_of_tasks


def show(pipeline: Pipeline) -> None:
    """The table, the samples and where everything is: printed, and logged to the pipeline's run."""
    reports, run = pipeline.reports, pipeline.run
    columns = results(reports, pipeline.students)
    print_results(columns, console)
    scored, compared = show_scores(pipeline)
    print_samples(reports[-1], console)
    run.tags({MLFLOW_RUN_NOTE: description(columns)})
    run.table("results", columns)
    run.table("samples", samples_table(reports))
    if reports[-1].mappings:
        run.table("mappings", mappings_table(reports[-1]))
    run.figure("results.png", results_figure(columns))
    show_runs(pipeline, columns, score_sections(scored, compared))
    for report in reports:
        name = plain(report.name)
        run.metrics(0, {f"bits_per_byte.{name}": report.bits_per_byte, f"agreement.{name}": report.agreement or 0.0})
    student = pipeline.students[reports[-1].name]
    if not isinstance(pipeline, GivenStudent):
        run.folder("student", student)
        run.model(pipeline.config.name, student, reports[-1].bits_per_byte)
    console.print(f"student: {student}", soft_wrap=True)
    console.print("runs:    `make ui` or `cdm ui CONFIG` opens MLflow on this machine")


def plain(name: str) -> str:
    """A name of what MLflow takes in the names of metrics and artefacts."""
    return re.sub(r"[^\w./-]+", "_", name)


def show_scores(pipeline: Pipeline) -> tuple[list[Scored], list[dict[str, Any]]]:
    """What every model scored, and the last one against the others: printed, logged, and JSON beside the report."""
    run = pipeline.run
    of_tasks, texts = scores_of_tasks(pipeline)
    scored = held_out_scores(pipeline.reports) + of_tasks + scores_of_harness(pipeline)
    compared = comparisons(scored, texts)
    columns = score_columns(scored)
    if columns["model"]:
        print_results(columns, console, "Tasks")
    tables = {"tasks": columns, "categories": category_columns(scored), "differences": comparison_columns(compared)}
    for name, table in tables.items():
        if table["model"]:
            run.table(name, table)
    text = score_report(scored, compared)
    run.text("scores.json", text)
    file = pipeline.folder(
        "reports", f"scores-{short(what_is_asked(pipeline.config), list(pipeline.students.values()))}.json"
    )
    write_text(Path(file), text)
    for one in scored:
        if one.task != HELD_OUT:
            run.metrics(0, {plain(f"{one.task}.{one.metric}.{one.model}"): one.interval.value})
    console.print(f"scores:  {file}", soft_wrap=True)
    return scored, compared


def show_runs(pipeline: Pipeline, columns: Columns, scores: Sequence[Section]) -> None:
    """Curves and coverage as figures of the run, and the page with all that there is to see."""
    config, run, runs = pipeline.config, pipeline.run, pipeline.runs
    aligned = pipeline.align(pipeline.corpus, pipeline.student, pipeline.shards, config.student.max_length)
    rows = held_out(aligned, pipeline.shards, config.evaluation.samples) if config.evaluation.samples else []
    texts = {document.id: document.response for document in sample_prompts(pipeline.corpus, rows, len(rows))}
    if runs:
        run.figure("loss.png", loss_figure(runs))
        run.figure("bits_per_byte.png", bits_figure(runs, pipeline.reports[0].bits_per_byte))
    for name, series in runs.items():
        if has_coverage(series):
            run.figure(f"coverage-{plain(name)}.png", coverage_figure(series))
    seen = Reviewed(config, code_version(), columns, pipeline.reports, runs, rows, texts, scores)
    run.text("overview.html", pipeline_page(seen))
    console.print(f"page:    {run.ref.folder}/{ARTIFACTS}/overview.html", soft_wrap=True)


def run_stages(config: Config, until: str) -> int:
    """Runs a config up to a stage: pretrain, generate, score, train, evaluate or pipeline (all). Returns the exit code.

    2: the models cannot work together, nothing was started. 1: a stage failed, said in one line; the traceback is in
    the storage folder. 130: interrupted. In each case the same command goes on from where it was.
    """
    problems = preflight(config)
    if until == "generate" and config.generation is None:
        problems.append("generation: missing; without this section every response is given")
    return _exit_code(config, problems, lambda: _run_until(config, until))


def run_evaluation(config: Config, folder: str) -> int:
    """Evaluates the model in a folder as the config says, as its student; nothing is trained. Exit codes as above."""
    given = GivenStudent.config_for(config, folder)
    return _exit_code(given, preflight(given), lambda: _evaluate(given))


def _evaluate(config: Config) -> None:
    check_pools(config)
    pipeline = GivenStudent(config)
    with pipeline.experiment, closing(pipeline.run):
        show(pipeline)


def run_search(config: Config, retrain: int | None = None) -> int:
    """Runs the config's search, and then trains the best once more for `retrain` steps. Exit codes as above."""
    return _exit_code(config, search_problems(config) + preflight(config), lambda: _search(config, retrain))


def _run_until(config: Config, until: str) -> None:
    check_pools(config)
    pipeline = Pipeline(config)
    with pipeline.experiment, closing(pipeline.run):
        STAGES[until](pipeline)


def _search(config: Config, retrain: int | None) -> None:
    check_pools(config)
    experiment, run, identity = open_search(config)
    with experiment, closing(run):
        folder, trials = search(config, run, identity)
        section = search_section(config)
        shares = read_importance(folder)
        print_trials(trials, section, shares, console)
        run.text("overview.html", search_page(config, section, trials, shares))
        show_search(run, trials, section, shares)
        best = best_trial(trials, section)
        assert best is not None  # `search` has seen to it
        chosen = trial_config(config, best.parameters)
        if retrain is not None:
            longer = chosen.model_copy(update={"student": chosen.student.model_copy(update={"steps": retrain})})
            student = Pipeline(longer, run).trained(longer.method)
            console.print(f"student, {retrain} steps: {student}", soft_wrap=True)
        console.print(f"best config: {folder}/{BEST}", soft_wrap=True)
        console.print(f"page:        {run.ref.folder}/{ARTIFACTS}/overview.html", soft_wrap=True)


def run_compare(config: Config) -> int:
    """Trains and evaluates all variants of the config's `compare` section. Exit codes as above."""
    return _exit_code(config, compare_problems(config) + preflight(config), lambda: _compare(config))


def _compare(config: Config) -> None:
    check_pools(config)
    experiment, run, folder = open_comparison(config)
    with experiment, closing(run):
        teacher, results = compare(config, run)
        section = compare_section(config)
        found = summaries(section, teacher, results)
        columns = table_columns(found, section)
        drawn = comparison_figure(found, section)
        print_comparison(columns, teacher, console)
        run.table("comparison", columns)
        run.figure("comparison.png", drawn)
        run.text("overview.html", compare_page(config, section, columns, teacher, drawn))
        for one in found:
            means = {"bits_per_byte": one.bits_per_byte, "gap_closed": one.gap, "agreement": one.agreement}
            run.metrics(0, {f"{name}.{one.variant}": value.mean for name, value in means.items() if value is not None})
        write_comparison(folder, teacher, results, found, columns, svg(drawn))
        console.print(f"comparison: {folder}/{MARKDOWN}", soft_wrap=True)
        console.print(f"page:       {run.ref.folder}/{ARTIFACTS}/overview.html", soft_wrap=True)


def show_search(run: Journal, trials: list[Trial], section: Search, shares: dict[str, float]) -> None:
    """The figures of a search, as artefacts of its run."""
    shown = ranked(trials, section)[:10]
    columns: Columns = {name: [getattr(trial, name) for trial in shown] for name in ("id", "state", "step")}
    columns |= {section.metric: [None if trial.value is None else round(trial.value, 4) for trial in shown]}
    run.tags({MLFLOW_RUN_NOTE: description(columns)})
    run.figure("parallel.png", parallel_figure(trials, section))
    run.figure("best_so_far.png", best_so_far_figure(trials, section))
    if shares:
        run.figure("importance.png", importance_figure(shares))


def _exit_code(config: Config, problems: list[str], run: Callable[[], None]) -> int:
    """Runs what a command runs, on Ray, unless there are problems already."""
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        with connect():
            run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RayError, TrainingFailedError, MlflowException) as error:
        saved = _save_traceback(config)
        print(f"error: {root_cause(error)}\n({saved}; the same command goes on from here)", file=sys.stderr)
        return 1
    return 0


def _save_traceback(config: Config) -> str:
    """Where the traceback of the error in hand is, or why it is nowhere."""
    log = storage_path(config, "error.log")
    try:
        write_text(Path(log), traceback.format_exc())
    except OSError as error:  # the folder may be what is full
        return f"no traceback: {error}"
    return f"traceback: {log}"


STAGES: dict[str, Callable[[Pipeline], object]] = {
    "pretrain": lambda pipeline: (pipeline.teachers, pipeline.student),
    "generate": lambda pipeline: pipeline.corpus_manifest,
    "score": lambda pipeline: pipeline.shards,
    "train": lambda pipeline: pipeline.trained(pipeline.config.method),
    "evaluate": show,
    "pipeline": show,
}


def check_pools(config: Config) -> None:
    """Raise ValueError where this machine can never hold one engine, or the workers that the student needs."""
    check_pool(config.resources.teacher, 1, "resources.teacher", "an engine's workers")
    student = config.resources.student
    check_pool(student, student.min_workers or student.workers, "resources.student", "the workers")


def preflight(config: Config) -> list[str]:
    """Why the config's models cannot work together; models that are yet to be made are not looked at."""
    teachers = [*config.teachers, *([config.generator] if config.generation is not None else [])]
    ready = [section.model for section in [*teachers, config.student]]
    paths = [None if isinstance(model, Pretrain) else (model.name, model.revision) for model in ready]
    found = [problem for teacher in paths[:-1] for problem in check_pair(teacher, paths[-1])]
    sections: list[Teacher | Student] = [*teachers, config.student]
    for section in sections:
        if not isinstance(section.model, Pretrain):
            found += context_problems(section.model.name, section.model.revision, section.max_length)
    if config.evaluation.tasks:
        for answering in (config.teachers[0], config.student):
            if not isinstance(answering.model, Pretrain):
                found += context_problems(answering.model.name, answering.model.revision, config.answer_length)
    student, pool = config.student, config.resources.student
    if not found and pool.gpus and not isinstance(student.model, Pretrain):
        found += memory_problems(student.model.name, student.model.revision, student, pool.workers, device_bytes())
    if config.generation is not None and config.generation.check is not None:
        found += check_problems(config.generation.check.model_dump())
    if any(isinstance(task, Code) for task in config.evaluation.tasks):
        found += filter(None, [sandbox.problem()])
    if config.evaluation.harness:
        found += harness_problems()
    if IN_JOB in os.environ and not os.path.isabs(os.path.expanduser(config.storage)):
        found.append(f"storage: {config.storage} would be lost with the job's working directory; give a full path")
    return list(dict.fromkeys(found))


def main(until: str) -> None:
    """`python -m ray_jobs.<stage> CONFIG [--set KEY=VALUE]...`: what `ray job submit` starts."""
    parser = argparse.ArgumentParser(prog=f"python -m ray_jobs.{until}")
    parser.add_argument("config")
    parser.add_argument("--set", dest="overrides", action="append", metavar="KEY=VALUE", default=[])
    if until == "search":
        parser.add_argument("--retrain", type=int, metavar="STEPS")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        parser.exit(2, "".join(f"error: {problem}\n" for problem in error.problems))
    if until == "search":
        sys.exit(run_search(config, arguments.retrain))
    sys.exit(run_compare(config) if until == "compare" else run_stages(config, until))


if __name__ == "__main__":
    main("pipeline")
