"""Corpus parts -> teacher engines -> shard parts: the pool of `pool.py` over the parts that are missing.

The manifest is written last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import ray

from cdm import parts
from cdm.config import TeacherPool
from cdm.config_models import Pretrained, Teacher
from cdm.corpus import read_documents
from cdm.parts import Manifest, Part
from cdm.shards import check_identity, finish_shards, open_shards, read_footer, write_scores
from cdm.teacher import TeacherScorer, check_limits
from cdm.tokenizers import check_lossless, load_tokenizer
from ray_jobs.cluster import my_address
from ray_jobs.pool import OnProgress, PartWorker, make_parts

SHOWN_REASONS = 3
COUNTS = ("documents", "tokens", "quarantined")


def score(
    teacher: Teacher,
    *,
    model_path: str,
    model_identity: str,
    corpus_folder: str,
    shards_folder: str,
    pool: TeacherPool,
    names: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    on_speed: Callable[[int, float], None] | None = None,
    on_node: Callable[[str], None] | None = None,
) -> Manifest:
    """The shards of a corpus's parts `names` (default: all); only those that are missing are scored. Needs Ray running.

    `on_progress` hears the documents that are done, those of earlier runs included, and a note with the rate;
    `on_speed`, at the end, the tokens that this run scored and the seconds that it took without the engines' start;
    `on_node` the address of each node that scores a part.

    Raises ValueError: a teacher that cannot score (tokenizer, limits), a folder with shards of something else, more
    documents in quarantine than teacher.max_quarantined_share, resources that this machine lacks.
    """
    corpus = parts.read_manifest(corpus_folder, {"kind": "corpus"})
    names = corpus.names if names is None else list(names)
    identity = shards_identity(teacher, model_path, model_identity, corpus.fingerprint)
    if parts.is_finished(shards_folder):
        manifest = open_shards(shards_folder, identity)
        if set(names) <= set(manifest.names):
            return manifest
    tally = _Tally(teacher.max_quarantined_share, sum(corpus.part(name).rows for name in names), on_progress)
    missing = parts.missing_parts(shards_folder, names)
    for name in names:
        if name not in missing:
            check_identity(shards_folder, name, read_footer(shards_folder, name), identity)
            tally.add(_summary(shards_folder, name))
    arguments = {
        "scorer": _scorer_arguments(teacher, model_path),
        "corpus_folder": corpus_folder,
        "shards_folder": shards_folder,
        "identity": identity,
    }
    for row in make_parts(PlacedScorePart, arguments, [corpus.part(name) for name in missing], pool):
        tally.add(row)
        if on_node is not None:
            on_node(row["address"])
    if on_speed is not None and tally.began is not None:
        on_speed(tally.tokens, time.monotonic() - tally.began)
    return finish_shards(shards_folder, names, identity)


def shards_identity(teacher: Teacher, model_path: str, model_identity: str, corpus_fingerprint: str) -> dict[str, Any]:
    """What is asked of a teacher, as the manifest's meta has it. Raises ValueError where it cannot be done."""
    tokenizer = load_tokenizer(model_path, revision=_revision(teacher))
    check_lossless(tokenizer)
    check_limits(model_path, _revision(teacher), teacher.top_k, teacher.max_length)
    return {
        "teacher": teacher.model.name,
        "teacher_identity": model_identity,
        "tokenizer_t": tokenizer.fingerprint,  # its chat template is part of it
        "engine": teacher.engine.type,
        "dtype": teacher.engine.dtype,
        "entropy": "exact",
        "k": teacher.top_k,
        "top_mass": teacher.top_mass,
        "max_length": teacher.max_length,
        "corpus": corpus_fingerprint,
    }


class ScorePart(PartWorker):
    """An actor of the pool: an engine, made once, and the scores of one corpus part a call."""

    nothing: ClassVar[Mapping[str, Any]] = {**dict.fromkeys(COUNTS, 0), "reasons": ""}

    def __init__(
        self,
        scorer: Mapping[str, Any],
        corpus_folder: str,
        shards_folder: str,
        identity: Mapping[str, Any],
        count_attempt: Callable[[str], int],
    ) -> None:
        super().__init__(shards_folder, count_attempt)
        self.scorer = TeacherScorer(**scorer)
        self.corpus_folder, self.identity = corpus_folder, identity

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        before = self.scorer.engine.memory_backoffs
        return super().__call__(batch) | {"memory_backoffs": [self.scorer.engine.memory_backoffs - before]}

    def make(self, part: Part) -> None:
        documents = read_documents(self.corpus_folder, part.name, expect=part)
        scored, quarantined = self.scorer(documents)
        write_scores(self.folder, part.name, scored, quarantined=quarantined, identity=self.identity)

    def summary(self, name: str) -> dict[str, Any]:
        return _summary(self.folder, name)


class PlacedScorePart(ScorePart):
    """An actor that also says on which node it is."""

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        return super().__call__(batch) | {
            "node": [ray.get_runtime_context().get_node_id()],
            "address": [my_address()],
        }


def _summary(folder: str, name: str) -> dict[str, Any]:
    scores = read_footer(folder, name)
    return {
        "name": name,
        "documents": scores.documents,
        "tokens": scores.tokens,
        "quarantined": len(scores.quarantined),
        "reasons": "; ".join(f"{document_id}: {reason}" for document_id, reason in scores.quarantined[:SHOWN_REASONS]),
    }


class _Tally:
    """Adds up what is done, tells the progress, and stops the job when too much is in quarantine."""

    def __init__(self, max_share: float, documents: int, on_progress: OnProgress | None) -> None:
        self._max_share, self._all, self._on_progress = max_share, documents, on_progress
        self._done = self._quarantined = self.tokens = self._backoffs = 0
        self._reasons: list[str] = []
        self._nodes: set[str] = set()
        self.began: float | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        if self.began is None and "seconds" in row:  # an engine's start is no part of the rate
            self.began, self.tokens = time.monotonic() - row["seconds"], 0
        self._done += row["documents"] + row["quarantined"]
        self._quarantined += row["quarantined"]
        self.tokens += row["tokens"]
        self._backoffs += row.get("memory_backoffs", 0)  # a part of an earlier run has neither these nor a node
        self._nodes |= {row["node"]} if "node" in row else set()
        self._reasons += [row["reasons"]] if row["reasons"] else []
        if self._quarantined > self._max_share * self._all:
            first = "; ".join(self._reasons[:SHOWN_REASONS])
            raise ValueError(
                f"{self._quarantined} of {self._all} documents cannot be scored, more than "
                f"teacher.max_quarantined_share ({self._max_share:g}) allows. The first: {first}"
            )
        if self._on_progress is not None:
            self._on_progress(self._done, self._note())

    def _note(self) -> str:
        if self.began is None:
            return "from an earlier run"
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        counted = [(self._quarantined, "in quarantine"), (self._backoffs, "memory back-offs")]
        where = f" on {len(self._nodes)} nodes" if len(self._nodes) > 1 else ""
        return ", ".join([f"{rate:,.0f} tokens/s{where}", *(f"{count} {what}" for count, what in counted if count)])


def _scorer_arguments(teacher: Teacher, model_path: str) -> dict[str, Any]:
    return {
        "model": model_path,
        "revision": _revision(teacher),
        "engine": teacher.engine.model_dump(),
        "top_k": teacher.top_k,
        "top_mass": teacher.top_mass,
        "max_length": teacher.max_length,
    }


def _revision(teacher: Teacher) -> str | None:
    return teacher.model.revision if isinstance(teacher.model, Pretrained) else None


if __name__ == "__main__":
    from ray_jobs.pipeline import main

    main("score")
