"""Tasks with scores of their own: rows of a data set -> exercises, and an answer to one -> its score (layer 2).

An exercise is a Document: its response is a reference to show, its metadata what the task's grader reads. Scores are
between 0 and 100. A grader is a function of (task, exercise, answer); GRADERS has one a type of task.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rapidfuzz.distance import LCSseq

from cdm import sources
from cdm.checks import final_number
from cdm.config import digest
from cdm.config_corpus import Dataset
from cdm.config_tasks import AnyTask, Code, Instructions, Numbers
from cdm.documents import document_id
from cdm.records import Document, Message
from cdm.sandbox import MIB, Limits, Outcome, run

RECIPE = 1  # part of the identity of exercises and scores: raised when the same data or answer gives others
CATEGORY = "category"  # in the metadata
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
)
_FENCED = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_WORD = re.compile(r"[a-z0-9]+")


# --- exercises ---------------------------------------------------------------------------------------------------


def exercises(task: AnyTask) -> list[Document]:
    """The exercises of a task in the order of their ids, content hashes: the first so many are a random sample.

    Raises ValueError naming file and row where a column is missing or holds something else than the task needs.
    """
    found: dict[str, Document] = {}
    for where, row in sources.rows_of(task.data, _columns(task)):
        prompt, response, metadata = EXERCISES[task.type](task, row, where)
        if task.category:
            metadata[CATEGORY] = str(row[task.category])
        asked = unicodedata.normalize("NFC", prompt)
        messages = (*([Message("system", task.system)] if task.system else []), Message("user", asked))
        document = Document(document_id(messages, response), messages, response, metadata)
        found.setdefault(document.id, document)
    if not found:
        raise ValueError(f"evaluation.tasks: {task.name} has no rows")
    return [found[identity] for identity in sorted(found)][: task.documents]


def exercises_identity(task: AnyTask) -> str:
    """What was asked of the data and what they hold, not where they lie. A data set of the hub counts by its name."""
    keys = {"data", "prompt", "system", "category", "documents", "references", "reference", "form", "setup"}
    data = task.data
    if isinstance(data, Dataset) and not os.path.exists(os.path.expanduser(data.name)):
        return digest(RECIPE, task.model_dump(mode="json", include=keys))
    path = os.path.expanduser(data.name if isinstance(data, Dataset) else data.path)
    asked = task.model_dump(mode="json", include=keys) | {"data": data.model_dump(exclude={"name", "path"})}
    return digest(RECIPE, asked, sources.file_checksums(path))


def _columns(task: AnyTask) -> list[str]:
    columns = [task.prompt, *([task.category] if task.category else [])]
    if isinstance(task, Instructions):
        columns.append(task.references)
    elif isinstance(task, Numbers):
        columns.append(task.reference)
    elif task.form == "humaneval":
        columns += ["test", "entry_point"]
    else:
        columns += ["test_list", *([task.setup] if task.setup else [])]
    return list(dict.fromkeys(columns))


Exercise = tuple[str, str, dict[str, str]]  # prompt, reference to show, metadata


def _instruction(task: Instructions, row: sources.Row, where: str) -> Exercise:
    references = _texts(row, task.references, where)
    if not references:
        raise ValueError(f"{where}: column {task.references!r} holds no reference")
    return _text(row, task.prompt, where), references[0], {"references": json.dumps(references, ensure_ascii=False)}


def _number_exercise(task: Numbers, row: sources.Row, where: str) -> Exercise:
    reference = str(row[task.reference])
    if final_number(reference) is None:
        raise ValueError(f"{where}: column {task.reference!r} holds no number: {reference[:60]!r}")
    return _text(row, task.prompt, where), reference, {"reference": reference}


def _code_exercise(task: Code, row: sources.Row, where: str) -> Exercise:
    prompt = _text(row, task.prompt, where)
    if task.form == "humaneval":
        name = _text(row, "entry_point", where)
        return prompt, "", {"header": prompt, "name": name, "tests": f"{_text(row, 'test', where)}\ncheck({name})\n"}
    tests = "\n".join(_texts(row, "test_list", where))
    setup = "\n".join(_texts(row, task.setup, where)) if task.setup else ""
    return MBPP_PROMPT.format(text=prompt, tests=tests), "", {"header": "", "name": "", "tests": f"{setup}\n{tests}\n"}


def _text(row: sources.Row, column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{where}: column {column!r} holds {type(row[column]).__name__}, expected text")
    return row[column]


def _texts(row: sources.Row, column: str, where: str) -> list[str]:
    """A column that holds a text or a list of them; an empty text is none."""
    values = row[column] if isinstance(row[column], list) else [row[column]]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: column {column!r} holds something else than text or a list of texts")
    return [value for value in values if value]


EXERCISES: dict[str, Callable[[Any, sources.Row, str], Exercise]] = {
    "instructions": _instruction,
    "final_number": _number_exercise,
    "code": _code_exercise,
}


# --- grading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grade:
    """score: 0 to 100. note: why a program did not pass, else empty."""

    score: float
    note: str = ""


def grade(task: AnyTask, exercise: Document, answer: str) -> Grade:
    """The score of one answer. Raises SandboxError where programs cannot be shut in here."""
    return GRADERS[task.type](task, exercise, answer)


def rouge_l(references: Sequence[str], answer: str) -> float:
    """The best F-measure of the longest common subsequence of words over the references; 0 to 1.

    Words are runs of a-z and 0-9 after lower-casing, those of more than three letters stemmed (Porter): as the
    `rouge-score` package does, which the tables of this field are made with. Lin, 2004, aclanthology.org/W04-1013.
    """
    found = _words(answer)
    return max(_f_measure(_words(reference), found) for reference in references)


def _f_measure(wanted: Sequence[str], found: Sequence[str]) -> float:
    common = LCSseq.similarity(wanted, found) if wanted and found else 0
    return 2 * common / (len(wanted) + len(found)) if common else 0.0


def _words(text: str) -> list[str]:
    return [_stem(word) if len(word) > 3 else word for word in _WORD.findall(text.lower())]


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # a second to import

    return PorterStemmer()


def _grade_instruction(task: Instructions, exercise: Document, answer: str) -> Grade:
    return Grade(100 * rouge_l(json.loads(exercise.metadata["references"]), answer))


def _grade_number(task: Numbers, exercise: Document, answer: str) -> Grade:
    right = final_number(answer) == final_number(exercise.metadata["reference"])
    return Grade(100.0 if right else 0.0)


def _grade_code(task: Code, exercise: Document, answer: str) -> Grade:
    limits = Limits(task.limits.seconds, task.limits.memory_mib, task.limits.processes)
    mark = f"passed {exercise.id}"  # the last thing that is done: `exit(0)` in the answer is no pass
    program = f"{program_of(exercise, answer)}\n\n{exercise.metadata['tests']}\nprint({mark!r})\n"
    outcome = run(program, limits)
    if outcome.ending == "exited" and outcome.code == 0 and outcome.output.rstrip().endswith(mark):
        return Grade(100.0)
    return Grade(0.0, _why(outcome, limits))


def program_of(exercise: Document, answer: str) -> str:
    """The Python in an answer: its first fenced block, else all of it.

    Where a function was to be completed and the answer does not define it, it goes on after the prompt, up to the first
    line that is not indented.
    """
    fenced = _FENCED.search(answer)
    code = fenced.group(1) if fenced else answer
    header, name = exercise.metadata["header"], exercise.metadata["name"]
    if not header:
        return code
    if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE):
        return f"{_imports(header)}\n{code}"
    return header + "\n".join(_indented(code))


def _imports(header: str) -> str:
    """What a prompt has before its functions: imports, and helpers that its function may call."""
    place = header.rfind("\ndef ")
    return header[: place + 1] if place >= 0 else ""


def _indented(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if line.strip() and not line[0].isspace():
            return
        yield line


def _why(outcome: Outcome, limits: Limits) -> str:
    if outcome.ending == "time":
        return f"more than {limits.seconds:g} s"
    if outcome.ending == "output":
        return f"more than {limits.output_bytes:,} bytes of output"
    if outcome.ending == "killed":
        return f"killed by signal {outcome.code}"
    lines = outcome.output.strip().splitlines()
    last = lines[-1][:200] if lines else ""
    if "MemoryError" in last:
        return f"more than {limits.memory_mib * MIB / 2**30:g} GiB"
    return last or f"exit code {outcome.code} before the tests ended"


GRADERS: dict[str, Callable[[Any, Document, str], Grade]] = {
    "instructions": _grade_instruction,
    "final_number": _grade_number,
    "code": _grade_code,
}
