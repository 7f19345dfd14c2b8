"""Exercises -> a model's answers, and answers -> grades, as parts on disk (layer 2).

A part is the answers of one model to one part of a task's exercises under one seed; its grades are a part of the same
name in another folder. So a rerun writes and grades only what is missing, and another task or model is more parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from cdm import parts
from cdm.config import digest
from cdm.config_tasks import AnyTask
from cdm.generation import sample_seed, stop_ids
from cdm.generators import GENERATORS, Generator, Request, Sampling
from cdm.records import Document
from cdm.tasks import RECIPE, grade
from cdm.tokenizers import Tokenizer, load_tokenizer

PROMPT_TOO_LONG, PROMPT_REFUSED, CUT, ENDED = "prompt_too_long", "prompt_refused", "cut", "ended"
_ANSWERS = pa.schema([("id", pa.string()), ("text", pa.string()), ("tokens", pa.int32()), ("end", pa.string())])
_GRADES = pa.schema([("id", pa.string()), ("score", pa.float64()), ("note", pa.string())])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote. end: `ended` by itself, `cut` at max_tokens; or why it wrote nothing."""

    id: str
    text: str
    tokens: int
    end: str


class AnswerWriter:
    """A plain callable around one engine; nothing of Ray in it. engine is {"type": ..., and that engine's options}."""

    def __init__(
        self, model: str, *, revision: str | None, engine: Mapping[str, Any], max_length: int, seed: int
    ) -> None:
        options = dict(engine)
        kind = options.pop("type")
        self.tokenizer, self.max_length, self.seed = load_tokenizer(model, revision=revision), max_length, seed
        self.stop_ids = stop_ids(self.tokenizer)
        self.engine: Generator = GENERATORS[kind](
            model, revision=revision, tokenizer=self.tokenizer, max_length=max_length, **options
        )

    def __call__(self, task: AnyTask, exercises: Sequence[Document], number: int) -> list[Answer]:
        """The answers under the task's seed of this number; a prompt that leaves no room for one has an empty one."""
        sampling = Sampling(task.temperature, task.top_p, task.max_tokens, tuple(task.stop), self.stop_ids)
        found: dict[str, Answer] = {}
        requests: dict[str, Request] = {}
        for exercise in exercises:
            try:
                ids = self.tokenizer.encode_prompt(exercise.prompt)
            except ValueError:  # a template that refuses the prompt, a system message say
                found[exercise.id] = Answer(exercise.id, "", 0, PROMPT_REFUSED)
                continue
            if len(ids) > self.max_length - task.max_tokens:
                found[exercise.id] = Answer(exercise.id, "", 0, PROMPT_TOO_LONG)
            else:
                requests[exercise.id] = Request(ids, sample_seed(self.seed, exercise.id, number))
        for identity, ids in zip(requests, self.engine.generate(list(requests.values()), sampling), strict=True):
            text, ended = answer_text(self.tokenizer, ids, sampling)
            found[identity] = Answer(identity, text, len(ids), ENDED if ended else CUT)
        return [found[exercise.id] for exercise in exercises]


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling) -> tuple[str, bool]:
    """What new tokens spell before what ended them, and whether anything did.

    Unlike a response to learn from, an answer counts as it is: special tokens within are left out, half a character
    becomes U+FFFD.
    """
    end = next((place for place, token in enumerate(ids) if token in sampling.stop_ids), None)
    spelled = tokenizer.spell_response([token for token in ids[:end] if tokenizer.token_bytes(token) is not None])
    places = [place for text in sampling.stop if (place := spelled.find(text.encode())) >= 0]
    return spelled[: min(places, default=len(spelled))].decode("utf-8", "replace"), end is not None or bool(places)


# --- names -------------------------------------------------------------------------------------------------------


def answers_identity(model_identity: str, engine: Mapping[str, Any], max_length: int, seed: int) -> str:
    """Of a model's folder of answers: the model, how its engine computes, and what it is asked with."""
    return digest(RECIPE, model_identity, engine["type"], engine["dtype"], max_length, seed)


def part_name(task: AnyTask, exercises: str, part: str, number: int) -> str:
    """Of the answers to a part of a task's exercises (their fingerprint) under one seed."""
    keys = {"temperature", "top_p", "max_tokens", "stop"}
    asked = digest(exercises, task.model_dump(mode="json", include=keys))[:12]
    return f"{task.name}-{asked}-seed{number}-{part.rpartition('-')[2]}"


def grades_identity(task: AnyTask) -> str:
    """What changes the grade of the same answer."""
    return digest(RECIPE, task.model_dump(mode="json", include={"type", "form", "limits"}))


# --- parts -------------------------------------------------------------------------------------------------------


def write_answers(folder: str, name: str, answers: Sequence[Answer]) -> None:
    parts.write_part(folder, name, pa.Table.from_pylist([asdict(answer) for answer in answers], _ANSWERS))


def read_answers(folder: str, name: str) -> list[Answer]:
    return [Answer(**row) for row in parts.read_part(folder, name).to_pylist()]


def grade_part(task: AnyTask, exercises: Sequence[Document], answers: str, grades: str, name: str) -> None:
    """Grade one part of the folder `answers` into the folder `grades`."""
    written = read_answers(answers, name)
    rows = [
        {"id": answer.id, **asdict(grade(task, exercise, answer.text))}
        for exercise, answer in zip(exercises, written, strict=True)
    ]
    parts.write_part(grades, name, pa.Table.from_pylist(rows, _GRADES))


def read_grades(folder: str, name: str) -> list[dict[str, Any]]:
    """Rows of id, score and note."""
    return parts.read_part(folder, name).to_pylist()
