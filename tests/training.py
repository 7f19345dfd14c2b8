"""A tiny training run: its documents, its scores, and how two of them are compared."""

from __future__ import annotations

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
from cdm.shards import ROW_GROUP_DOCUMENTS
from cdm.student import TrainingJob
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny
from tests.test_batches import K, scores

SAME = {"loss", "ce", "kd", "d1", "d2", "grad_norm", "validation_bits_per_byte"}


def tiny_job(root: Path) -> TrainingJob:
    """Six steps of CDM on forty documents scored by a teacher with random rows."""
    teacher, student = tiny.tiny_teacher(root / "teacher"), tiny.tiny_student(root / "student")
    tokenizer_t, tokenizer_s = load_tokenizer(teacher), load_tokenizer(student)
    corpus, scored, aligned = (str(root / name) for name in ("corpus", "shards", "aligned"))
    rng, documents = np.random.default_rng(0), tiny.documents(48)
    for name, part in {"train-00000.parquet": documents[:40], "validation-00000.parquet": documents[40:]}.items():
        parts.write_part(corpus, name, table_of(part))
        rows = [scores(document, tokenizer_t, rng) for document in part]
        shards.write_scores(scored, name, rows, quarantined=[], identity={})
        table, _ = align_part(corpus, [scored], name, Grouping("exact", tokenizer_s), max_length=256)
        parts.write_part(aligned, name, table, row_group_size=ROW_GROUP_DOCUMENTS)
    parts.finish(aligned, {}, kind="aligned")
    build_vocab_map(tokenizer_s, tokenizer_t).save(root / "map.npz")
    optimisation = Optimisation(
        steps=6, batch_tokens=700, micro_batch_tokens=300, learning_rate=1e-2, warmup_steps=2, precision="float32",
        checkpoint_every=2, validate_every=3, max_length=256,
    )  # fmt: skip
    return TrainingJob(
        model=student, revision=None, tokenizer=student, optimisation=optimisation,
        method=Cdm(type="cdm", top_k=K), aligned=aligned, shards=(scored,), maps=(str(root / "map.npz"),),
        weights=(1.0,), seed=3, export=str(root / "export"),
    )  # fmt: skip


def assert_same_curve(curve: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [m["step"] for m in curve] == [m["step"] for m in expected]
    for one, other in zip(curve, expected, strict=True):
        assert one.keys() == other.keys()
        for name in SAME & other.keys():
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (name, one["step"])


def assert_same_weights(folder: str, expected: str) -> None:
    """Bit for bit."""
    one, other = (load_file(Path(path) / "model.safetensors") for path in (folder, expected))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
