"""The command line as a user meets it: exit codes, what goes to standard output and what to standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from cdm import parts
from cdm.config import parse_config
from tests.test_config import SMALL, changed

ROOT = Path(__file__).resolve().parent.parent


def cdm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cdm.cli", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return str(file)


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    done = cdm("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "score",
        "train",
        "evaluate",
        "pipeline",
        "search",
        "compare",
        "lineage",
        "inspect",
        "config",
        "schema",
    ):
        assert f"\n  {command} " in done.stdout
    program = "import sys, cdm.cli\ntry: cdm.cli.app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(loaded.stdout.splitlines()[-1].split())
    assert "typer" in modules
    assert not modules & {"pydantic", "yaml", "rich", "numpy", "torch", "ray", "transformers", "pyarrow"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "tests"], "tests is a folder: name with --config the config that says how it is evaluated"),
        (["evaluate", "SMALL", "--config", "SMALL"], "--config is for a folder, and SMALL is none"),
        (["evaluate", "SMALL", "--tasks", "arc_easy"], "lm-eval is not installed here: pip install lm-eval"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(small: str, arguments: list[str], message: str) -> None:
    done = cdm(*(argument.replace("SMALL", small) for argument in arguments))
    assert done.returncode == 2 and message.replace("SMALL", small) in done.stderr, done.stderr


def test_config_prints_the_resolved_config(small: str) -> None:
    done = cdm("config", small, "--set", "student.learning_rate=1e-3", "--set", "name=other")
    assert (done.returncode, done.stderr) == (0, "")
    values = yaml.safe_load(done.stdout)
    assert parse_config(values) == parse_config(changed(("student.learning_rate", 1e-3), ("name", "other")))
    assert values["student"]["schedule"] == "cosine", "defaults are filled in"


def test_schema_describes_what_config_prints() -> None:
    done = cdm("schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    assert schema["type"] == "object"
    assert {"name", "corpus", "teachers", "student", "method"} <= set(schema["required"])
    references = {value for key, value in leaves(schema) if key == "$ref"}
    assert references and all(reference.rpartition("/")[2] in schema["$defs"] for reference in references)
    assert {"Cdm", "VllmEngine", "Pretrain"} <= set(schema["$defs"])


def leaves(node: object) -> list[tuple[str, object]]:
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in ([(key, value)] + leaves(value))]
    return [found for item in node for found in leaves(item)] if isinstance(node, list) else []


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ([("sede", 1)], ["error: sede: unknown key; did you mean seed?"]),
        (
            [("method.type", "cmd"), ("student.steps", "few")],
            [
                "error: student.steps: expected a whole number, got 'few'",
                "error: method.type: 'cmd' is not known; one of ",
            ],
        ),
        (
            [("corpus", {"type": "jsonl", "path": "/no/where"})],
            ["error: corpus.path: no such file or folder: /no/where"],
        ),
    ],
)
@pytest.mark.parametrize("command", ["config", "pipeline"])
def test_a_wrong_config_is_exit_code_2(command: str, change: list, lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(changed(*change)))
    done = cdm(command, str(file))
    assert (done.returncode, done.stdout) == (2, "")
    found = done.stderr.splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "none.yaml"], "error: none.yaml: no such config file\n"),
        (["config"], "Missing argument 'CONFIG'"),
        (["fly"], "No such command 'fly'"),
        (["config", "configs/demo.yaml", "--sett", "a=b"], "No such option: --sett"),
        (["config", "configs/demo.yaml", "--set", "seed"], "error: --set seed: expected KEY=VALUE"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], said: str) -> None:
    done = cdm(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_inspect_ends_with_1_and_one_line_where_there_is_nothing(tmp_path: Path) -> None:
    done = cdm("inspect", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path}: expected a corpus, ") and done.stderr.count("\n") == 1


def test_inspect_shows_documents(tmp_path: Path) -> None:
    row = {"id": "one", "prompt": [{"role": "user", "content": "Why?"}], "response": "[bold]Because[/bold]"}
    parts.write_part(str(tmp_path), "train-00000.parquet", pa.Table.from_pylist([row | {"metadata": "{}"}]))
    done = cdm("inspect", str(tmp_path), "--rows", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "unfinished" in done.stdout
    assert "user: Why?" in done.stdout and "response: [bold]Because[/bold]" in done.stdout, "texts are no markup"


def test_lineage_of_nothing_is_one_line(tmp_path: Path) -> None:
    done = cdm("lineage", str(tmp_path / "nothing"), "--storage", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "neither a finished folder of" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("name", "small"), "error: search: missing; "),
        (
            ("search", {"trials": 2, "space": {"student.stepz": {"type": "choice", "values": [1]}}}),
            "error: search.space.student.stepz: unknown key; did you mean steps?",
        ),
    ],
)
def test_a_wrong_search_is_exit_code_2(change: tuple, line: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        yaml.safe_dump(changed(change, ("teachers.0.model", str(tmp_path)), ("student.model", str(tmp_path))))
    )
    done = cdm("search", str(file))
    assert done.returncode == 2 and done.stderr.startswith(line) and "Traceback" not in done.stderr
