"""A search's space and its trials' configs, without anything that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.config import Config, ConfigError, load_config, parse_config
from cdm.config_search import Search
from cdm.search import (
    config_value,
    exact_parameters,
    finite_values,
    importance,
    preparation_key,
    preparations,
    read_before_training,
    space_problems,
    trial_config,
    trial_count,
)
from cdm.trials import BEST, Trial, best_trial, print_trials, read_importance, read_trials, write_results
from tests.test_config import SMALL, changed, problems

RATE = {"type": "loguniform", "low": 1e-4, "high": 1e-2}
SECTIONS = [{"type": "cdm", "top_k": 5}, {"type": "uld"}]


def config(space: dict[str, Any], **others: Any) -> Config:
    section = {"space": space, **({} if others.get("searcher") == "grid" else {"trials": 4}), **others}
    return parse_config(changed(("search", section)))


def section(space: dict[str, Any], **others: Any) -> Search:
    found = config(space, **others).search
    assert found is not None
    return found


# --- a trial's config --------------------------------------------------------------------------------------------


def test_a_trial_is_the_config_with_other_values() -> None:
    searched = config(
        {
            "student.learning_rate": RATE,
            "teachers.0.weight": {"type": "uniform", "low": 0.5, "high": 2},
            "method.tail": {"type": "choice", "values": ["residual", "renormalise"]},
            "method.threshold": {"type": "uniform", "low": 0.1, "high": 0.5, "step": 0.1},
        }
    )
    asked = {"student.learning_rate": 1e-3, "teachers.0.weight": 1.5, "method.tail": "residual"}
    trial = trial_config(searched, asked | {"method.threshold": 0.1 + 0.2})
    values = parse_config(SMALL).model_dump(mode="json")
    values["student"]["learning_rate"], values["teachers"][0]["weight"] = 1e-3, 1.5
    values["method"] |= {"tail": "residual", "threshold": 0.3}
    assert trial == parse_config(values) and trial.search is None


def test_a_whole_section_is_a_value_and_keys_in_it_come_after() -> None:
    searched = config(
        {
            "method.temperature": {"type": "uniform", "low": 1, "high": 2},
            "method": {"type": "choice", "values": SECTIONS},
        }
    )
    assert searched.search is not None
    (cdm, uld) = (point["method"] for point in preparations(searched.search))
    assert trial_config(searched, {"method.temperature": 1.5, "method": uld}).method.model_dump() == {
        "type": "uld", "alpha": 0.5, "align": "exact", "temperature": 1.5,
    }  # fmt: skip
    assert trial_config(searched, {"method.temperature": 1.5, "method": cdm}).method.model_dump()["top_k"] == 5


def test_a_baseline_that_a_trial_makes_the_method_is_no_baseline_of_it() -> None:
    searched = config({"method": {"type": "choice", "values": [{"type": "sft"}, {"type": "cdm"}]}})
    assert searched.search is not None
    sft, cdm = (trial_config(searched, point) for point in preparations(searched.search))
    assert sft.baselines == [] and [one.type for one in cdm.baselines] == ["sft"]


@settings(deadline=None)
@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 7), st.data())
def test_steps_are_exact_whatever_the_arithmetic(low: int, width: int, step: int, data: st.DataObject) -> None:
    """A float that a searcher made by adding steps finds the config's value, whole numbers stay whole."""
    space = {
        "student.steps": {"type": "int", "low": low, "high": low + width, "step": step},
        "method.alpha": {"type": "uniform", "low": low / 10, "high": (low + width) / 10, "step": step / 10},
    }
    ints, floats = section(space).space.values()
    whole, tenths = finite_values(ints), finite_values(floats)
    assert whole == list(range(low, low + width + 1, step))
    assert tenths == pytest.approx([value / 10 for value in whole]) and len(tenths) == len(whole)
    number = data.draw(st.integers(0, len(whole) - 1))
    added = low / 10
    for _ in range(number):
        added += step / 10
    assert config_value(floats, added) == tenths[number]
    assert type(config_value(ints, float(whole[number]))) is int


def test_true_one_and_one_point_nought_stay_apart() -> None:
    space = section(
        {"method.dual": {"type": "choice", "values": [True, False]}, "x": {"type": "choice", "values": [1]}}
    )
    assert exact_parameters(space, {"method.dual": True, "x": 1}) == {"method.dual": True, "x": 1}
    with pytest.raises(StopIteration):
        exact_parameters(space, {"x": True})


# --- what trials share -------------------------------------------------------------------------------------------


