"""The training loop on tiny real models: workers, micro-batches and restarts change nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from ray.exceptions import RayActorError
from transformers import AutoModelForCausalLM

from cdm.batches import AlignedData, collate
from cdm.config_methods import AnyMethod, Cdm, Sft
from cdm.config_models import Best, Optimisation
from cdm.export import read_about
from cdm.methods import CONTEXT, METHODS, SAME_TOKENIZER
from cdm.models import load_model
from cdm.pieces import cuts
from cdm.records import AlignedBatch, TeacherRows
from cdm.rows import StudentRows
from cdm.step import Counts, StudentModel, batch_loss
from cdm.student import TrainingJob, learning_rate, objective_of
from cdm.tokenizers import load_tokenizer
from ray_jobs.train import FailAtOnce
from tests import distributed, tiny
from tests.test_batches import K
from tests.training import assert_same_curve, tiny_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return tiny_job(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def undisturbed(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, list[dict]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = replace(job, export=str(folder / "export"))
    return job, distributed.run(job, folder, world=2)


def test_the_loss_falls_and_everything_is_logged(undisturbed: tuple[TrainingJob, list[dict]]) -> None:
    _, curve = undisturbed
    assert [m["step"] for m in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[-1]["ce"] < curve[0]["ce"] - 0.5
    assert {"kd", "one_to_one", "mass_exact", "mass_dynamic", "mass_unmapped", "learning_rate"} <= curve[0].keys()
    assert "validation_bits_per_byte" in curve[2] and "validation_bits_per_byte" not in curve[0]


def test_one_worker_and_two_have_the_same_curve(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path
) -> None:
    alone = distributed.run(replace(job, export=str(tmp_path / "export")), tmp_path, world=1)
    assert_same_curve(alone, undisturbed[1], 1e-4)


def test_micro_batches_change_nothing(
    job: TrainingJob, undisturbed: tuple[TrainingJob, list[dict]], tmp_path: Path
) -> None:
    whole = job.optimisation.model_copy(update={"micro_batch_tokens": 4000})
    curve = distributed.run(replace(job, optimisation=whole, export=str(tmp_path / "export")), tmp_path, world=1)
    assert_same_curve(curve, undisturbed[1], 1e-4)


def test_the_export_is_an_ordinary_folder(undisturbed: tuple[TrainingJob, list[dict]]) -> None:
    job, _ = undisturbed
    model = AutoModelForCausalLM.from_pretrained(job.export)
    ids = torch.tensor([load_tokenizer(job.export).encode_prompt(tiny.documents(3)[2].prompt)])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    before = AutoModelForCausalLM.from_pretrained(job.model)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_sft_trains_on_the_same_documents_without_scores(job: TrainingJob, tmp_path: Path) -> None:
    job = replace(job, method=Sft(type="sft"), export=str(tmp_path / "export"))
    curve = distributed.run(job, tmp_path, world=1)
    assert "kd" not in curve[0] and curve[0]["loss"] == pytest.approx(curve[0]["ce"])


def test_two_workers_skip_the_same_step(tmp_path: Path) -> None:
    """The poisoned document is one worker's; neither takes the step, and both find the same step best afterwards."""
    best = Best(metric="validation_bits_per_byte", patience=2)
    job = tiny_job(tmp_path, poisoned=["05-lines"])
    settings = job.optimisation.model_copy(update={"steps": 8, "validate_every": 1, "best": best})
    job = replace(job, method=parse_method(type="alm"), optimisation=settings)
    curves, exported = [], []
    for world in (1, 2):
        folder = tmp_path / f"workers{world}"
        curves.append(distributed.run(replace(job, export=str(folder / "export")), folder, world=world))
        exported.append(read_about(str(folder / "export"))["step"])
    assert_same_curve(curves[1], curves[0], 1e-4)
    assert curves[1][-1]["skipped_steps"] == 1 and exported[0] == exported[1]


def test_a_value_error_ends_the_run_unless_a_worker_died_too() -> None:
    wrong, died = ValueError("the documents 05-lines"), RayActorError()
    with pytest.raises(ValueError, match="05-lines"):
        FailAtOnce().after_exception(None, {0: wrong, 1: ValueError("the same")})
    FailAtOnce().after_exception(None, {0: wrong, 1: died})
    FailAtOnce().after_exception(None, {1: died})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_warm_up_and_fall(schedule: str) -> None:
    settings = Optimisation(steps=100, warmup_steps=10, learning_rate=1.0, schedule=schedule)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02


EVERY_METHOD = ("uld", "min_edit", "multilevel_ot", "alm", "gold", "strict", "cdm", "cdm_paper", "kl", "js")


@pytest.mark.parametrize("kind", EVERY_METHOD)
def test_every_method_of_the_config_trains_in_any_pieces(job: TrainingJob, kind: str) -> None:
    same = kind in SAME_TOKENIZER
    method = parse_method(type=kind)
    job = replace(job, method=method, maps=(None,) if same else job.maps)
    objective = objective_of(job)
    data = AlignedData.open(job.aligned, job.shards, "train")
    rows = np.arange(7)
    top_k = method.top_k if isinstance(method, Cdm) else None
    whole = CONTEXT.get(kind) == "documents_s"
    batch = collate([data.row(number) for number in rows], top_k=top_k, whole_documents=whole)
    if same:  # its groups are single tokens, its ids the student's
        batch = replace(batch, teachers=(single_tokens(batch),))
        batch = replace(batch, cuts=cuts(len(batch.rows_s), batch.teachers))
    counts = Counts(len(batch.rows_s), (len(batch.teachers[0].groups_s),))
    model = StudentModel(load_model(job.model))
    found = []
    for piece_rows in (5, 10_000):
        model.piece_rows = piece_rows
        model.zero_grad()
        loss, sums = batch_loss(model, batch, objective, counts)
        loss.backward()
        found.append((loss.detach(), {k: v.double() for k, v in sums.items()}, model.model.lm_head.weight.grad.clone()))
        assert found[-1][2].abs().sum() > 0 and sums["kd"] > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def single_tokens(batch: AlignedBatch) -> TeacherRows:
    rows = torch.arange(len(batch.rows_s))
    groups = torch.stack([rows, rows + 1], 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(400, generator=generator)[:K] for _ in rows])
    logp = torch.log_softmax(torch.randn(len(rows), K, generator=generator), 1).sort(1, descending=True).values - 0.1
    return TeacherRows(
        groups, groups, batch.targets_s, torch.zeros(len(rows)), ids, logp.sort(1, descending=True).values
    )


def parse_method(**options: Any) -> Any:
    return TypeAdapter(AnyMethod).validate_python(options)


def test_a_teacher_with_the_students_tokenizer_is_a_plain_kl(job: TrainingJob) -> None:
    objective = objective_of(replace(job, method=parse_method(type="alm"), maps=(None,)))
    batch = AlignedBatch(
        *[torch.zeros(1, 1)] * 2, torch.arange(3), torch.tensor([5, 6, 7]), torch.zeros(3).long(), (), None
    )
    teacher = single_tokens(batch)
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    out = objective.terms[0](StudentRows(logits), teacher, None)
    torch.testing.assert_close(out.total, METHODS["kl"](logits, teacher, None, temperature=1.0).total)
