"""The config's `evaluation` section: held-out documents and tasks with scores of their own (layer 0)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cdm.config_corpus import AnyRows
from cdm.config_models import AnyEngine
from cdm.config_types import Positive, Strict


class Task(Strict):
    """Prompts that every model answers, `seeds` times each."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: AnyRows
    prompt: str = Field("prompt", description="a column of text")
    system: str | None = Field(None, description="a system message put before every prompt")
    category: str | None = Field(None, description="a column: scores are given for each of its values too")
    documents: Positive | None = Field(None, description="only so many, the first in the order of their ids")
    seeds: Positive = Field(1, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = Field(512, description="tokens of an answer; a longer one is cut and scored as it is")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, description="texts that end it")

    @model_validator(mode="after")
    def _answers_differ(self) -> Task:
        if self.temperature == 0 and self.seeds > 1:
            raise ValueError(f"temperature 0 gives the same answer {self.seeds} times; set seeds to 1")
        return self


class Instructions(Task):
    """Instruction following: ROUGE-L against the best of the references. As MiniLLM and DSKD: five seeds, sampled."""

    type: Literal["instructions"]
    references: str = Field("response", description="a column: a text, or a list of texts")
    seeds: Positive = Field(5, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0)] = 1.0


class Numbers(Task):
    """GSM8K and its kind: the answer's final number is the reference's."""

    type: Literal["final_number"]
    reference: str = Field("response", description="a column: the number, or a text that ends with it")


class CodeLimits(Strict):
    """Of one program. Processes: together they may have `processes` times the memory."""

    seconds: Annotated[float, Field(gt=0)] = 10.0
    memory_mib: Positive = 512
    processes: Positive = 8


class Code(Task):
    """Programs that pass the task's tests, run in a sandbox."""

    type: Literal["code"]
    form: Literal["humaneval", "mbpp"] = Field(description="humaneval: a function to complete; mbpp: a task in words")
    allow_code_execution: Literal[True] = Field(description="true: what the model writes is run, in a sandbox")
    setup: str | None = Field("test_setup_code", description="mbpp: a column of code that the tests need")
    k: Annotated[list[Positive], Field(min_length=1)] = Field(default_factory=lambda: [1], description="of pass@k")
    limits: CodeLimits = CodeLimits()

    @model_validator(mode="after")
    def _enough_samples(self) -> Code:
        if max(self.k) > self.seeds:
            raise ValueError(f"pass@{max(self.k)} needs as many seeds, there are {self.seeds}")
        return self


AnyTask = Annotated[Instructions | Numbers | Code, Field(discriminator="type")]


class Evaluation(Strict):
    documents: Positive = Field(200, description="documents of the test split")
    samples: Annotated[int, Field(ge=0)] = Field(3, description="completions shown")
    sample_tokens: Positive = 64
    tasks: list[AnyTask] = Field(default_factory=list, description="each with a score of its own")
    engine: AnyEngine | None = Field(None, description="writes every model's answers; default: the first teacher's")
    max_length: Positive | None = Field(
        None, description="tokens of prompt and answer; default: the smaller of the first teacher's and the student's"
    )
    harness: list[str] = Field(default_factory=list, description="tasks of EleutherAI's lm-eval, by name")
    harness_limit: Positive | None = Field(None, description="of each lm-eval task the first so many documents")

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluation:
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tasks: the name {name!r} stands twice")
        return self
