"""Parts of prompts -> engines that write responses -> parts of a corpus: the pool of `pool.py` over what is missing.

The manifest is written last.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from cdm import parts
from cdm.checks import check_identity
from cdm.config import Config
from cdm.config_models import Pretrained
from cdm.corpus import read_documents
from cdm.generation import ResponseGenerator, finish_generated, read_generated, split_name, write_generated
from cdm.parts import Manifest, Part
from cdm.tokenizers import load_tokenizer
from ray_jobs.pool import OnProgress, PartWorker, make_parts


def generate(
    config: Config,
    identity: Mapping[str, Any],
    *,
    model_path: str,
    source_folder: str,
    generated_folder: str,
    on_progress: OnProgress | None = None,
) -> tuple[Manifest, float]:
    """The corpus that config.generation asks for, and the tokens/s of what this run wrote. Needs Ray running.

    Only parts that are missing are made. `on_progress` hears the documents of the source that are done, those of
    earlier runs included, and a note. `identity` is `generation_identity`'s. Raises ValueError: a folder with parts of
    something else, no training document left, resources that this machine lacks.
    """
    source = parts.read_manifest(source_folder, {"kind": "corpus"})
    if parts.is_finished(generated_folder):
        return parts.read_manifest(generated_folder, {"kind": "corpus", "generation": dict(identity)}), 0.0
    tally = _Tally(on_progress)
    missing = parts.missing_parts(generated_folder, source.names)
    for name in source.names:
        if name not in missing:
            tally.add(source.part(name).rows, read_generated(generated_folder, name, identity).counts)
    arguments = {
        "generator": generator_arguments(config, model_path),
        "source_folder": source_folder,
        "generated_folder": generated_folder,
        "identity": dict(identity),
    }
    todo = [source.part(name) for name in missing]
    for row in make_parts(GeneratePart, arguments, todo, config.resources.teacher):
        tally.add(source.part(row["name"]).rows, json.loads(row["counts"]), row["seconds"])
    return finish_generated(generated_folder, source.names, identity), tally.rate


def generation_identity(
    config: Config, model_path: str, model_identity: str, source_fingerprint: str
) -> dict[str, Any]:
    """What is asked for, as the manifest's meta has it: values of the config, and what they are applied to.

    Raises ValueError where the tokenizer or the check cannot be loaded.
    """
    section, teacher = config.generation, config.generator
    assert section is not None
    asked = section.model_dump(mode="json", exclude={"model", "engine", "max_length", "check"})
    return {
        **asked,
        "model": teacher.model.name,
        "model_identity": model_identity,
        "tokenizer": load_tokenizer(model_path, revision=_revision(config)).fingerprint,
        "engine": teacher.engine.type,
        "dtype": teacher.engine.dtype,
        "max_length": teacher.max_length,
        "min_bytes": config.corpus.min_response_bytes,
        "max_bytes": config.corpus.max_response_bytes,
        "check": check_identity(section.check.model_dump() if section.check else None),
        "seed": config.seed,
        "source": source_fingerprint,
    }


def generator_arguments(config: Config, model_path: str) -> dict[str, Any]:
    """What an actor's ResponseGenerator is made with."""
    section, teacher = config.generation, config.generator
    assert section is not None
    return {
        **section.model_dump(exclude={"model", "engine", "max_length"}),
        "model": model_path,
        "revision": _revision(config),
        "engine": teacher.engine.model_dump(),
        "max_length": teacher.max_length,
        "min_bytes": config.corpus.min_response_bytes,
        "max_bytes": config.corpus.max_response_bytes,
        "seed": config.seed,
    }


class GeneratePart(PartWorker):
    """An actor of the pool: an engine, made once, and the responses to one part of prompts a call."""

    nothing: ClassVar[Mapping[str, Any]] = {"counts": "{}"}

    def __init__(
        self,
        generator: Mapping[str, Any],
        source_folder: str,
        generated_folder: str,
        identity: Mapping[str, Any],
        count_attempt: Callable[[str], int],
    ) -> None:
        super().__init__(generated_folder, count_attempt)
        self.generator = ResponseGenerator(**generator)
        self.source_folder, self.identity = source_folder, identity

    def make(self, part: Part) -> None:
        documents = read_documents(self.source_folder, part.name, expect=part)
        written, counts = self.generator(documents, split_name(part.name))
        write_generated(self.folder, part.name, written, counts, self.identity)

    def summary(self, name: str) -> dict[str, Any]:
        return {"counts": json.dumps(read_generated(self.folder, name, self.identity).counts)}


class _Tally:
    """Adds up what is done and tells the progress."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._done = self._tokens = 0
        self.rate = 0.0  # generated tokens/s of this run, over all engines
        self._counts: Counter[str] = Counter()
        self._began: float | None = None

    def add(self, documents: int, counts: Mapping[str, int], seconds: float | None = None) -> None:
        """`seconds` is how long a part of this run took; an engine's start is no part of the rate."""
        self._done += documents
        self._counts.update(counts)
        if seconds is not None:
            self._began = self._began or time.monotonic() - max(seconds, 1e-9)
            self._tokens += counts["tokens"]
            self.rate = self._tokens / (time.monotonic() - self._began)
        if self._on_progress is not None:
            self._on_progress(self._done, self._note())

    def _note(self) -> str:
        kept = f"{self._counts['generated']} of {self._counts['samples']} samples kept"
        return f"{self.rate:,.0f} tokens/s, {kept}" if self._began else f"{kept}, from an earlier run"


def _revision(config: Config) -> str | None:
    model = config.generator.model
    return model.revision if isinstance(model, Pretrained) else None


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("generate")