def test_preparations_are_the_values_that_earlier_stages_read() -> None:
    space = {
        "student.learning_rate": RATE,
        "method.threshold": {"type": "uniform", "low": 0.1, "high": 0.3, "step": 0.1},
        "method.align": {"type": "choice", "values": ["exact", "dtw"]},
    }
    found = section(space)
    points = list(preparations(found))
    assert len(points) == 6 and all("student.learning_rate" not in point for point in points)
    keys = {preparation_key(found, point) for point in points}
    assert len(keys) == 6
    asked = {"student.learning_rate": 0.002, "method.threshold": 0.1 + 0.1 + 0.1, "method.align": "dtw"}
    assert preparation_key(found, asked) in keys
    assert [preparation_key(section({"student.learning_rate": RATE}), {"student.learning_rate": 1.0})] == ["[]"]
    assert list(preparations(section({"student.learning_rate": RATE}))) == [{}]


@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("student.learning_rate", False), ("student.batch_tokens", False), ("student.max_length", True),
        ("student.model.hidden_size", True), ("method.alpha", False), ("method.top_k", False), ("method", True),
        ("method.align", True), ("method.threshold", True), ("method.protect", True), ("teachers.0.weight", False),
        ("teachers.0.top_k", True), ("corpus.max_documents", True), ("generation.temperature", True), ("student", True),
    ],
)  # fmt: skip
def test_what_is_read_before_training(name: str, early: bool) -> None:
    assert read_before_training(name) is early


# --- a wrong space -----------------------------------------------------------------------------------------------

CHOICE = {"type": "choice", "values": [1]}


@pytest.mark.parametrize(
    ("space", "lines"),
    [
        ({"student.learning_rat": RATE}, ["student.learning_rat: unknown key; did you mean learning_rate?"]),
        ({"studnet.learning_rate": RATE}, ["studnet.learning_rate: unknown key; did you mean student.learning_rate?"]),
        (
            {"resources.student.workers": CHOICE},
            [
                "resources.student.workers: is not searched; the sections of a search are corpus, generation, "
                "teachers, student, method"
            ],
        ),
        ({"teachers.3.top_k": CHOICE}, ["teachers.3.top_k: 3 is no position of the list (0 to 0)"]),
        (
            {"generation.temperature": CHOICE},
            ["generation.temperature: generation is a value, it has no keys below it"],
        ),
        (
            {"method.tail": {"type": "choice", "values": ["residual", "none"]}},
            ["method.tail: 'none' is not known; one of renormalise, residual"],
        ),
        (
            {"student.steps": {"type": "uniform", "low": 1, "high": 9}},
            ["student.steps: expected a whole number, got 5.944271909999..."[:52]],
        ),
        ({"method.alpha": {"type": "uniform", "low": 0, "high": 3}}, ["method.alpha: must be less than or equal to 1"]),
        (
            {"method.threshold": {"type": "uniform", "low": 0.1, "high": 0.3}},
            ["method.threshold: stages before training read it, so it needs `step`, or a choice"],
        ),
    ],
)
def test_a_wrong_space_is_said_before_anything_starts(space: dict[str, Any], lines: list[str]) -> None:
    found = space_problems(config(space))
    assert found and all(any(one.startswith(f"search.space.{line}") for one in found) for line in lines)
    assert len({one.partition(":")[0] for one in found}) == len(lines)


def test_a_grid_needs_finitely_many_values_that_go_together() -> None:
    assert space_problems(config({"student.learning_rate": RATE}, searcher="grid")) == [
        "search.space.student.learning_rate: a grid needs `step`, or a choice"
    ]
    points = {"method": {"type": "choice", "values": SECTIONS}, "method.top_k": {"type": "choice", "values": [5]}}
    (line,) = space_problems(config(points, searcher="grid"))
    assert line.startswith("search.space: method.top_k: unknown key") and '"uld"' in line
    whole = section({"student.steps": {"type": "int", "low": 1, "high": 9, "step": 4}, "seed": CHOICE}, searcher="grid")
    assert trial_count(whole) == 3 and trial_count(section({"student.steps": CHOICE})) == 4


