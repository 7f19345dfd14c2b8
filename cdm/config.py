"""What a user asks for: one YAML file, checked whole before anything starts (layer 0, no torch).

Unions are keyed on `type`. An unknown key, a wrong type or a missing path is reported with all the others, each with
the key's full name and the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cdm.config_compare import Compare
from cdm.config_corpus import AnyCorpus, Fields
from cdm.config_errors import ConfigError, apply_override, describe
from cdm.config_methods import AnyMethod, Sft
from cdm.config_models import FinalNumber, Generation, Student, Teacher, check_context
from cdm.config_search import Search
from cdm.config_tasks import Evaluation
from cdm.config_types import Folder, Positive, Strict


class TeacherPool(Strict):
    actors: Positive = Field(1, description="engines at once")
    max_actors: Positive | None = Field(None, description="the pool may grow to so many; default: `actors`")
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict, description="named Ray resources, an engine")


class StudentPool(Strict):
    workers: Positive = 1
    min_workers: Positive | None = Field(None, description="goes on with so many where `workers` do not fit")
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict, description="named Ray resources, a worker")
    max_failures: Annotated[int, Field(ge=0)] = Field(3, description="restarts of a training run before it fails")
    timeout_s: Positive = Field(300, description="a worker that hangs is noticed after so long")

    @model_validator(mode="after")
    def _fewer_at_least(self) -> StudentPool:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds workers, {self.workers}")
        return self


class Resources(Strict):
    """Where it runs. Never part of a run's identity."""

    teacher: TeacherPool = TeacherPool()
    student: StudentPool = StudentPool()


class Mlflow(Strict):
    type: Literal["mlflow"]
    uri: str | None = Field(None, description="default: sqlite in the storage folder")
    experiment: str = "cdm"


class NoTracking(Strict):
    type: Literal["none"]


AnyTracking = Annotated[Mlflow | NoTracking, Field(discriminator="type")]


class Config(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage: Folder = Field("outputs", description="shared by all nodes; every stage keeps its output below it")
    seed: int = 0
    corpus: AnyCorpus
    teachers: Annotated[list[Teacher], Field(min_length=1)]
    generation: Generation | None = None
    student: Student
    method: AnyMethod
    baselines: list[AnyMethod] = Field(default_factory=list, description="also trained, for the table of results")
    evaluation: Evaluation = Evaluation()
    search: Search | None = None
    compare: Compare | None = None
    resources: Resources = Resources()
    tracking: AnyTracking = Field(default_factory=lambda: Mlflow(type="mlflow"))

    @model_validator(mode="after")
    def _methods_differ(self) -> Config:
        asked = [self.method, *self.baselines]
        if any(one == other for i, one in enumerate(asked) for other in asked[:i]):
            raise ValueError("baselines: each must differ from the method and from the others")
        return self

    @model_validator(mode="after")
    def _every_method_has_the_best_metric(self) -> Config:
        best = self.student.best
        if best is not None and best.metric == "validation_kd":
            for section in (self.method, *self.baselines):
                if isinstance(section, Sft):
                    raise ValueError(
                        "student.best.metric: sft has no validation_kd; take validation_bits_per_byte or "
                        "validation_agreement, or leave out sft"
                    )
        return self

    @model_validator(mode="after")
    def _responses_come_from_somewhere(self) -> Config:
        columns = self.corpus if isinstance(self.corpus, Fields) else None
        if self.generation is None:
            if columns is not None and columns.response is None and columns.messages is None:
                raise ValueError("corpus.response is null and there is no `generation` that would write responses")
            return self
        max_length, check = self.generator.max_length, self.generation.check
        check_context(self.generator.model, max_length, "generation.")
        if self.generation.max_tokens >= max_length:
            raise ValueError(
                f"generation.max_tokens {self.generation.max_tokens} leaves no room for a prompt: "
                f"max_length is {max_length}"
            )
        if isinstance(check, FinalNumber) and (columns is None or check.reference not in columns.metadata):
            raise ValueError(f"generation.check.reference: {check.reference!r} is not in corpus.metadata")
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> Config:
        for place, task in enumerate(self.evaluation.tasks):
            if task.max_tokens >= self.answer_length:
                raise ValueError(
                    f"evaluation.tasks.{place}.max_tokens {task.max_tokens} leaves no room for a prompt: "
                    f"evaluation.max_length is {self.answer_length}"
                )
        if self.evaluation.tasks:
            for model in (self.teachers[0].model, self.student.model):
                check_context(model, self.answer_length, "evaluation.")
        return self

    @property
    def answer_length(self) -> int:
        """Tokens of prompt and answer in `evaluation.tasks`."""
        return self.evaluation.max_length or min(self.teachers[0].max_length, self.student.max_length)

    @property
    def student_seed(self) -> int:
        return self.seed if self.student.seed is None else self.student.seed

    @property
    def generator(self) -> Teacher:
        """Who writes responses: the first teacher, but for what `generation` says."""
        asked = self.generation or Generation()
        own = {"model": asked.model, "engine": asked.engine, "max_length": asked.max_length}
        return self.teachers[0].model_copy(update={key: value for key, value in own.items() if value is not None})


# --- reading -----------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config in a YAML file with `a.b=c` overrides applied.

    Raises ConfigError (a ValueError) with every problem found, each naming its key.
    """
    values = _read_yaml(Path(path))
    problems = []
    for override in overrides or []:
        try:
            apply_override(values, override)
        except ConfigError as error:
            problems += error.problems
    try:
        config = parse_config(values)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from error
    if problems:
        raise ConfigError(problems)
    return config


def parse_config(values: dict[str, Any]) -> Config:
    """The config in plain values. Raises ConfigError with every problem found."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([describe(problem, Config) for problem in error.errors()]) from error


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in its section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError([f"{file}: {'a folder, expected a YAML file' if file.is_dir() else 'no such config file'}"])
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{file}{line}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{file}: expected a mapping of keys at the top level"])
    return values


# --- identity ----------------------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Hex sha256 of plain values and config sections: what was asked, in a canonical order."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

    text = json.dumps([plain(value) for value in values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def storage_path(config: Config, *names: str) -> str:
    """A path below the storage folder, absolute: workers have other working directories."""
    return os.path.join(os.path.abspath(os.path.expanduser(config.storage)), *names)
