"""Answers of a tiny model, their grades, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from cdm.answers import (
    AnswerWriter,
    answer_text,
    answers_identity,
    grade_part,
    grades_identity,
    part_name,
    read_answers,
    read_grades,
    write_answers,
)
from cdm.config_tasks import AnyTask, Instructions
from cdm.generation import stop_ids
from cdm.generators import Sampling
from cdm.harness import _rows, harness_scores
from cdm.intervals import Ratio
from cdm.records import Document, EvalReport, Message
from cdm.score_view import score_sections
from cdm.scores import (
    Scored,
    Texts,
    by_category,
    category_columns,
    comparison,
    comparisons,
    held_out_scores,
    pass_scores,
    score_columns,
    score_report,
    task_scores,
)
from cdm.tokenizers import load_tokenizer
from tests import tiny

ENGINE = {"type": "transformers", "dtype": "float32", "batch_tokens": 512}


def section(**keys: object) -> Instructions:
    found = TypeAdapter(AnyTask).validate_python(
        {"name": "t", "type": "instructions", "data": {"type": "jsonl", "path": __file__}, "max_tokens": 12, **keys}
    )
    assert isinstance(found, Instructions)
    return found


def exercise(number: int, words: int = 3) -> Document:
    prompt = (Message("user", f"Write line {number}. " + "word " * words),)
    return Document(f"{number:032x}", prompt, "", {"references": json.dumps(["import re"])})


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> AnswerWriter:
    model = tiny.tiny_teacher(tmp_path_factory.mktemp("answers") / "model")
    return AnswerWriter(model, revision=None, engine=ENGINE, max_length=96, seed=0)


def test_every_exercise_has_an_answer_and_each_seed_its_own(writer: AnswerWriter) -> None:
    asked = [exercise(1), exercise(2, words=200), exercise(3)]
    first, second = (writer(section(), asked, number) for number in (0, 1))
    assert [answer.id for answer in first] == [one.id for one in asked]
    assert [answer.end for answer in first][1] == "prompt_too_long" and first[1].text == "" and first[1].tokens == 0
    assert first != second and first == writer(section(), asked, 0)
    assert [answer for answer in first if answer.id == asked[2].id] == writer(section(), asked[2:], 0)
    greedy = section(temperature=0, seeds=1)
    assert writer(greedy, asked, 0)[0].text == writer(greedy, asked, 1)[0].text


def test_what_is_cut_or_special_counts_as_it_is(writer: AnswerWriter) -> None:
    tokenizer = writer.tokenizer
    sampling = Sampling(1.0, 1.0, 99, ("STOP",), stop_ids(tokenizer))
    ids = tokenizer.encode_with_ends("a word")[0].tolist()
    (start,) = tokenizer.hf.convert_tokens_to_ids(["<|im_start|>"])
    assert answer_text(tokenizer, [*ids, tokenizer.end_of_turn_id, *ids], sampling) == ("a word", True)
    assert answer_text(tokenizer, ids, sampling) == ("a word", False)
    assert answer_text(tokenizer, [start, *ids], sampling) == ("a word", False)
    assert answer_text(tokenizer, tokenizer.encode_with_ends("oneSTOPtwo")[0].tolist(), sampling) == ("one", True)
    half = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == "é".encode()[:1])
    assert answer_text(tokenizer, [*ids, half], sampling) == ("a word\ufffd", False)


def test_a_template_that_refuses_gives_an_empty_answer(writer: AnswerWriter, tmp_path: Path) -> None:
    strict = tiny.byte_level_tokenizer()
    strict.chat_template = "{{ raise_exception('no') }}"
    strict.save_pretrained(tmp_path)
    whole, writer.tokenizer = writer.tokenizer, load_tokenizer(str(tmp_path))
    try:
        (answer,) = writer(section(), [exercise(1)], 0)
    finally:
        writer.tokenizer = whole
    assert (answer.end, answer.text) == ("prompt_refused", "")


def test_grades_are_a_part_of_the_same_name(writer: AnswerWriter, tmp_path: Path) -> None:
    asked, name = [exercise(1), exercise(2)], "t-x-seed0-00000.parquet"
    answers = writer(section(), asked, 0)
    write_answers(str(tmp_path / "a"), name, answers)
    assert read_answers(str(tmp_path / "a"), name) == answers
    grade_part(section(), asked, str(tmp_path / "a"), str(tmp_path / "g"), name)
    rows = read_grades(str(tmp_path / "g"), name)
    assert [row["id"] for row in rows] == [one.id for one in asked] and all(0 <= row["score"] <= 100 for row in rows)


def test_names_say_what_was_asked() -> None:
    name = part_name(section(), "f" * 64, "test-00003.parquet", 2)
    assert name.startswith("t-") and name.endswith("-seed2-00003.parquet")
    assert part_name(section(seeds=2), "f" * 64, "test-00003.parquet", 2) == name
    assert part_name(section(max_tokens=13), "f" * 64, "test-00003.parquet", 2) != name
    assert part_name(section(), "0" * 64, "test-00003.parquet", 2) != name
    assert grades_identity(section(max_tokens=13)) == grades_identity(section())
    assert answers_identity("m", ENGINE, 96, 0) == answers_identity("m", ENGINE | {"batch_tokens": 1}, 96, 0)
    assert answers_identity("m", ENGINE, 96, 1) != answers_identity("m", ENGINE, 96, 0)


# --- scores ------------------------------------------------------------------------------------------------------

IDS = ("a", "b", "c", "d")


def two() -> tuple[Scored, Scored]:
    base = np.array([[10.0, 30.0], [50.0, 50.0], [0.0, 0.0], [80.0, 60.0]])
    other = np.array([[30.0, 30.0], [40.0, 60.0], [10.0, 0.0], [0.0, 0.0]])
    kinds = ("x", "y", "x", "y")
    return task_scores("base", "t", "rouge_l", IDS, base, kinds), task_scores("new", "t", "rouge_l", IDS, other, kinds)


def test_a_score_is_the_mean_over_documents_with_its_spread_over_seeds() -> None:
    base, _ = two()
    assert base.ratio.value == pytest.approx(35.0) and base.seeds == (35.0, 35.0)
    assert {name: found["value"] for name, found in by_category(base).items()} == {"x": 10.0, "y": 60.0}
    assert base.interval.low <= 35 <= base.interval.high
    rows = category_columns([base])
    assert rows["category"] == ["x", "y"] and rows["documents"] == [2, 2]


def test_regressions_are_where_the_new_one_is_worse() -> None:
    base, new = two()
    texts = Texts({"d": "Prompt d"}, {"d": "right"}, {"base": {"d": "right"}, "new": {"d": "wrong"}})
    found = comparison(new, base, texts)
    assert found["value"] == pytest.approx(21.25 - 35.0) and found["low"] < found["value"] < found["high"]
    assert [row["id"] for row in found["regressions"]] == ["d"]
    assert found["regressions"][0] == {
        "id": "d", "score": 0.0, "against": 70.0, "category": "y", "prompt": "Prompt d", "reference": "right",
        "answers": {"new": "wrong", "base": "right"},
    }  # fmt: skip
    shuffled = task_scores("new", "t", "rouge_l", IDS[::-1], np.zeros((4, 2)))
    with pytest.raises(ValueError, match="not measured on the same documents"):
        comparison(shuffled, base, texts)


def test_bits_per_byte_are_better_when_lower() -> None:
    def report(name: str, nats: tuple[float, ...]) -> EvalReport:
        sums = {"nats": nats, "bytes": (10.0, 10.0), "agreed": (1.0, 2.0), "shared": (2.0, 2.0)}
        return EvalReport(name, 0.0, None, 2, 20, 4, 0.1, ids=("a", "b"), sums=sums)

    scored = held_out_scores([report("base", (5.0, 5.0)), report("new", (4.0, 7.0))])
    assert [one.metric for one in scored] == ["bits_per_byte", "agreement"] * 2
    assert scored[0].ratio.value == pytest.approx(10 / 20 / np.log(2)) and scored[1].ratio.value == 0.75
    bits, agreement = comparisons(scored, {})
    assert [row["id"] for row in bits["regressions"]] == ["b"] and bits["value"] > 0
    assert agreement["value"] == 0 and agreement["regressions"] == []


def test_tables_and_the_report_hold_every_model() -> None:
    base, new = two()
    passed = pass_scores("new", "code", 2, IDS, np.array([[100.0, 0.0], [0.0, 0.0], [100.0, 100.0], [0.0, 100.0]]))
    assert passed.ratio.value == 75.0 and passed.seeds == ()
    columns = score_columns([base, new, passed])
    assert columns["model"] == ["base", "new"] and columns["code pass@2"] == [None, 75.0]
    assert columns["t rouge_l"] == [35.0, 21.25] and columns["t rouge_l ±"][0] > 0
    written = json.loads(score_report([base, new, passed], comparisons([base, new, passed], {})))
    assert [one["model"] for one in written["scores"]] == ["base", "new", "new"]
    assert written["scores"][0]["spread"] == 0.0 and written["comparisons"][0]["against"] == "base"


def test_a_document_without_a_byte_is_no_regression() -> None:
    ratio = Ratio(np.array([0.0, 2.0]), np.array([0.0, 4.0]))
    one, other = Scored("new", "t", "m", ("a", "b"), ratio), Scored("base", "t", "m", ("a", "b"), ratio)
    assert np.isnan(one.documents[0]) and comparison(one, other, Texts())["regressions"] == []


def test_lm_evals_results_become_scores() -> None:
    """Of a metric that is the mean over documents each of them; of another one the figure alone."""
    results = {
        "alias": "sums", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,loose": 1.0,
        "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A",
    }  # fmt: skip
    samples = [
        {"doc_id": n, "filter": how, "exact_match": float(how == "loose" or n), "word_perplexity": (1.0, 2)}
        for how in ("strict", "loose")
        for n in range(2)
    ]
    scored = harness_scores("m", _rows("sums", results, samples))
    assert [(one.metric, one.ratio.value, len(one.ids)) for one in scored] == [
        ("exact_match, strict", 0.5, 2), ("exact_match, loose", 1.0, 2), ("word_perplexity", 12.5, 1),
    ]  # fmt: skip
    assert scored[0].higher_is_better and not scored[2].higher_is_better
    assert scored[2].interval.half_width == 0


def test_a_page_shows_tasks_categories_differences_and_regressions() -> None:
    base, new = two()
    texts = Texts({"d": "Prompt <d>"}, {"d": "right"}, {"base": {"d": "right"}, "new": {"d": "wrong"}})
    sections = score_sections([base, new], comparisons([base, new], {"t": texts}))
    assert [one.title for one in sections] == ["Tasks", "By category", "Differences", "Regression 1: t rouge_l"]
    assert "Prompt &lt;d&gt;" in sections[-1].body and "wrong" in sections[-1].body
    assert score_sections([], []) == []
