"""The parts of the benchmarks at a tiny size, so that they cannot rot; what they measure is not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import graph, mapping, mass, rows, table
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.sentencepiece_tokenizer().save_pretrained(folder / "student")
    tiny.byte_level_tokenizer().save_pretrained(folder / "teacher")
    return load_tokenizer(str(folder / "student")), load_tokenizer(str(folder / "teacher"))


@pytest.fixture(scope="module")
def sides(pair: tuple[Tokenizer, Tokenizer]) -> tuple[rows.Side, rows.Side]:
    return rows.sides(*pair, tiny.texts()[:60], 48)


def test_rows_are_of_one_text_and_have_the_next_token_on_top(sides: tuple[rows.Side, rows.Side]) -> None:
    assert sides[0].ends[-1] == sides[1].ends[-1] and len(sides[0].ids) <= 48
    for side in sides:
        assert side.logits.shape == (len(side.ids), side.tokenizer.vocab_size)
        assert side.logits.isfinite().all()
        assert side.logits.argmax(1).tolist() == side.ids.tolist()


def test_the_published_procedure_finds_what_ours_finds(sides: tuple[rows.Side, rows.Side]) -> None:
    """`compare` raises where groups or maps differ."""
    student, teacher = (side.tokenizer for side in sides)
    vocab_map = build_vocab_map(student, teacher, mapping.THRESHOLD, protect=False)
    figures = mapping.compare("tiny", *sides, vocab_map, k=20, every=2)
    assert all(np.isfinite(value) and value > 0 for value in figures.values())


def test_a_difference_is_an_error(sides: tuple[rows.Side, rows.Side]) -> None:
    vocab_map = build_vocab_map(*(side.tokenizer for side in sides), mapping.THRESHOLD, protect=False)
    top_s, top_t = (side.logits[:4].topk(5).indices for side in sides)
    case = mapping.Case(*sides, vocab_map, top_s, top_t)
    nothing = torch.full_like(top_t, -1), torch.full_like(top_s, -1)
    with pytest.raises(ValueError, match="agree on"):
        mapping._check_same(case, nothing, every=1)


def test_graphs_in_fresh_processes(pair: tuple[Tokenizer, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LOADS", 1)
    figures = graph.of_pair(pair[1].name, pair[0].name)
    assert figures.keys() == {"graph_build_s", "graph_mb", "graph_load_s"}
    assert figures["graph_build_s"] > 0 and figures["graph_load_s"] > 0 and figures["graph_mb"] > 10


def test_the_machine_has_a_name_and_figures_end_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert " cores of " in table.machine()
    table.finish({"a": 1.23456789, "b": 2})
    assert json.loads(capsys.readouterr().out) == {"a": 1.235, "b": 2.0}
    monkeypatch.setenv("CDM_REAL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="CDM_REAL_DATA must name"):
        table.real_data()


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (None, "special"), (b"", "special"), (b" \n", "white space"), (b" naive", "letters"), (b"42", "digits"),
        (b"1_0", "digits"), (b"x2", "letters and others"), (b"):\n", "other signs"), (b"\xc3", "other signs"),
    ],
)  # fmt: skip
def test_kinds_of_tokens(token: bytes | None, name: str) -> None:
    assert mass.kind(token) == name
