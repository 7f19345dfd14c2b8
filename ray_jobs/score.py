"""Corpus parts -> teacher engines -> shard parts: Ray Data over the names of the parts that are missing.

An actor scores a whole part and writes it itself, atomically; only counts come back to the driver. A killed actor is
restarted and its part scored again, a killed driver leaves whole parts, and in both cases the folder ends up the same
byte for byte. The manifest is written last.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from cdm import parts
from cdm.config import Pretrained, Teacher, TeacherPool
from cdm.corpus import read_documents
from cdm.parts import Manifest, Part
from cdm.shards import check_identity, finish_shards, open_shards, read_footer, write_scores
from cdm.teacher import TeacherScorer, check_limits
from cdm.tokenizers import check_lossless, load_tokenizer
from ray_jobs.cluster import check_resources

OnProgress = Callable[[int, str], None]
ATTEMPTS = 4  # at one part, by actors that died
PARTS_IN_FLIGHT = 2  # an engine: the one being scored and the next
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
) -> Manifest:
    """The shards of a corpus's parts `names` (default: all); only those that are missing are scored. Needs Ray running.

    `on_progress` hears the documents that are done, those of earlier runs included, and a note with the rate.

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
    for row in _score_missing([corpus.part(name) for name in missing], arguments, pool):
        tally.add(row)
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


class ScorePart:
    """What an actor of the pool does: an engine, made once, and one corpus part a call.

    `count_attempt` is told the part's name and says how many attempts at it this one makes, over all actors.
    """

    def __init__(
        self,
        scorer: Mapping[str, Any],
        corpus_folder: str,
        shards_folder: str,
        identity: Mapping[str, Any],
        count_attempt: Callable[[str], int],
    ) -> None:
        self.scorer = TeacherScorer(**scorer)
        self.corpus_folder, self.shards_folder, self.identity = corpus_folder, shards_folder, identity
        self.count_attempt = count_attempt

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        part = Part(**batch.to_pylist()[0])
        began = time.monotonic()
        try:
            row = self._score(part) | {"error": ""}
        except (ValueError, OSError) as error:  # Ray Data would keep the traceback's text only: the driver raises it
            row = {"name": part.name, **dict.fromkeys(COUNTS, 0), "reasons": "", "error": f"{part.name}: {error}"}
        row["seconds"] = time.monotonic() - began
        return {key: [value] for key, value in row.items()}

    def _score(self, part: Part) -> dict[str, Any]:
        if not parts.part_exists(self.shards_folder, part.name):  # else: written, but killed before saying so
            if self.count_attempt(part.name) > ATTEMPTS:
                raise ValueError(f"the engine died {ATTEMPTS} times while scoring this part; is memory too small?")
            documents = read_documents(self.corpus_folder, part.name, expect=part)
            scored, quarantined = self.scorer(documents)
            write_scores(self.shards_folder, part.name, scored, quarantined=quarantined, identity=self.identity)
        return _summary(self.shards_folder, part.name)


@ray.remote(num_cpus=0)
class Attempts:
    """How often each part was begun. Ray Data itself retries a part whose actor died without end."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]


class CountAttempt:
    """`count_attempt` of the pool's actors."""

    def __init__(self, attempts: Any) -> None:
        self._attempts = attempts

    def __call__(self, name: str) -> int:
        return int(ray.get(self._attempts.begin.remote(name)))


def _score_missing(missing: list[Part], arguments: dict[str, Any], pool: TeacherPool) -> Iterator[dict[str, Any]]:
    """A row of counts for each part, as it is written. Raises ValueError with what went wrong in an actor."""
    if not missing:
        return
    resources = {name: amount for name, amount in pool.custom.items() if amount}
    check_resources({"CPU": pool.cpus, "GPU": pool.gpus, **resources}, "resources.teacher", "an engine's workers")
    actors = min(pool.actors, len(missing))
    attempts = Attempts.remote()  # type: ignore[attr-defined]
    items = [{"name": p.name, "rows": p.rows, "bytes": p.bytes, "sha256": p.sha256} for p in missing]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ScorePart,
        fn_constructor_kwargs=arguments | {"count_attempt": CountAttempt(attempts)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=actors,
            max_size=min(max(actors, pool.max_actors or actors), len(missing)),
            max_tasks_in_flight_per_actor=PARTS_IN_FLIGHT,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        resources=resources,
        # an engine's threads are counted when its process starts, and in several threads of it
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(pool.cpus)))}},
    )
    for row in rows.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        yield row


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
        self._done = self._quarantined = self._tokens = 0
        self._reasons: list[str] = []
        self._began: float | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        if self._began is None and "seconds" in row:  # an engine's start is no part of the rate
            self._began, self._tokens = time.monotonic() - row["seconds"], 0
        self._done += row["documents"] + row["quarantined"]
        self._quarantined += row["quarantined"]
        self._tokens += row["tokens"]
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
        if self._began is None:
            return "from an earlier run"
        rate = self._tokens / max(1e-9, time.monotonic() - self._began)
        return f"{rate:,.0f} tokens/s" + (f", {self._quarantined} in quarantine" if self._quarantined else "")


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
