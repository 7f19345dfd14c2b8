"""The pages and figures of a run and of a search: whole, escaped, and nothing from elsewhere."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm.alignment import align_exact
from cdm.batches import Row
from cdm.config import parse_config
from cdm.figures import (
    CURRENT,
    best_so_far_figure,
    bits_figure,
    coverage_figure,
    has_coverage,
    importance_figure,
    loss_figure,
    parallel_figure,
    svg,
)
from cdm.journal import Series
from cdm.overview import Reviewed, pipeline_page, search_page
from cdm.page import alignment, side_by_side, table
from cdm.records import Alignment, EvalReport, ScoredDocument
from cdm.report import checkpoints, description, mappings_table
from cdm.trials import Trial
from tests.test_config import SMALL, changed

SPACE = {
    "student.learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
    "method.alpha": {"type": "uniform", "low": 0, "high": 1},
    "method.tail": {"type": "choice", "values": ["renormalise", "residual"]},
}


class Tags(HTMLParser):
    """Open tags and attributes; fails on a tag that is closed and was not open."""

    void = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def stands_alone(text: str) -> None:
    tags = Tags(text)
    assert tags.open == []
    links = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert all(str(link).startswith("#") for link in links), "nothing is fetched"
    assert "<script" not in text and "@import" not in text and CURRENT not in text
    assert "prefers-color-scheme: dark" in text


def series(teachers: int = 1) -> Series:
    """40 steps of what a cdm run logs."""
    names = {"loss": 3.0, "ce": 2.5, "kd": 1.0, "d1": 0.6, "d2": 0.4, "mass_exact": 0.7, "mass_dynamic": 0.1}
    names |= {"mass_unmapped": 0.2, "grad_norm": 1.0}
    found: Series = {}
    for name, first in names.items():
        per_teacher = teachers > 1 and name not in ("loss", "ce", "grad_norm")
        for prefix in [f"teacher{k}." for k in range(teachers)] if per_teacher else [""]:
            change = 0.0 if name.startswith("mass") else 0.02
            found[prefix + name] = [(step, first * (1 - change * math.sqrt(step))) for step in range(1, 41)]
    return found | {"validation_bits_per_byte": [(step, 4 - step / 20) for step in range(10, 41, 10)]}


def trials(count: int = 9) -> list[Trial]:
    draw = random.Random(0)
    found = []
    for n in range(count):
        parameters = {"student.learning_rate": 10 ** draw.uniform(-4, -2), "method.alpha": draw.random()}
        parameters |= {"method.tail": draw.choice(["renormalise", "residual"])}  # type: ignore[dict-item]
        state: Any = ("finished", "finished", "stopped", "failed")[n % 4]
        value = None if state == "failed" else 3 + draw.random()
        found.append(Trial(f"t{n}", state, parameters, 40, value, 0.02, 10.0))
    return found


def row() -> tuple[Row, str]:
    """`unhappy <cat>`: s un|happy| <cat>, t unhap|py| <c|at>."""
    text = "unhappy <cat>"
    ends_s, ends_t = np.array([2, 7, 13]), np.array([5, 7, 10, 13])
    groups = align_exact(ends_s, ends_t)
    bounds = (np.array([0, *(group[side][1] for group in groups)]) for side in (0, 1))
    entropy = np.array([0.2, 1.0, 0.6, 0.1], np.float32)
    top = np.zeros((4, 1), np.int32)
    scored = ScoredDocument("d", False, top[:, 0], ends_t, entropy, entropy, entropy, top, top.astype(np.float16))
    return Row("d", np.array([1]), np.array([1, 2, 3]), ends_s, (scored,), (Alignment(*bounds),)), text


def reviewed(**changes: Any) -> Reviewed:
    config = parse_config(SMALL)
    sample = {"prompt": "def <f>():", "reference": "return 1", "completion": "pass & <return>"}
    mappings = ({"teacher": " color", "student": " colour", "mass": 1.5, "groups": 3, "example": "a▌ b"},)
    reports = [
        EvalReport("teacher, t", 2.5, 1.0, 9, 900, 0, 0.1),
        EvalReport("student, cdm", 2.75, 0.5, 9, 900, 300, 0.4, (sample,), mappings),
    ]
    results = {"model": [report.name for report in reports], "bits per byte": [2.5, 2.75]}
    one, text = row()
    seen = {
        "config": config, "code": {"cdm.commit": "c" * 40, "cdm.dirty": "true"}, "results": results,
        "reports": reports, "runs": {"sft": {"loss": [(1, 2.0)]}, "cdm": series()}, "rows": [one], "texts": {"d": text},
    }  # fmt: skip
    return Reviewed(**(seen | changes))


def test_a_pipelines_page_has_all_that_a_reviewer_asks_for() -> None:
    text = pipeline_page(reviewed())
    stands_alone(text)
    for title in (
        "Held-out documents", "Bits per byte against steps", "Loss", "Coverage: cdm", "Alignment", "Dynamic mappings",
        "Completion 1",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "Coverage: sft" not in text
    assert "pass &amp; &lt;return&gt;" in text and "␣colour" in text and "cccccccccc with changes" in text


def test_a_page_of_a_run_without_logs_or_samples_has_its_table() -> None:
    bare = [EvalReport("teacher, t", 2.5, 1.0, 9, 900, 0, 0.1)]
    text = pipeline_page(reviewed(runs={}, rows=[], texts={}, reports=bare))
    stands_alone(text)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Held-out documents"]


def test_a_searchs_page() -> None:
    config = parse_config(changed(("search", {"space": SPACE, "trials": 9, "seeds": 2})))
    assert config.search is not None
    text = search_page(config, config.search, trials(), {"student.learning_rate": 0.8, "method.alpha": 0.2})
    stands_alone(text)
    assert re.findall("<h2>(.*?)</h2>", text) == ["Trials", "Parallel coordinates", "Best so far", "Importance"]
    assert text.index("t3") > text.index("t2"), "a failed trial comes last"
    without = search_page(config, config.search, trials(2), {})
    stands_alone(without)
    assert "Importance" not in without


@pytest.mark.parametrize("teachers", [1, 2])
def test_an_svg_has_the_pages_colour_and_no_ground(teachers: int) -> None:
    drawn = svg(loss_figure({"cdm": series(teachers), "sft": {"loss": [(1, 2.0)]}}))
    root = ET.fromstring(drawn)
    assert root.tag.endswith("svg") and "currentColor" in drawn and CURRENT not in drawn
    assert drawn == svg(loss_figure({"cdm": series(teachers), "sft": {"loss": [(1, 2.0)]}}))
    assert (drawn.count("teacher1") > 0) == (teachers == 2)
    ET.fromstring(svg(coverage_figure(series(teachers))))
    assert has_coverage(series(teachers)) and not has_coverage({"loss": [(1, 2.0)]})


def test_figures_of_a_search_of_any_size() -> None:
    config = parse_config(changed(("search", {"space": SPACE, "trials": 9})))
    assert config.search is not None
    for found in (trials(), trials(1), trials()[3:4], []):
        ET.fromstring(svg(parallel_figure(found, config.search)))
        ET.fromstring(svg(best_so_far_figure(found, config.search)))
    ET.fromstring(svg(importance_figure({"a": 1.0})))
    ET.fromstring(svg(bits_figure({"cdm": series()}, 2.5)))


def test_an_alignment_has_every_token_in_its_group() -> None:
    one, text = row()
    assert one.scores[0] is not None
    drawn = alignment(text, one.ends_s, one.scores[0].ends_t, one.alignments[0], one.scores[0].entropy_t)
    groups = re.findall(r'<div class="(group[^"]*)"[^>]*>(<div>.*?</div><div>.*?</div>)</div>', drawn)
    sides = [[re.findall("<span>(.*?)</span>", side) for side in body.split("</div><div>")] for _, body in groups]
    assert sides == [[["un", "happy"], ["unhap", "py"]], [["␣&lt;cat&gt;"], ["␣&lt;c", "at&gt;"]]]
    assert all(kind == "group many" for kind, _ in groups)
    strengths = [float(value) for value in re.findall(r"--tint\), ([\d.]+)\)", drawn)]
    assert len(strengths) == 2 and 0 <= min(strengths) < max(strengths) <= 0.55


def test_texts_are_no_html() -> None:
    assert "<b>" not in table({"a": ["<b>"], "n": [None]}) + side_by_side({"<b>": "<b>"})
    assert "class=number>1,235<" in table({"n": [1234.6]})


def test_a_description_is_the_table_in_markdown() -> None:
    head, rule, first, second, *_ = description({"model": ["a", "b"], "bits per byte": [2.5, None]}).splitlines()
    assert (head, rule) == ("| model | bits per byte |", "| --- | --- |")
    assert (first, second) == ("| a | 2.5 |", "| b | - |")


def test_checkpoints_are_rows_with_the_figures_of_their_steps(tmp_path: Path) -> None:
    for step in (20, 5):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "checkpoint_manager_snapshot.json").touch()
    logged = {"loss": [(5, 2.0), (20, 1.0)], "validation_kd": [(20, 0.5)], "seconds": [(5, 1.0)]}
    assert checkpoints(str(tmp_path), logged) == {
        "step": [5, 20], "path": [str(tmp_path / "step_00000005"), str(tmp_path / "step_00000020")],
        "loss": [2.0, 1.0], "validation_kd": [None, 0.5],
    }  # fmt: skip


def test_mappings_are_a_table() -> None:
    assert mappings_table(reviewed().reports[-1]) == {
        "teacher": [" color"], "student": [" colour"], "mass": [1.5], "groups": [3], "example": ["a▌ b"],
    }  # fmt: skip
