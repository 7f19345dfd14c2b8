"""What the tests of scoring share: a corpus in small parts, what is asked of the teacher, its actors, its folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from cdm import corpus, parts
from cdm.config import TeacherPool
from cdm.config_models import Teacher
from cdm.records import Document
from ray_jobs.score import ScorePart, score, shards_identity

ALL_CPUS = TeacherPool(cpus=float(os.cpu_count() or 1))  # an engine that takes them all must not lock Ray up
TRANSFORMERS = {"type": "transformers", "dtype": "float32", "batch_tokens": 1}  # one document a batch: slow enough


def write_corpus(folder: Path, documents: list[Document], part_documents: int) -> str:
    names = []
    for start in range(0, len(documents), part_documents):
        rows = [
            {
                "id": document.id,
                "prompt": [{"role": message.role, "content": message.content} for message in document.prompt],
                "response": document.response,
                "metadata": "{}",
            }
            for document in documents[start : start + part_documents]
        ]
        names.append(f"train-{start // part_documents:05d}.parquet")
        parts.write_part(str(folder), names[-1], pa.Table.from_pylist(rows, schema=corpus.SCHEMA))
    parts.finish(str(folder), {}, kind="corpus", names=names)
    return str(folder)


def asked(model: str, engine: dict[str, Any], **options: Any) -> Teacher:
    return Teacher.model_validate({"model": model, "engine": engine, "top_k": 8, "max_length": 128, **options})


def run(model: str, corpus_folder: str, folder: str, engine: dict[str, Any], **options: Any) -> parts.Manifest:
    return score(
        asked(model, engine),
        model_path=model,
        model_identity="weights",
        corpus_folder=corpus_folder,
        shards_folder=folder,
        **{"pool": ALL_CPUS, **options},
    )


def files(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def workers(pid: int) -> list[psutil.Process]:
    """The scoring actors below a process."""
    found = []
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def family(pid: int) -> list[psutil.Process]:
    """All processes below a process: Ray's and its workers."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def wait_for(what: Callable[[], Any], every: float = 0.005, seconds: float = 300) -> Any:
    """The first true value of `what()`."""
    for _ in range(int(seconds / every)):
        if found := what():
            return found
        threading.Event().wait(every)
    raise AssertionError(f"{what.__qualname__} gave nothing in {seconds} s")


def in_process(teacher: Teacher, model: str, corpus_folder: str, folder: Path, attempt: int = 1) -> ScorePart:
    """What an actor runs, without Ray."""
    scorer = {"model": model, "engine": teacher.engine.model_dump(), "top_k": 8, "max_length": teacher.max_length}
    identity = shards_identity(teacher, model, "weights", parts.read_manifest(corpus_folder).fingerprint)
    return ScorePart(scorer, corpus_folder, str(folder), identity, count_attempt=lambda name: attempt)


def one_row(part: parts.Part) -> pa.Table:
    fields = {"name": part.name, "rows": part.rows, "bytes": part.bytes, "sha256": part.sha256}
    return pa.Table.from_pylist([fields])
