"""A search: Ray Tune around ordinary training runs, which share everything that precedes training.

A trial's driver is a plain function in an actor that books no CPU: it launches a Ray Train run (a placement group, so
workers start all together or wait) and passes its validations on. Whatever trials read was made before they start.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ray import tune
from ray.train import TrainingFailedError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from cdm import parts
from cdm.checkpoints import Metrics
from cdm.config import Config, ConfigError, storage_path
from cdm.config_search import AnyDistribution, Choice, Int, LogUniform, Search
from cdm.export import ABOUT, keep_about, read_about
from cdm.journal import Journal, RunRef, read_events
from cdm.progress import StageView, skipped
from cdm.search import (
    exact_parameters,
    finite_values,
    parameter,
    preparation_key,
    preparations,
    search_section,
    space_problems,
    trial_config,
    trial_count,
)
from cdm.student import TrainingJob
from cdm.tracking import Experiment
from cdm.trials import State, Trial, best_trial, read_trials, write_results
from cdm.validation import VALIDATION_METRICS
from ray_jobs.cluster import check_pool
from ray_jobs.runs import open_top_run, short, what_is_asked
from ray_jobs.stages import Pipeline
from ray_jobs.train import Bookings, run_training

STATE = "tune"  # what Tune knows, beside the trials' folders
FAILED = "failed"
DRIVER = {"memory": 1.0}  # a byte: Tune wants something booked, and a CPU, or a part of one, is the workers'
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one can be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every trial has its own log
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # a killed driver forgets no more than this
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Shared:
    """What every trial is given. `ready`: a job a combination of the values that earlier stages read; `bookings`: an
    actor of the search's driver, `ray_jobs.train.Bookings`.
    """

    config: Config
    identity: str
    folder: str
    run: RunRef
    ready: dict[str, TrainingJob]
    bookings: Any


def search_problems(config: Config) -> list[str]:
    """What is wrong with a config's `search` section, a line each."""
    try:
        found = space_problems(config)
    except ConfigError as error:
        return error.problems
    metric = search_section(config).metric
    if metric not in VALIDATION_METRICS:
        found.append(f"search.metric: {metric!r} is not known; one of {', '.join(VALIDATION_METRICS)}")
    return found


def search(config: Config, run: Journal, identity: str) -> tuple[str, list[Trial]]:
    """The folder of a finished search and its trials, in the order they began; one that was cut short goes on.

    Raises ValueError where no trial finished.
    """
    section = search_section(config)
    folder = storage_path(config, "searches", f"{config.name}-{identity}")
    trials = read_trials(folder, section)
    if trials is not None:
        skipped("search", folder)
        return folder, trials
    os.environ.update(ENVIRONMENT)
    bookings = Bookings.remote()  # type: ignore[attr-defined]
    shared = Shared(config, identity, folder, run.ref, prepared(config, run), bookings)
    with StageView("search", "trials", trial_count(section)) as view:
        _Watcher.view, _Watcher.ended = view, []
        _tuner(section, shared).fit()
        trials = [_trial(one, section) for one in _Watcher.ended]
        view.update(len(trials), _note(trials, section))
    for trial in trials:
        _end_run(shared, trial)  # a stopped trial's process may have had the last word as it went down
    best = best_trial(trials, section)
    if best is None:
        failed = [trial_folder(folder, trial.id) / FAILED for trial in trials]
        reasons = [file.read_text(encoding="utf-8") for file in failed if file.exists()]
        raise ValueError(f"search: none of {len(trials)} trials finished; {(reasons or ['no reason is known'])[0]}")
    _keep_student(shared, best, run)
    write_results(config, trials, best, folder)
    for leftover in ("trials", STATE):
        shutil.rmtree(Path(folder, leftover), ignore_errors=True)
    return folder, trials


def open_search(config: Config) -> tuple[Experiment, Journal, str]:
    """Where the search is tracked, its run and its identity. Raises ValueError where its trials can never fit."""
    section, pool = search_section(config), config.resources.student
    at_once = f"the workers of {section.max_concurrent} trials at once"
    check_pool(pool, pool.workers * section.max_concurrent, "search.max_concurrent, resources.student", at_once)
    identity = short(what_is_asked(config), section.model_dump(mode="json", exclude={"max_concurrent"}))
    experiment = Experiment(config)
    return experiment, open_top_run(experiment, config, "search", identity), identity


def prepared(config: Config, run: Journal) -> dict[str, TrainingJob]:
    """All that precedes training, made once for every combination of the values that it depends on."""
    section = search_section(config)
    found = {}
    for values in preparations(section):
        one = trial_config(config, values)
        found[preparation_key(section, values)] = Pipeline(one, run).job(one.method)
    return found


# --- a trial -----------------------------------------------------------------------------------------------------


