"""The door. Options are read first and the heavy imports follow, so that `cdm --help` is quick.

Exit codes: 0 done, 1 the job failed, 2 the config or the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cdm.config import Config

app = typer.Typer(
    help="Distil a language model into a student with another tokenizer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    rich_markup_mode=None,  # its boxes cost half of the start-up time
)
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, for instance configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. student.learning_rate=1e-4")
]
SHOWN_FAULTS = 10  # by `verify`, the first ones
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"


def fail(message: str, code: int) -> None:
    """One clear line a problem on standard error, then the exit code."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    raise SystemExit(code)


def read(config: str, overrides: list[str] | None) -> Config:
    from cdm.config import ConfigError, load_config

    try:
        return load_config(config, overrides)
    except ConfigError as error:
        fail(str(error), 2)
        raise


@app.command()
def demo(overrides: Overrides = None) -> None:
    """The whole pipeline on this machine: the Python packages here as the corpus, two small models made from it."""
    _run(str(DEMO), [*_gpu_overrides(), *(overrides or [])], "pipeline")


def _gpu_overrides() -> list[str]:
    """The demo's resources on a machine with NVIDIA GPUs: one engine, and up to two workers, with a GPU each."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        return []
    student = [f"resources.student.workers={min(2, gpus)}", "resources.student.gpus=1"]
    return ["resources.teacher.actors=1", "resources.teacher.gpus=1", *student]


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make the models of the config that are of `type: pretrain`."""
    _run(config, overrides, "pretrain")


@app.command()
def generate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the responses that the config's `generation` section asks for (and make all that this needs)."""
    _run(config, overrides, "generate")


@app.command()
def score(config: ConfigPath, overrides: Overrides = None) -> None:
    """Score the corpus with every teacher (and all that this needs)."""
    _run(config, overrides, "score")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the student with the config's method (and all that this needs)."""
    _run(config, overrides, "train")


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(metavar="CONFIG|FOLDER", help="a YAML file, or the folder of a model")],
    like: Annotated[
        str | None, typer.Option("--config", metavar="CONFIG", help="of a folder: how, and with which teacher")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="tasks of EleutherAI's lm-eval, with commas between them")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Evaluate teacher and students on held-out documents and tasks (and all that this needs)."""
    more = [] if tasks is None else [f"evaluation.harness=[{tasks}]"]
    folder = os.path.isdir(what)
    if folder and like is None:
        fail(f"{what} is a folder: name with --config the config that says how it is evaluated", 2)
    if not folder and like is not None:
        fail(f"--config is for a folder, and {what} is none", 2)
    checked = read(like or what, [*(overrides or []), *more])
    from ray_jobs.pipeline import run_evaluation, run_stages

    sys.exit(run_evaluation(checked, what) if folder else run_stages(checked, "evaluate"))


@app.command()
def pipeline(config: ConfigPath, overrides: Overrides = None) -> None:
    """Every stage of the config, in order; what is done already is not done again."""
    _run(config, overrides, "pipeline")


@app.command()
def search(
    config: ConfigPath,
    retrain: Annotated[
        int | None, typer.Option(metavar="STEPS", help="train the best once more, so long", min=1)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Try the values of the config's `search` section; trials share all that precedes training."""
    checked = read(config, overrides)
    from ray_jobs.pipeline import run_search

    sys.exit(run_search(checked, retrain))


@app.command()
def compare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the variants of the config's `compare` section, several seeds each, and hold them against each other."""
    checked = read(config, overrides)
    from ray_jobs.pipeline import run_compare

    sys.exit(run_compare(checked))


def _run(config: str, overrides: list[str] | None, until: str) -> None:
    checked = read(config, overrides)
    from ray_jobs.pipeline import run_stages

    sys.exit(run_stages(checked, until))


@app.command()
def plan(
    config: ConfigPath,
    cluster: Annotated[
        str | None, typer.Option(metavar="FILE", help="a Ray cluster file: its nodes, how many of them, their prices")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE", help="entries over those of cdm/rates.yaml: devices, prices, speeds")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="first run all stages in miniature, here")] = False,
    overrides: Overrides = None,
) -> None:
    """What a config takes before it runs: tokens, bytes, device-hours, memory, wall time, cost."""
    checked = read(config, overrides)
    if measure:
        from ray_jobs.measure import measure as run_miniature

        code = run_miniature(checked)
        if code:
            sys.exit(code)
    from cdm.plan_view import print_plan
    from cdm.progress import console

    try:
        problems = print_plan(checked, cluster, prices, console)
    except (ValueError, OSError) as error:
        fail(str(error), 2)
        raise
    if problems:
        fail("\n".join(problems), 1)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="a corpus, shards, aligned, model or run folder, or a part of one")],
    rows: Annotated[int, typer.Option(help="documents shown")] = 3,
) -> None:
    """What is in a folder or a part, with decoded samples, the teacher's top 5 and the alignment drawn."""
    from cdm.inspection import inspect_path

    try:
        inspect_path(path, rows)
    except (ValueError, OSError) as error:
        fail(str(error), 1)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="a finished corpus, shards or aligned folder, or a URL of one")],
    sample: Annotated[int, typer.Option(help="documents of shards that are scored again; 0: none")] = 4,
) -> None:
    """Whether a folder holds what it says: checksums, counts, probabilities, and a sample scored again."""
    from cdm.text_view import print_facts
    from cdm.verification import verify_folder

    try:
        found = verify_folder(path.rstrip("/"), sample=sample)
    except (ValueError, OSError) as error:
        fail(str(error), 1)
        raise
    print_facts(f"{'WRONG' if found.faults else 'right'}: {path}", found.checked)
    if found.faults:
        more = len(found.faults) - SHOWN_FAULTS
        fail("\n".join(found.faults[:SHOWN_FAULTS] + ([f"... and {more} more"] if more > 0 else [])), 1)


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="a folder of a storage folder, or a run by its name or id")],
    storage: Annotated[str, typer.Option(help="of a run; a folder is in its own")] = "outputs",
) -> None:
    """What a folder or a run's output was made from, and what was made from it; no server is asked."""
    from cdm.lineage import Lineage, print_lineage, storage_of
    from cdm.progress import console

    try:
        found = Lineage(storage_of(what) or storage if os.path.exists(what) else storage)
        print_lineage(found, found.resolve(what), console)
    except (ValueError, OSError) as error:
        fail(str(error), 1)


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """The resolved config: every default filled in."""
    import yaml

    typer.echo(yaml.safe_dump(read(config, overrides).model_dump(mode="json"), sort_keys=False), nl=False)


@app.command()
def schema() -> None:
    """The config's JSON schema, for editors."""
    from cdm.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def ui(
    config: Annotated[str, typer.Argument(metavar="CONFIG")] = str(DEMO),
    port: Annotated[int, typer.Option(help="on loopback")] = 5000,
    overrides: Overrides = None,
) -> None:
    """The MLflow page of a config's runs, on loopback."""
    checked = read(config, overrides)
    from cdm.tracking import tracking_uri

    try:
        uri = tracking_uri(checked)
    except ValueError as error:
        fail(str(error), 2)
        raise
    where = ["--host", "127.0.0.1", "--port", str(port)]
    one = ["--workers", "1"]  # four, MLflow's default, take four times as long to start
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, *where, *one]
    typer.echo(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning  ({uri})")
    os.execv(sys.executable, command)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
