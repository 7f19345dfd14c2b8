"""A tiny training job, and `cdm.student.train` in real processes of a gloo group, as torchrun would start them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cdm import parts, shards
from cdm.batches import align_part
from cdm.checkpoints import FolderCheckpoints
from cdm.config_methods import Cdm
from cdm.config_models import Optimisation
from cdm.corpus import table_of
from cdm.grouping import Grouping
from cdm.records import ScoredDocument
from cdm.student import TrainingJob, train
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny
from tests.test_batches import K, scores


def tiny_job(root: Path, *, poisoned: Sequence[str] = (), family: bool = False) -> TrainingJob:
    """Six steps of CDM on forty documents scored by a teacher with random rows, and eight for validation.

    poisoned: documents whose own log-probabilities are not a number. family: the teacher has the student's tokenizer,
    and its best token is the text's.
    """
    teacher, student = tiny.tiny_teacher(root / "teacher"), tiny.tiny_student(root / "student")
    tokenizer_t, tokenizer_s = load_tokenizer(student if family else teacher), load_tokenizer(student)
    corpus, scored, aligned = (str(root / name) for name in ("corpus", "shards", "aligned"))
    rng, documents = np.random.default_rng(0), tiny.documents(48)
    for name, part in {"train-00000.parquet": documents[:40], "validation-00000.parquet": documents[40:]}.items():
        parts.write_part(corpus, name, table_of(part))
        rows = [scores(document, tokenizer_t, rng) for document in part]
        rows = [replace(row, logp_t=row.logp_t * np.nan) if row.id in poisoned else row for row in rows]
        rows = [_best_is_the_text(row) for row in rows] if family else rows
        shards.write_scores(scored, name, rows, quarantined=[], identity={})
        table, _ = align_part(corpus, [scored], name, Grouping("exact", tokenizer_s), max_length=256)
        parts.write_part(aligned, name, table, row_group_size=shards.ROW_GROUP_DOCUMENTS)
    shards.finish_shards(scored, ["train-00000.parquet", "validation-00000.parquet"], {})
    parts.finish(aligned, {"corpus": "of the test"}, kind="aligned")
    build_vocab_map(tokenizer_s, tokenizer_t).save(root / "map.npz")
    optimisation = Optimisation(
        steps=6, batch_tokens=700, micro_batch_tokens=300, learning_rate=1e-2, warmup_steps=2, precision="float32",
        checkpoint_every=2, validate_every=3, max_length=256,
    )  # fmt: skip
    return TrainingJob(
        model=student, revision=None, tokenizer=student, optimisation=optimisation,
        method=Cdm(type="cdm", top_k=K), aligned=aligned, shards=(scored,), weights=(1.0,),
        maps=(None if family else str(root / "map.npz"),), seed=3, export=str(root / "export"),
    )  # fmt: skip


def _best_is_the_text(row: ScoredDocument) -> ScoredDocument:
    pairs = zip(row.ids_t, row.topk_ids_t, strict=True)
    ids = [[own, *(token for token in tokens if token != own)][:K] for own, tokens in pairs]
    return replace(row, topk_ids_t=np.array(ids, np.int32))


def run(job: TrainingJob, folder: Path, world: int, *, die_after: int | None = None) -> list[dict[str, float]]:
    """Metrics of every step, in order. With `die_after` every process kills itself (SIGKILL) after that step."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    arguments = (world, str(store), job, str(folder), die_after)
    context = mp.spawn(_worker, arguments, nprocs=world, join=False, start_method="spawn")
    if die_after is None:
        while not context.join():
            pass
    else:
        for process in context.processes:
            process.join()
        codes = [process.exitcode for process in context.processes]
        assert -signal.SIGKILL in codes and 0 not in codes  # a peer may see the connection break first
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _worker(rank: int, world: int, store: str, job: TrainingJob, folder: str, die_after: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            with open(Path(folder) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        if step == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    train(job, FolderCheckpoints(str(Path(folder) / "checkpoints")), on_metrics)
    dist.destroy_process_group()
