"""What generated responses must pass: numbers as people write them, a user's own function."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm.checks import check_identity, check_problems, final_number, make_check
from cdm.documents import DroppedError
from cdm.records import Message

PROMPT = (Message("user", "How many?"),)
NUMBER = {"type": "final_number", "reference": "answer"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 and 4 make 7.", "7"),
        ("It costs $1,234.50", "1234.50"),
        ("It falls to -3", "-3"),
        ("5-3 = 2, thus 10-2", "2"),  # what follows a number is subtracted
        ("(4)-2", "2"),
        ("\\boxed{-12}", "-12"),
        ("about .5", "0.5"),
        ("72 is it #### 1,072 apples, 3 each", "1072"),
        ("#### 1\n#### 42", "42"),
        ("in 2024, 1,23 and 1,2345", "2345"),
        ("75%", "75"),
        ("no number ####", None),
        ("", None),
        ("٣", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(-(10**9), 10**9, places=2), st.booleans(), st.sampled_from(["The answer is {}.", "1 + 1\n#### {}"]))
def test_any_written_number_is_read(number: Decimal, commas: bool, text: str) -> None:
    assert final_number(text.format(f"{number:,}" if commas else f"{number}")) == number


def test_the_final_number_is_compared_with_the_reference() -> None:
    check = make_check(NUMBER)
    metadata = {"answer": "4 * 3 = <<4*3=12>>12\n#### 12"}
    assert check(PROMPT, "So it is 12.00.", metadata)
    assert not check(PROMPT, "12 or 13", metadata)
    assert not check(PROMPT, "I do not know.", metadata)
    with pytest.raises(DroppedError, match="no_reference"):
        check(PROMPT, "12", {"answer": "a dozen"})


def test_without_a_check_everything_passes() -> None:
    assert make_check(None)(PROMPT, "", {}) and check_identity(None) is None


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, in the working directory."""
    file = tmp_path / "my_checks.py"
    file.write_text(
        "def brief(prompt, response, metadata):\n"
        "    return len(response) < int(metadata['limit']) and prompt[-1].content == 'How many?'\n"
        "def forgetful(prompt, response, metadata):\n"
        "    len(response) < 3\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    monkeypatch.delitem(__import__("sys").modules, "my_checks", raising=False)
    return file


def function(name: str) -> dict[str, str]:
    return {"type": "function", "name": name}


def test_a_function_of_the_users(module: Path) -> None:
    check = make_check(function("my_checks:brief"))
    assert check(PROMPT, "12", {"limit": "3"}) and not check(PROMPT, "123", {"limit": "3"})
    assert not check((Message("user", "Why?"),), "12", {"limit": "3"})
    with pytest.raises(ValueError, match="my_checks:forgetful returned None, expected true or false"):
        make_check(function("my_checks:forgetful"))(PROMPT, "12", {})


def test_an_edited_function_is_another_check(module: Path) -> None:
    before = check_identity(function("my_checks:brief"))
    module.write_text(module.read_text().replace("<", "<="))
    assert before is not None and before["name"] == "my_checks:brief"
    assert check_identity(function("my_checks:brief")) != before
    assert check_identity(NUMBER) == NUMBER


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module:f", "cannot import no_such_module: No module named 'no_such_module'; is it on PYTHONPATH?"),
        ("my_checks:breif", "my_checks has no function 'breif'"),
        ("my_checks:number", "my_checks:number is no function"),
    ],
)
def test_what_cannot_be_loaded_is_said(module: Path, name: str, problem: str) -> None:
    assert check_problems(function(name)) == [f"generation.check: {problem}"]
    assert check_problems(NUMBER) == []
