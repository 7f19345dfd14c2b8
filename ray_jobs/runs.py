"""What is asked, by name and by digest, and the run above the runs of the stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from cdm import __version__
from cdm.config import Config, digest
from cdm.journal import Journal
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.tracking import Experiment, code_version

FORMAT = 2  # part of every identity: raised when the same request no longer gives the same bytes


def what_is_asked(config: Config) -> dict[str, object]:
    """A config without where it runs, what is searched and what is compared."""
    return config.model_dump(mode="json", exclude={"storage", "resources", "tracking", "search", "compare"})


def open_top_run(experiment: Experiment, config: Config, stage: str, identity: str) -> Journal:
    """The run above those of the stages, with the whole config and what tells it from others."""
    run = experiment.run(stage, config.name, identity)
    run.params(config.model_dump(mode="json"))
    run.tags(
        {
            "cdm.version": __version__,
            "cdm.method": config.method.type,
            "cdm.teacher": ", ".join(teacher.model.name for teacher in config.teachers),
            "cdm.student": config.student.model.name,
            **code_version(),
        }
    )
    return run


def short(*values: object) -> str:
    return digest(FORMAT, *values)[:12]


@dataclass(frozen=True)
class Model:
    """A model that exists on disk or on the hub, with what identifies it."""

    name: str
    path: str
    revision: str | None
    identity: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path, revision=self.revision)