def run_trial(parameters: dict[str, Any], shared: Shared) -> None:
    """The driver of one trial, in an actor of its own: a training run a seed, one after the other.

    Validations of the first seed are reported as they come, for the scheduler; the last report is the mean over seeds.
    A trial that failed by itself fails again at once; one that was killed goes on from its checkpoints. The run of one
    that the scheduler stops is ended by the search's driver: this process is taken down, wherever it is.
    """
    trial = tune.get_context().get_trial_id()
    folder = trial_folder(shared.folder, trial)
    failed = folder / FAILED
    if failed.exists():
        raise ValueError(failed.read_text(encoding="utf-8"))
    run = trial_run(shared, trial)
    run.params(exact_parameters(search_section(shared.config), parameters))
    try:
        final = _run_seeds(parameters, shared, folder, run)
    except (ValueError, TrainingFailedError) as error:
        parts.write_bytes(str(folder), FAILED, str(error).encode())
        run.close("FAILED")
        raise
    run.close()
    tune.report(final)


def _run_seeds(parameters: dict[str, Any], shared: Shared, folder: Path, run: Journal) -> dict[str, Any]:
    section, config = search_section(shared.config), trial_config(shared.config, parameters)
    ready = shared.ready[preparation_key(section, parameters)]
    weights = tuple(teacher.weight for teacher in config.teachers)
    made = []
    for number in range(section.seeds):
        of_seed = run if number == 0 else trial_run(shared, f"{folder.name}-seed{number}", run.ref)
        job = replace(
            ready, optimisation=config.student, method=config.method, weights=weights,
            seed=config.student_seed + number, documents=config.student.max_documents,
            export=str(folder / f"student-{number}"),
            lora=config.student.lora, freeze_embeddings=config.student.freeze_embeddings,
        )  # fmt: skip
        validations = _Validations(of_seed.ref, section.metric, config.student.steps, report=number == 0)
        validations.read()
        if not Path(job.export, ABOUT).exists():
            run_training(
                job,
                config.resources.student,
                folder=str(folder),
                name=f"run-{number}",
                run=of_seed.ref,
                on_metrics=validations.on_metrics,
                bookings=shared.bookings,
            )
            validations.read()
        made.append(read_about(job.export))
        shutil.rmtree(folder / f"run-{number}", ignore_errors=True)
        if number:  # of the first seed the student is wanted, of the others the figures alone
            of_seed.close()
            keep_about(job.export)
    values = [_figure(about, section.metric) for about in made]
    return {
        "step": made[0]["steps"], section.metric: float(np.mean(values)), "spread": float(np.std(values)),
        "seconds": sum(about["seconds"] for about in made), "finished": True,
    }  # fmt: skip


def _figure(about: dict[str, Any], metric: str) -> float:
    """A figure of an exported student. Raises ValueError where it was not measured, or is not finite."""
    value = about["figures"].get(metric, math.nan)
    if not math.isfinite(value):
        raise ValueError(f"search.metric: {metric} of the student is {value}; was it measured with this method?")
    return float(value)


class _Validations:
    """The validations of a run, read off its log as they come; all but that of the last step are reported to Tune.

    The trial's last report has the figures of the students that were exported instead.
    """

    def __init__(self, run: RunRef, metric: str, steps: int, *, report: bool) -> None:
        self._path, self._offset = Path(run.folder, "worker.jsonl"), 0
        self._metric, self._steps, self._report = metric, steps, report
        self._seconds = 0.0

    def on_metrics(self, step: int, metrics: Metrics) -> None:
        """Whatever is said of a step, all that the log has is read: a report is never skipped."""
        self.read()

    def read(self) -> None:
        events, self._offset = read_events(self._path, self._offset)
        for logged in (event["metrics"] for event in events if "metrics" in event):
            self._seconds = logged["values"].get("seconds", self._seconds)
            value = logged["values"].get(self._metric)
            if self._report and value is not None and logged["step"] < self._steps:
                tune.report({"step": logged["step"], self._metric: value, "seconds": self._seconds, "finished": False})


def trial_folder(folder: str, trial: str) -> Path:
    return Path(folder, "trials", trial)


def trial_run(shared: Shared, trial: str, parent: RunRef | None = None) -> Journal:
    return Experiment(shared.config).run("trial", f"trial {trial}", f"{shared.identity}-{trial}", parent or shared.run)


def _end_run(shared: Shared, trial: Trial) -> None:
    """The run of a trial that ended, as what it was."""
    run = trial_run(shared, trial.id)
    if trial.state == "stopped":
        run.tags({"cdm.stopped": f"at step {trial.step}"})
    run.close("FAILED" if trial.state == "failed" else "FINISHED")


# --- Tune --------------------------------------------------------------------------------------------------------


