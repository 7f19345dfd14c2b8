"""A tiny training run: its documents, its scores, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cdm import parts, shards
from cdm.batches import align_part
from cdm.config_methods import Cdm
from cdm.config_models import Optimisation
from cdm.corpus import table_of
from cdm.grouping import Grouping
from cdm.records import ScoredDocument
from cdm.shards import ROW_GROUP_DOCUMENTS
from cdm.speed import LAPS
from cdm.student import TrainingJob
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny
from tests.test_batches import K, scores

SAME = {
    *("loss", "ce", "kd", "d1", "d2", "grad_norm", "skipped_steps"),
    *("validation_bits_per_byte", "validation_kd", "validation_agreement"),
}
LATE = {f"time_share.{name}" for name in LAPS}  # the first step after a start has none


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
        parts.write_part(aligned, name, table, row_group_size=ROW_GROUP_DOCUMENTS)
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


def assert_same_curve(curve: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [m["step"] for m in curve] == [m["step"] for m in expected]
    for one, other in zip(curve, expected, strict=True):
        assert one.keys() | LATE == other.keys() | LATE
        for name in SAME & other.keys():
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (name, one["step"])


def assert_same_weights(folder: str, expected: str) -> None:
    """Bit for bit."""
    one, other = (load_file(Path(path) / "model.safetensors") for path in (folder, expected))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
