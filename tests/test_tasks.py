"""Rows to exercises, answers to scores: by hand, and on real rows where they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cdm import sandbox
from cdm.config_tasks import AnyTask, Evaluation
from cdm.records import Document, Message
from cdm.tasks import CATEGORY, exercises, exercises_identity, grade, program_of, rouge_l

needs_sandbox = pytest.mark.skipif(sandbox.problem() is not None, reason=f"no sandbox here: {sandbox.problem()}")


def task(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Any:
    file = folder / "rows.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)
    section = {"name": "t", "data": {"type": "jsonl", "path": str(file)}, **keys}
    return TypeAdapter(AnyTask).validate_python(section)


# --- ROUGE-L -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "answer", "expected"),
    [
        (["the cat sat on the mat"], "the cat sat on the mat", 1.0),
        (["the cat sat on the mat"], "a cat on a mat", 2 * 3 / 11),  # cat on mat: 3 of 6 and of 5 words
        (["one two three four"], "four three two one", 2 * 1 / 8),  # a subsequence keeps the order
        (["running dogs"], "the dogs ran; he runs", 2 * 1 / 7),  # runs, running -> run; dogs -> dog: one in order
        (["nothing alike"], "Quite different.", 0.0),
        (["It's 3.5%"], "it s 3 5", 1.0),  # punctuation parts words
        (["no", "a longer reference", "exactly this one"], "Exactly this one!", 1.0),  # the best of several
        (["gone"], "", 0.0),
        (["日本語"], "日本語", 0.0),  # no a-z, no digits: no words
    ],
)
def test_rouge_l_by_hand(references: list[str], answer: str, expected: float) -> None:
    assert rouge_l(references, answer) == pytest.approx(expected)


PUBLISHED = [  # reference, answer, what `rouge-score` 0.1.2 gives with its stemmer
    (
        "Virgin Australia commenced services on 31 August 2000 as Virgin Blue, with two aircraft on a single route.",
        "The airline's services commenced on August 31st, 2000; it flew two aircrafts on single routes.",
        0.5294117647058824,
    ),
    (
        "The quick-thinking engineers' solutions were generalised happily.",
        "An engineer solved it; generalization is a happy solution, thinks the quick one.",
        0.1904761904761905,
    ),
    ("Naïve cafés—Größe 3,5 °C", "naive cafes Grosse 3.5 C", 0.4),
    (
        'He said: "don\'t" (twice), dying to be lying; flies, dies, ties',
        "he didn't say twice that he was dying, lying, flying or tied",
        0.5599999999999999,
    ),
]


@pytest.mark.parametrize(("reference", "answer", "expected"), PUBLISHED)
def test_rouge_l_is_that_of_the_package(reference: str, answer: str, expected: float) -> None:
    assert rouge_l([reference], answer) == pytest.approx(expected, abs=1e-15)


@given(
    st.lists(st.sampled_from(["ab", "cd", "ef"]), max_size=7), st.lists(st.sampled_from(["ab", "cd", "ef"]), max_size=7)
)
def test_rouge_l_is_that_of_the_slow_subsequence(one: list[str], other: list[str]) -> None:
    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    common = longest(one, other)
    expected = 2 * common / (len(one) + len(other)) if common else 0.0
    assert rouge_l([" ".join(one)], " ".join(other)) == pytest.approx(expected)


# --- exercises ---------------------------------------------------------------------------------------------------


def test_rows_become_exercises_by_content_once_each(tmp_path: Path) -> None:
    rows = [{"q": f"Question {n % 5}?", "refs": [f"a{n % 5}", "b"], "kind": "odd" if n % 2 else None} for n in range(7)]
    section = task(
        tmp_path, rows, type="instructions", prompt="q", references="refs", category="kind", system="Be brief."
    )
    found = exercises(section)
    assert [one.id for one in found] == sorted({one.id for one in found}) and len(found) == 5
    assert (
        found[0].prompt[0] == Message("system", "Be brief.") and json.loads(found[0].metadata["references"])[1] == "b"
    )
    assert {one.metadata[CATEGORY] for one in found} <= {"odd", "None"}
    first = exercises(section.model_copy(update={"documents": 2}))
    assert first == found[:2]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    same = task(moved, rows, type="instructions", prompt="q", references="refs", category="kind", system="Be brief.")
    assert exercises_identity(same) == exercises_identity(section), "where the rows lie does not count"
    assert exercises_identity(section.model_copy(update={"seeds": 2})) == exercises_identity(section)
    other = task(tmp_path, rows[:-3], type="instructions", prompt="q", references="refs", category="kind")
    assert exercises_identity(other) != exercises_identity(same)


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"prompt": "?", "response": "none"},
            {"type": "final_number"},
            "rows.jsonl.gz:1: column 'response' holds no number",
        ),
        ({"prompt": "?", "respons": ""}, {"type": "instructions"}, "no column 'response'; did you mean 'respons'"),
        ({"prompt": "?", "response": ""}, {"type": "instructions"}, "holds no reference"),
        ({"prompt": 3, "response": "x"}, {"type": "instructions"}, "column 'prompt' holds int, expected text"),
        ({"prompt": "?", "response": [1]}, {"type": "instructions"}, "something else than text or a list of texts"),
    ],
)
def test_rows_that_are_no_exercise_are_named(tmp_path: Path, row: dict, keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        exercises(task(tmp_path, [row], **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "code", "form": "mbpp"}, "allow_code_execution"),
        ({"type": "code", "form": "mbpp", "allow_code_execution": False}, "allow_code_execution"),
        (
            {"type": "code", "form": "mbpp", "allow_code_execution": True, "k": [5]},
            "pass@5 needs as many seeds, there are 1",
        ),
        ({"type": "final_number", "seeds": 3}, "temperature 0 gives the same answer 3 times"),
    ],
)
def test_sections_that_make_no_sense(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(tmp_path, [], **keys)


def test_names_of_tasks_differ(tmp_path: Path) -> None:
    one = task(tmp_path, [], type="instructions").model_dump()
    with pytest.raises(ValidationError, match="the name 't' stands twice"):
        Evaluation(tasks=[one, one])


# --- grades ------------------------------------------------------------------------------------------------------


def test_the_final_number_counts(tmp_path: Path) -> None:
    section = task(tmp_path, [{"prompt": "?", "response": "2 + 2 = 4\n#### 1,004"}], type="final_number")
    (exercise,) = exercises(section)
    assert grade(section, exercise, "So it is 1004.").score == 100 and grade(section, exercise, "4").score == 0
    assert grade(section, exercise, "").score == 0


HUMANEVAL = {
    "prompt": 'import math\n\ndef helper(n):\n    return n\n\ndef root(n):\n    """The root of n."""\n',
    "test": "def check(candidate):\n    assert candidate(9) == 3\n",
    "entry_point": "root",
}


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("    return math.isqrt(helper(n))\n", True),
        ("    return math.isqrt(n)\n\nprint(root(4))\nassert False", True),  # what follows the function is cut
        ("Here it is:\n```python\ndef root(n):\n    return math.isqrt(helper(n))\n```\nDone.", True),
        ("```\n    return math.isqrt(n)\n```", True),
        ("def root(n):\n    return n\n", False),
        ("", False),
    ],
)
@needs_sandbox
def test_humaneval(tmp_path: Path, answer: str, passes: bool) -> None:
    section = task(tmp_path, [HUMANEVAL], type="code", form="humaneval", allow_code_execution=True)
    (exercise,) = exercises(section)
    assert grade(section, exercise, answer).score == (100 if passes else 0)


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("def add(a, b): return a + b", ""),
        ("def add(a, b): return a - b", "AssertionError"),
        ("def add(a, b):", "IndentationError: expected an indented block after function definition on line 1"),
        ("raise SystemExit(0)", "exit code 0 before the tests ended"),
        ("import os\nos._exit(0)", "exit code 0 before the tests ended"),
        ("def add(a, b):\n    while True: pass", "more than 1 s"),
        ("def add(a, b): return bytes(1 << 40)", "more than 0.25 GiB"),
        ("while True: print('x' * 999)", "more than 65,536 bytes of output"),
    ],
)
@needs_sandbox
def test_mbpp(tmp_path: Path, answer: str, note: str) -> None:
    row = {"prompt": "Add.", "test_list": ["assert add(1, 2) == three"], "test_setup_code": "three = 3"}
    limits = {"seconds": 1.0, "memory_mib": 256}
    section = task(tmp_path, [row], type="code", form="mbpp", allow_code_execution=True, limits=limits)
    (exercise,) = exercises(section)
    assert "Add. Your code should pass these tests:\n\nassert add(1, 2) == three" in exercise.prompt[-1].content
    found = grade(section, exercise, answer)
    assert found.note.startswith(note) and found.score == (0 if note else 100)


def test_a_program_without_a_header_is_the_answer() -> None:
    exercise = Document("i", (), "", {"header": "", "name": "", "tests": ""})
    assert program_of(exercise, "text\n```py\nx = 1\n```\n```\ny = 2\n```") == "x = 1\n"
    assert program_of(exercise, "```python\nx = 1") == "x = 1"


@needs_sandbox
def test_reference_solutions_pass(real_data: Path) -> None:
    """The first of HumanEval's and of MBPP's, and GSM8K's own answers."""
    for name, form in (("humaneval", "humaneval"), ("mbpp", "mbpp")):
        file = real_data / "instructions" / f"{name}.jsonl.gz"
        data = {"type": "jsonl", "path": str(file)}
        section: Any = TypeAdapter(AnyTask).validate_python(
            {"name": name, "type": "code", "form": form, "allow_code_execution": True, "data": data, "documents": 8}
        )
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            solutions = {row["prompt"]: row["response"] for row in map(json.loads, lines)}
        for exercise in exercises(section):
            (solution,) = [text for asked, text in solutions.items() if asked in exercise.prompt[-1].content][:1]
            assert grade(section, exercise, solution).score == 100, exercise.prompt
    data = {"type": "jsonl", "path": str(real_data / "instructions" / "gsm8k_test.jsonl.gz")}
    numbers: Any = TypeAdapter(AnyTask).validate_python({"name": "gsm8k", "type": "final_number", "data": data})
    found = exercises(numbers)
    assert len(found) == 1319 and all(grade(numbers, one, one.response).score == 100 for one in found)