def _tuner(section: Search, shared: Shared) -> tune.Tuner:
    """A new search, or the one that `shared.folder` holds, gone on with: what ended is kept."""
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), DRIVER)
    state = f"{shared.folder}/{STATE}"
    if tune.Tuner.can_restore(state):
        return tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    space = {name: _domain(section, one) for name, one in section.space.items()}
    steps = max(one.optimisation.steps for one in shared.ready.values())
    if "student.steps" in section.space:
        steps = int(max(finite_values(section.space["student.steps"]) or [steps]))
    seed = shared.config.seed
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=section.metric,
            mode=section.mode,
            search_alg=OptunaSearch(seed=seed) if section.searcher == "optuna" else None,
            scheduler=_scheduler(section, steps),
            num_samples=section.trials or 1,
            max_concurrent_trials=section.max_concurrent,
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=shared.folder,
            callbacks=[_Watcher(section, shared)],
            failure_config=tune.FailureConfig(max_failures=shared.config.resources.student.max_failures),
            verbose=0,
        ),
    )


def _scheduler(section: Search, steps: int) -> ASHAScheduler | None:
    if section.scheduler == "none":
        return None
    return ASHAScheduler(time_attr="step", max_t=steps, grace_period=section.grace_steps or max(1, steps // 4))


def _domain(section: Search, distribution: AnyDistribution) -> Any:
    values = finite_values(distribution)
    if section.searcher == "grid":
        return tune.grid_search([parameter(value) for value in values or ()])
    if isinstance(distribution, Choice):
        return tune.choice([parameter(value) for value in distribution.values])
    if isinstance(distribution, LogUniform):
        return tune.loguniform(distribution.low, distribution.high)
    if isinstance(distribution, Int):
        return tune.qrandint(distribution.low, (values or [distribution.high])[-1], distribution.step)
    if distribution.step is None:
        return tune.uniform(distribution.low, distribution.high)
    return tune.quniform(distribution.low, (values or [distribution.high])[-1], distribution.step)


class _Watcher(tune.Callback):
    """On the search's driver: the progress line, the end of stopped trials' runs, and what trials leave on the disk.

    Tune pickles it with the search and unpickles it when that goes on, so it holds plain values.
    """

    view: ClassVar[StageView]
    ended: ClassVar[list[Any]]

    def __init__(self, section: Search, shared: Shared) -> None:
        self._section, self._shared = section, replace(shared, ready={}, bookings=None)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        value = result[self._section.metric]
        now = f"{trial.trial_id}: step {result['step']}, {value:.4f}"
        self._show(trials, now)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = _trial(trial, self._section)
        _end_run(self._shared, ended if ended.state == "finished" else replace(ended, state="stopped"))
        self._clean(trials, trial)
        self._show(trials, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _end_run(self._shared, replace(_trial(trial, self._section), state="failed"))
        self._show(trials, "")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        _Watcher.ended = list(trials)

    def _clean(self, trials: list[Any], ended: Any) -> None:
        """Nothing stays of trials that ended, but for the student of the best one."""
        over = [trial for trial in trials if trial is ended or trial.status == "TERMINATED"]
        best = best_trial([_trial(trial, self._section) for trial in over], self._section)
        for trial in over:
            if best is None or trial.trial_id != best.id:
                shutil.rmtree(trial_folder(self._shared.folder, trial.trial_id), ignore_errors=True)

    def _show(self, trials: Sequence[Any], now: str) -> None:
        known = [_trial(trial, self._section) for trial in trials]
        ended = sum(trial.status in ("TERMINATED", "ERROR") for trial in trials)
        self.view.update(ended, ", ".join(filter(None, [_note(known, self._section), now])))


def _note(trials: Sequence[Trial], section: Search) -> str:
    best, failed = best_trial(trials, section), sum(trial.state == "failed" for trial in trials)
    said = [f"best {best.value:.4f} ({best.id})"] if best is not None else []
    return ", ".join(said + ([f"{failed} failed"] if failed else []))


def _trial(found: Any, section: Search) -> Trial:
    """One of Tune's trials."""
    result = found.last_result or {}
    states: dict[str, State] = {"ERROR": "failed", "TERMINATED": "stopped"}
    return Trial(
        id=found.trial_id,
        state="finished" if result.get("finished") else states.get(found.status, "running"),
        parameters=exact_parameters(section, found.config),
        step=int(result.get("step", 0)),
        value=result.get(section.metric),
        spread=result.get("spread"),
        seconds=float(result.get("seconds", 0.0)),
    )


def _keep_student(shared: Shared, best: Trial, run: Journal) -> None:
    """The best trial's student goes where `cdm train best.yaml` looks for it."""
    config = trial_config(shared.config, best.parameters)
    export = Pipeline(config, run).job(config.method).export
    if not Path(export).exists():
        Path(export).parent.mkdir(parents=True, exist_ok=True)
        os.replace(trial_folder(shared.folder, best.id) / "student-0", export)
    run.tags({"cdm.export": export})


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("search")
