"""A comparison's configs, its intervals and its table, without anything that trains."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cdm.comparison import (
    JSON,
    Result,
    compare_section,
    gap_closed,
    interval,
    markdown,
    paired,
    points,
    print_comparison,
    summaries,
    table_columns,
    write_comparison,
)
from cdm.config import Config, ConfigError, parse_config
from cdm.figures import comparison_figure, svg
from cdm.overview import compare_page
from tests.test_config import SMALL, changed, problems

VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {"method": {"type": "sft"}},
    "cdm": {},
    "hot": {"method.temperature": 2.0, "student.learning_rate": 1e-3},
    "other": {"method": {"type": "strict"}, "teachers.0.model": "org/other"},
}
BITS = st.floats(0.5, 4.0)


def config(variants: dict[str, dict[str, Any]] = VARIANTS, **others: Any) -> Config:
    return parse_config(changed(("compare", {"variants": variants, **others}), ("seed", 5)))


# --- what is trained ---------------------------------------------------------------------------------------------


def test_a_point_is_the_config_with_a_variants_values_at_a_seed_of_the_student() -> None:
    found = points(config(seeds=2))
    assert [(one.variant, one.seed) for one in found] == [(name, seed) for seed in (5, 6) for name in VARIANTS]
    values = parse_config(SMALL).model_dump(mode="json")
    values["method"]["temperature"], values["student"]["learning_rate"], values["student"]["seed"] = 2.0, 1e-3, 6
    values |= {"seed": 5, "baselines": [{"type": "sft"}]}
    assert found[6].config == parse_config(values)
    assert {one.config.seed for one in found} == {5}, "the teachers' models are the same"
    assert found[3].config.teachers[0].model.name == "org/other"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"method.thresold": 0.1}, "compare.variants.bad.method.thresold: unknown key; did you mean threshold?"),
        ({"method": {"type": "dcm"}}, "compare.variants.bad.method.type: 'dcm' is not known; one of sft, kl"),
        ({"student.steps": 3}, "compare.variants.bad.student.steps: the same for all"),
        ({"student.seed": 3}, "compare.variants.bad.student.seed: the same for all"),
        ({"student": {}}, "compare.variants.bad.student: the same for all"),
        ({"corpus.max_documents": 3}, "compare.variants.bad.corpus.max_documents: variants differ in teachers, gen"),
        ({"teachers.4.weight": 3}, "compare.variants.bad.teachers.4.weight: 4 is no position of the list (0 to 0)"),
        ({"method.threshold": 0.3}, "compare.variants.bad: the same as cdm"),
    ],
)
def test_a_wrong_variant_is_named(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        points(config(VARIANTS | {"bad": values}))
    assert any(problem.startswith(line) for problem in raised.value.problems), raised.value.problems


def test_a_section_that_compares_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="compare: missing"):
        compare_section(parse_config(SMALL))
    one = {"variants": {"sft": {}}}
    assert problems(changed(("compare", one))) == ["compare.variants: expected at least 2, got 1"]
    two = {"variants": {"a": {}, "b": {}}, "seeds": 1}
    assert problems(changed(("compare", two)))[0].startswith("compare.seeds: must be greater than or equal to 2")
    found = problems(changed(("compare", two | {"seeds": 2, "baseline": "c"})))
    assert found == ["compare: baseline 'c' is none of the variants: a, b"]


# --- what came of it ---------------------------------------------------------------------------------------------


def slow_quantile(p: float, freedom: int) -> float:
    """Student's t by adding up its density until p is reached."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    width, area, x = 1e-4, 0.5, 0.0
    while area < p:
        area += width * scale * (1 + (x + width / 2) ** 2 / freedom) ** (-(freedom + 1) / 2)
        x += width
    return x


@pytest.mark.parametrize("values", [[1.0, 1.2], [2.0, 2.1, 2.6], [0.4, 0.1, 0.3, 0.2, 0.9]])
def test_intervals_are_students(values: list[float]) -> None:
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    found = interval(values)
    assert found.mean == pytest.approx(mean)
    assert found.half == pytest.approx(slow_quantile(0.975, n - 1) * math.sqrt(variance / n), rel=1e-3)
    assert str(found) == f"{mean:.3f} ± {found.half:.3f}"


def test_one_value_has_no_interval() -> None:
    assert interval([1.5]).half is None and str(interval([1.5])) == "1.500"


