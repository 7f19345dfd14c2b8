"""A real comparison on the tiny pipeline's scores, two students at a time; killed and gone on with."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from cdm.journal import run_facts, run_folders, run_series
from tests.test_search_job import kill, scores
from tests.whole import CONFIG, finish, start, students, without_the_student, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

COMPARE = {
    "variants": {"sft": {"method": {"type": "sft"}}, "cdm": {"method.tail": "residual"}},
    "seeds": 2,
    "max_concurrent": 2,
}
STUDENT = {**CONFIG["student"], "best": None, "max_documents": 50}  # type: ignore[dict-item]
ONE_WORKER = {"student": {"workers": 1}}


def of_students(storage: Path) -> dict[str, int]:
    """Those that are whole."""
    return {folder.name: folder.stat().st_mtime_ns for folder in students(storage) if folder.suffix != ".unfinished"}


def test_a_killed_comparison_makes_what_is_missing(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    without_the_student(finished[0], storage)
    before, scored = of_students(storage), scores(storage)
    config = write_config(tmp_path, storage, compare=COMPARE, student=STUDENT, resources=ONE_WORKER)
    process = start("compare", config)
    while not of_students(storage).keys() - before.keys():
        assert process.poll() is None, finish(process)
        threading.Event().wait(0.05)
    kill(process)
    made = of_students(storage)

    again = start("compare", config)
    output = finish(again)
    assert again.returncode == 0, output
    assert "done score" not in output and scores(storage) == scored and "Traceback" not in output
    assert made.items() <= of_students(storage).items(), "what was whole is not made again"
    (folder,) = (storage / "comparisons").iterdir()
    values = json.loads((folder / "comparison.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.md", "comparison.svg"}
    assert sorted((one["variant"], one["seed"]) for one in values["students"]) == [
        ("cdm", 0), ("cdm", 1), ("sft", 0), ("sft", 1),
    ]  # fmt: skip
    assert all(one["steps"] == 8 and one["peak_memory_gib"] > 0.1 for one in values["students"])
    assert {one["variant"] for one in values["students"] if one["unmapped"] is not None} == {"cdm"}

    runs = {facts.run["name"]: facts for facts in map(run_facts, run_folders(str(storage)))}
    assert {facts.status for facts in runs.values()} == {"FINISHED"}
    assert (Path(runs["tiny"].folder) / "artifacts" / "comparison.png").exists()
    about = {name: about_of(runs[f"train {name}"]) for name in ("sft, seed 0", "cdm, seed 0", "sft, seed 1")}
    first, twin, other = about.values()
    assert first["from"] == twin["from"] != other["from"], "the same initial weights at equal seeds"
    orders = [run_series(runs[f"train {name}"].folder)["padding_share"] for name in about]
    assert orders[0] == orders[1] != orders[2], "and the same order of the data"
    assert not list((storage / "runs").glob("tiny-*")), "no checkpoint is left"


def about_of(facts: Any) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(Path(facts.tags["cdm.export"], "cdm.json").read_text())
    return about


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--set", "compare.max_concurrent=9"], 1, "the workers of 9 students at once need 9 CPU"),
        (
            ["--set", "compare.variants.x={method.tal: 1}"],
            2,
            "compare.variants.x.method.tal: unknown key",
        ),
    ],
)
def test_what_can_never_work_is_said_at_once(tmp_path: Path, options: list[str], code: int, line: str) -> None:
    config = write_config(tmp_path, tmp_path / "storage", compare=COMPARE, resources=ONE_WORKER)
    process = start("compare", config, *options)
    output = finish(process)
    assert process.returncode == code and line in output and "Traceback" not in output
    assert not (tmp_path / "storage" / "comparisons").exists() and not (tmp_path / "storage" / "corpus").exists()