def test_too_much_to_prepare_is_refused() -> None:
    space = {"corpus.max_documents": {"type": "int", "low": 1, "high": 65}}
    assert space_problems(config(space)) == [
        "search.space: corpus.max_documents have 65 combinations to prepare, more than 64"
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("search.space", {}), "search.space: expected at least 1, got 0"),
        (("search.space", {"a": {"type": "normal"}}), "search.space.a.type: 'normal' is not known; one of choice"),
        (("search.space", {"a": RATE | {"low": 0}}), "search.space.a.low: must be greater than 0, got 0"),
        (("search.space", {"a": RATE | {"low": 1}}), "search.space.a: low 1 is not below high 0.01"),
        (
            ("search.space", {"a": {"type": "choice", "values": []}}),
            "search.space.a.values: expected at least 1, got 0",
        ),
        (("search.trials", None), "search: optuna needs `trials`"),
        (("search.searcher", "grid"), "search: a grid takes no `trials`"),
        (("search.scheduler", "pbt"), "search.scheduler: 'pbt' is not known; one of asha, none"),
        (("search.metrics", "x"), "search.metrics: unknown key; did you mean metric?"),
    ],
)
def test_a_wrong_section(change: tuple[str, Any], line: str) -> None:
    right = ("search", {"space": {"student.learning_rate": dict(RATE)}, "trials": 3})
    (found,) = problems(changed(right, change))
    assert found.startswith(line)


def test_a_config_without_a_search_has_none_to_run() -> None:
    with pytest.raises(ConfigError, match="search: missing"):
        space_problems(parse_config(SMALL))


def test_the_shipped_search_is_right() -> None:
    shipped = load_config(Path(__file__).parent.parent / "configs" / "search.yaml")
    assert space_problems(shipped) == [] and shipped.search is not None
    demo = load_config(Path(__file__).parent.parent / "configs" / "demo.yaml")
    assert (shipped.corpus, shipped.teachers, shipped.student.model) == (demo.corpus, demo.teachers, demo.student.model)


# --- results -----------------------------------------------------------------------------------------------------


def trial(name: str, value: float | None, state: Any = "finished", **parameters: Any) -> Trial:
    return Trial(name, state, parameters, 8, value, 0.01, 3.0)


def test_importance_finds_the_key_that_matters() -> None:
    space = section({"student.learning_rate": RATE, "method.alpha": {"type": "uniform", "low": 0, "high": 1}})
    names = ("student.learning_rate", "method.alpha")
    values = [((i % 5) / 500 + 1e-4, (i % 3) / 3) for i in range(15)]
    shares = importance(space, [(dict(zip(names, pair, strict=True)), 100 * pair[0]) for pair in values])
    assert list(shares) == list(names) and shares["student.learning_rate"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(space, []) == {}


def test_the_best_is_one_that_finished() -> None:
    space = section({"student.learning_rate": RATE})
    trials = [trial("a", 3.0), trial("b", 2.0), trial("c", 1.0, "stopped"), trial("d", None, "failed")]
    assert best_trial(trials, space) == trials[1]
    assert best_trial(trials, space.model_copy(update={"mode": "max"})) == trials[0]
    assert best_trial(trials[2:], space) is None


def test_results_are_read_as_they_were_and_the_best_is_a_config(tmp_path: Path) -> None:
    values = [None, 64, 1_000]
    searched = config(
        {"student.learning_rate": RATE, "corpus.max_documents": {"type": "choice", "values": values}}, seeds=2
    )
    assert searched.search is not None
    trials = [
        trial(
            "a", 3.0, **exact_parameters(searched.search, {"student.learning_rate": 1e-3, "corpus.max_documents": 64})
        ),
        trial("b", 2.0, **{"student.learning_rate": 2e-3, "corpus.max_documents": "null"}),
        trial("c", None, "failed", **{"student.learning_rate": 3e-3, "corpus.max_documents": 1_000}),
    ]
    assert read_trials(str(tmp_path), searched.search) is None
    write_results(searched, trials, trials[1], str(tmp_path))
    assert read_trials(str(tmp_path), searched.search) == trials
    best = load_config(tmp_path / BEST)
    assert best == trial_config(searched, trials[1].parameters) and best.corpus.max_documents is None
    assert yaml.safe_load((tmp_path / BEST).read_text())["student"]["learning_rate"] == 2e-3
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 4
    assert read_importance(str(tmp_path)) == {}


def test_the_table_has_the_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    space = section({"student.learning_rate": RATE})
    trials = [trial("a", 3.0, **{"student.learning_rate": 0.1}), trial("b", 2.0, **{"student.learning_rate": 0.2})]
    print_trials(trials, space, {"student.learning_rate": 1.0}, Console(width=100))
    out = capsys.readouterr().out
    assert out.index(" b ") < out.index(" a ") and "importance: student.learning_rate 100%" in out
