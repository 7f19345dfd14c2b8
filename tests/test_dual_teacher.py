"""Two teachers at once: one with the student's own tokenizer, one with another (docs/method.md, section 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cdm import parts, shards
from cdm.batches import align_part
from cdm.checkpoints import FolderCheckpoints
from cdm.config_methods import Cdm
from cdm.config_models import Optimisation
from cdm.corpus import table_of
from cdm.grouping import Grouping
from cdm.models import load_model
from cdm.student import TrainingJob, train
from cdm.teacher import TeacherScorer
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny
from tests.scoring import TRANSFORMERS

K = 20


def teach(folder: str) -> None:
    """A little of the documents' language, so that there is something to learn from it."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for document in tiny.documents(32)[2:]:
        response, _ = tokenizer.encode_with_ends(document.response)
        ids = torch.tensor([[*tokenizer.encode_prompt(document.prompt), *response]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def dual_job(root: Path, weights: tuple[float, float]) -> TrainingJob:
    """A student, a teacher that has its tokenizer, and one that has another; both have scored every document."""
    student = tiny.tiny_student(root / "student")
    teachers = [tiny.tiny_student(root / "sibling", seed=5), tiny.tiny_teacher(root / "teacher", scale=0.02)]
    for teacher in teachers:
        teach(teacher)
    tokenizer, folders = load_tokenizer(student), [str(root / f"shards{k}") for k in range(2)]
    corpus, aligned, documents = str(root / "corpus"), str(root / "aligned"), tiny.documents(40)
    scorers = [TeacherScorer(path, engine=TRANSFORMERS, top_k=K, max_length=128) for path in teachers]
    for name, part in {"train-00000.parquet": documents[:32], "validation-00000.parquet": documents[32:]}.items():
        parts.write_part(corpus, name, table_of(part))
        for scorer, folder in zip(scorers, folders, strict=True):
            scored, quarantined = scorer.score(part)
            shards.write_scores(folder, name, scored, quarantined=quarantined, identity={})
        table, _ = align_part(corpus, folders, name, Grouping("exact", tokenizer), max_length=128)
        parts.write_part(aligned, name, table, row_group_size=shards.ROW_GROUP_DOCUMENTS)
    for folder in folders:
        shards.finish_shards(folder, parts.list_parts(aligned), {})
    parts.finish(aligned, {}, kind="aligned")
    build_vocab_map(tokenizer, scorers[1].tokenizer).save(root / "map.npz")
    optimisation = Optimisation(
        steps=16, batch_tokens=800, learning_rate=1e-2, warmup_steps=2, precision="float32", max_length=128,
    )  # fmt: skip
    return TrainingJob(
        model=student, revision=None, tokenizer=student, optimisation=optimisation,
        method=Cdm(type="cdm", top_k=K, alpha=0.2, tail="residual"), aligned=aligned, shards=tuple(folders),
        maps=(None, str(root / "map.npz")), weights=weights, seed=3, export=str(root / "export"),
    )  # fmt: skip


TERMS = ("ce", "teacher0.kd", "teacher1.kd")


def test_both_terms_are_logged_and_fall(group: None, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    curve: list[dict[str, float]] = []
    job = dual_job(tmp_path, weights=(0.75, 0.5))
    train(job, FolderCheckpoints(str(tmp_path / "checkpoints")), lambda step, metrics: curve.append(metrics))
    first, last = ({name: sum(m[name] for m in some) for name in TERMS} for some in (curve[:4], curve[-4:]))
    assert all(last[name] < 0.9 * first[name] for name in TERMS), (first, last)
    for metrics in curve:
        kd = 0.75 * metrics["teacher0.kd"] + 0.5 * metrics["teacher1.kd"]
        assert metrics["loss"] == pytest.approx(0.2 * metrics["ce"] + 0.8 * kd, rel=1e-4)
    assert "teacher0.d1" not in curve[0] and {"teacher1.d1", "teacher1.mass_dynamic"} <= curve[0].keys()
