"""Scoring on a real, embedded Ray; one kill -9 of vLLM. tests/test_faults.py kills everything else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdm import corpus, parts, shards
from cdm.config import TeacherPool
from cdm.records import Document
from ray_jobs.cluster import connect
from ray_jobs.pool import ATTEMPTS
from ray_jobs.score import _Tally, score
from tests import tiny
from tests.scoring import (
    ALL_CPUS,
    TRANSFORMERS,
    asked,
    files,
    in_process,
    one_row,
    run,
    wait_for,
    workers,
    write_corpus,
)

DOCUMENTS, PART_DOCUMENTS = 360, 24
VLLM = {"type": "vllm", "dtype": "float32", "kv_cache_gib": 0.05, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    documents = tiny.documents(DOCUMENTS - 1)
    documents.insert(40, Document("no-prompt", (), "x"))  # the one that cannot be scored
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents, PART_DOCUMENTS)


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    with connect():
        yield


@pytest.fixture(scope="module")
def undisturbed(model: str, corpus_folder: str, embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    told: list[tuple[int, str]] = []
    run(model, corpus_folder, str(folder), VLLM, on_progress=lambda done, note: told.append((done, note)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == DOCUMENTS and "tokens/s" in told[-1][1] and "1 in quarantine" in told[-1][1]
    return folder


@pytest.mark.slow
def test_every_document_is_scored_once_in_the_corpus_order(undisturbed: Path, corpus_folder: str) -> None:
    manifest = shards.open_shards(str(undisturbed))
    names = parts.read_manifest(corpus_folder).names
    assert manifest.names == names and len(names) == DOCUMENTS / PART_DOCUMENTS
    for name in names:
        expected = [d.id for d in corpus.read_documents(corpus_folder, name) if d.id != "no-prompt"]
        assert [one.id for one in shards.read_scores(str(undisturbed), name)] == expected
    assert manifest.meta["documents"] == DOCUMENTS - 1 and manifest.meta["quarantined"] == 1
    assert parts.read_part(str(undisturbed), shards.QUARANTINE)["id"].to_pylist() == ["no-prompt"]


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_changes_nothing(
    undisturbed: Path, model: str, corpus_folder: str, tmp_path: Path
) -> None:
    left: list[int] = []

    def kill() -> None:
        wait_for(lambda: parts.list_parts(str(tmp_path)))
        (victim,) = workers(os.getpid())
        victim.kill()
        left.append(DOCUMENTS // PART_DOCUMENTS - len(parts.list_parts(str(tmp_path))))

    thread = threading.Thread(target=kill)
    thread.start()
    run(model, corpus_folder, str(tmp_path), VLLM)
    thread.join()
    assert left[0] > 0, "the kill came after the last part"
    assert files(tmp_path) == files(undisturbed)


# --- without an engine or a cluster ------------------------------------------------------------------------------


@pytest.fixture
def scored_by_hand(model: str, tmp_path: Path) -> tuple[str, str]:
    """A corpus of two parts, the first of which is scored. Three of its documents cannot be."""
    documents = [Document(f"bad-{i}", (), "x") for i in range(3)] + tiny.documents(PART_DOCUMENTS)
    folder = write_corpus(tmp_path / "corpus", documents, PART_DOCUMENTS)
    actor = in_process(asked(model, TRANSFORMERS), model, folder, tmp_path / "shards")
    row = actor(one_row(parts.read_manifest(folder).parts[0]))
    assert row["quarantined"] == [3] and row["documents"] == [PART_DOCUMENTS - 3] and row["error"] == [""]
    return folder, str(tmp_path / "shards")


def test_too_many_in_quarantine_fail_the_job_with_counts_and_reasons(
    model: str, scored_by_hand: tuple[str, str]
) -> None:
    folder, shards_folder = scored_by_hand
    with pytest.raises(ValueError, match=r"3 of 27 .*max_quarantined_share \(0.01\).*bad-0: .*at least one message"):
        run(model, folder, shards_folder, TRANSFORMERS)


def test_progress_tells_memory_backoffs_and_nodes() -> None:
    told: list[str] = []
    tally = _Tally(0.5, 12, lambda done, note: told.append(note))
    row = {"documents": 4, "quarantined": 0, "tokens": 100, "reasons": ""}
    tally.add(row)  # from an earlier run
    tally.add(row | {"seconds": 1.0, "memory_backoffs": 2, "node": "a"})
    assert "nodes" not in told[-1]
    tally.add(row | {"seconds": 1.0, "memory_backoffs": 1, "node": "b"})
    assert told[-1].endswith("tokens/s on 2 nodes, 3 memory back-offs")


def test_a_finished_folder_is_returned_without_ray(model: str, scored_by_hand: tuple[str, str]) -> None:
    folder, shards_folder = scored_by_hand
    names = parts.list_parts(shards_folder)
    options: dict[str, Any] = {
        "model_path": model,
        "model_identity": "weights",
        "corpus_folder": folder,
        "shards_folder": shards_folder,
        "pool": ALL_CPUS,
        "names": names,
    }
    lenient = asked(model, TRANSFORMERS, max_quarantined_share=0.5)
    first = score(lenient, **options)
    before = files(shards_folder)
    assert score(lenient, **options) == first and files(shards_folder) == before
    other = asked(model, TRANSFORMERS | {"dtype": "bfloat16"}, max_quarantined_share=0.5)
    with pytest.raises(ValueError, match="dtype is 'float32', expected 'bfloat16'"):
        score(other, **options)


def test_parts_of_another_teacher_are_not_mixed_in(model: str, scored_by_hand: tuple[str, str]) -> None:
    folder, shards_folder = scored_by_hand
    other = asked(model, TRANSFORMERS, max_quarantined_share=0.5)
    arguments = {"corpus_folder": folder, "shards_folder": shards_folder, "pool": ALL_CPUS}
    with pytest.raises(ValueError, match="teacher_identity is 'weights', expected 'others'"):
        score(other, model_path=model, model_identity="others", **arguments)


def test_an_actor_says_what_went_wrong(model: str, scored_by_hand: tuple[str, str]) -> None:
    folder, shards_folder = scored_by_hand
    part = parts.read_manifest(folder).parts[1]
    actor = in_process(asked(model, TRANSFORMERS), model, folder, Path(shards_folder), attempt=ATTEMPTS + 1)
    (error,) = actor(one_row(part))["error"]
    assert part.name in error and f"died {ATTEMPTS} times" in error
    path = Path(folder) / part.name
    path.write_bytes(path.read_bytes()[:100])
    actor.count_attempt = lambda name: 1
    (error,) = actor(one_row(part))["error"]
    assert part.name in error and "100 bytes" in error


@pytest.mark.slow
def test_what_this_machine_lacks_is_named(embedded: None, model: str, corpus_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resources.teacher: an engine's workers need 1 TPU_POD, this machine has 0"):
        score(
            asked(model, TRANSFORMERS),
            model_path=model,
            model_identity="weights",
            corpus_folder=corpus_folder,
            shards_folder=str(tmp_path),
            pool=TeacherPool(custom={"TPU_POD": 1}),
        )