@settings(deadline=None)
@given(st.lists(st.tuples(BITS, BITS, BITS), min_size=2, max_size=5))
def test_what_a_seed_does_to_both_falls_out(values: list[tuple[float, float, float]]) -> None:
    ours, theirs = ({seed: one[side] for seed, one in enumerate(values)} for side in (0, 1))
    shift = {seed: one[2] for seed, one in enumerate(values)}
    plain = paired(ours, theirs)
    moved = paired({s: v + shift[s] for s, v in ours.items()}, {s: v + shift[s] for s, v in theirs.items()})
    assert moved.mean == pytest.approx(plain.mean, abs=1e-9) and moved.half == pytest.approx(plain.half, abs=1e-6)
    assert paired(theirs, ours).mean == pytest.approx(-plain.mean)


@given(BITS, st.floats(0.1, 2.0), st.floats(-1.0, 2.0))
def test_the_gap_is_a_share_of_the_way_to_the_teacher(teacher: float, gap: float, share: float) -> None:
    assert gap_closed(teacher + gap * (1 - share), teacher + gap, teacher) == pytest.approx(share, abs=1e-9)


def result(variant: str, seed: int, bits: float, **others: Any) -> Result:
    values = {"agreement": 0.5, "steps": 10, "seconds": 30.0, "step_seconds": 3.0, "peak_memory_gib": 1.0}
    return Result(variant, seed, bits, **{**values, "unmapped": None, **others})


RESULTS = [
    result("cdm", 0, 1.5, seconds=60.0, unmapped=0.1), result("cdm", 1, 1.75, seconds=60.0, unmapped=0.3),
    result("sft", 0, 2.0, agreement=None), result("sft", 1, 2.0, step_seconds=None, peak_memory_gib=2.0),
]  # fmt: skip


def section() -> Any:
    return compare_section(config({"sft": {"method": {"type": "sft"}}, "cdm": {}}, seeds=2))


def test_a_line_a_variant_the_best_first() -> None:
    ours, baseline = summaries(section(), 1.0, RESULTS)
    assert (ours.variant, baseline.variant, ours.seeds) == ("cdm", "sft", 2)
    assert ours.gap is not None and ours.gap.mean == pytest.approx((0.5 + 0.25) / 2)
    assert ours.gap_a_minute == ours.gap and baseline.gap is not None and baseline.gap.mean == 0
    assert ours.difference.mean == pytest.approx(-0.375) and ours.unmapped == pytest.approx(0.2)
    assert baseline.peak_memory_gib == 2.0 and baseline.unmapped is None
    assert baseline.agreement is not None and baseline.agreement.half is None
    columns = table_columns([ours, baseline], section())
    assert columns["less than sft"][0].startswith("0.375 ±") and columns["unmapped"] == ["0.200", "-"]


def test_without_a_gap_there_is_no_share_and_all_else_is_there() -> None:
    found = summaries(section(), 2.0, RESULTS)
    assert all(one.gap is None and one.gap_a_minute is None for one in found)
    columns = table_columns(found, section())
    assert columns["gap closed"] == ["-", "-"]
    assert "bits per byte above sft" in svg(comparison_figure(found, section()))


def test_what_is_written_and_shown(tmp_path: Path) -> None:
    found = summaries(section(), 1.0, RESULTS)
    columns, figure = table_columns(found, section()), comparison_figure(found, section())
    drawn = svg(figure)
    write_comparison(str(tmp_path), 1.0, RESULTS, found, columns, drawn)
    values = json.loads((tmp_path / JSON).read_text())
    assert [Result(**one) for one in values["students"]] == RESULTS and values["teacher_bits_per_byte"] == 1.0
    assert values["summary"][0]["gap"]["mean"] == pytest.approx(0.375)
    head, rule, *rows = markdown(columns).splitlines()
    assert len(rows) == 2 and {line.count("|") for line in (head, rule, *rows)} == {10}
    assert "share, equal steps" in drawn and drawn.count("<svg") == 1
    page = compare_page(config(), section(), columns, 1.0, figure)
    assert "cdm" in page and drawn[:40] in page
    console = Console(file=io.StringIO(), width=200)
    print_comparison(columns, 1.0, console)
    assert "0.375 ±" in console.file.getvalue()  # type: ignore[attr-defined]
