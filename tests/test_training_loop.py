"""What happens in the loop: validation, the best step, steps that are skipped, what is trained, and the export."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdm.adapters import adapt, merged
from cdm.batches import AlignedData, collate, step_rows
from cdm.checkpoints import FolderCheckpoints, Progress
from cdm.config_methods import Alm, Sft
from cdm.config_models import Best, Lora
from cdm.evaluation import evaluate_student
from cdm.export import read_about, set_generation
from cdm.models import load_model
from cdm.step import Counts, Objective, StudentModel, shard, step
from cdm.student import TrainingJob, counts_of, objective_of, train
from cdm.tokenizers import load_tokenizer
from cdm.validation import has_ended, judged
from tests import tiny
from tests.test_batches import K
from tests.training import assert_same_weights, tiny_job

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("group")]

ALM = Alm(type="alm")  # reads the teacher's log-probabilities of the text itself: what is poisoned here
KD = "validation_kd"


class Killed(Exception):
    """What the process would not have survived."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return tiny_job(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A job in which every log-probability of one document's text is not a number."""
    return tiny_job(tmp_path_factory.mktemp("poisoned"), poisoned=["05-lines"])


def run(job: TrainingJob, folder: Path, *, die_after: int = 0, **settings: Any) -> tuple[TrainingJob, list[dict]]:
    """Trains with other settings and exports into `folder`; the metrics of every step."""
    curve: list[dict] = []

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        curve.append({"step": step, **metrics})
        if step == die_after:
            raise Killed

    job = replace(job, optimisation=job.optimisation.model_copy(update=settings), export=str(folder / "export"))
    checkpoints = FolderCheckpoints(str(folder / "checkpoints"), keep=1)
    if die_after:
        with pytest.raises(Killed):
            train(job, checkpoints, on_metrics)
        checkpoints.wait()
    else:
        train(job, checkpoints, on_metrics)
    return job, curve


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


# --- validation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [False, True])
def test_validation_measures_what_evaluation_does(job: TrainingJob, tmp_path: Path, family: bool) -> None:
    job = tiny_job(tmp_path, family=True) if family else job
    done, curve = run(job, tmp_path)
    data = AlignedData.open(job.aligned, job.shards, "validation")
    report = evaluate_student(
        "student", done.export, [data.row(n) for n in range(len(data))], revision=None,
        tokenizer_t=load_tokenizer(job.model if family else str(Path(job.model).parent / "teacher")),
        micro_batch_tokens=600,
    )  # fmt: skip
    assert curve[-1]["validation_bits_per_byte"] == pytest.approx(report.bits_per_byte, rel=1e-5)
    assert curve[-1]["validation_agreement"] == pytest.approx(report.agreement)
    assert report.shared_boundaries > 100 and (report.agreement > 0.1 or not family)
    assert read_about(done.export)["figures"] == {k: v for k, v in curve[-1].items() if k.startswith("validation_")}


def test_the_kd_of_the_validation_split_is_the_methods_own(job: TrainingJob, tmp_path: Path) -> None:
    done, curve = run(replace(job, weights=(0.25,)), tmp_path)
    data = AlignedData.open(job.aligned, job.shards, "validation")
    model = StudentModel(load_model(done.export).eval())
    rows = np.arange(len(data))
    term, groups = objective_of(job).terms[0], counts_of(data, rows, "response").groups[0]
    total = 0.0
    for number in rows:  # one document at a time

        def read(student: Any, piece: Any) -> Any:
            return term(student, piece.teachers[0], piece).total, {}

        with torch.no_grad():
            total += model.read(collate([data.row(number)], top_k=K), read)[0].item()
    assert curve[-1][KD] == pytest.approx(0.25 * total / groups, rel=1e-4)


def test_cross_entropy_alone_has_no_kd_but_agrees(job: TrainingJob, tmp_path: Path) -> None:
    _, curve = run(replace(job, method=Sft(type="sft")), tmp_path, steps=1)
    assert {"validation_bits_per_byte", "validation_agreement"} == {k for k in curve[0] if k.startswith("validation_")}


@pytest.mark.parametrize(
    ("metric", "values", "best_step", "stale"),
    [
        (KD, [3.0, 2.0, 2.0, 2.5], 2, 2),  # equal is not better
        ("validation_agreement", [0.1, 0.3, 0.2, 0.4], 4, 0),
        (KD, [float("nan"), 2.0, float("nan"), 1.0], 4, 0),
        (KD, [float("nan"), float("inf")], 0, 2),
    ],
)
def test_the_best_step_so_far(metric: str, values: list[float], best_step: int, stale: int) -> None:
    progress = Progress()
    for number, value in enumerate(values, 1):
        progress = judged(replace(progress, step=number), {metric: value}, Best(metric=metric))
    assert (progress.best_step, progress.stale) == (best_step, stale)
    for patience in (1, 2, 3):
        assert has_ended(progress, 100, Best(metric=metric, patience=patience)) == (stale >= patience)
    assert not has_ended(progress, 100, None) and has_ended(progress, len(values), None)


def test_a_metric_that_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"student\.best\.metric: validation_kd could not be measured"):
        judged(Progress(step=1), {"validation_bits_per_byte": 1.0}, Best(metric=KD))


# --- the best step -----------------------------------------------------------------------------------------------

# A rate at which the loss soon rises: the best step is one of the first.
RISING = {"learning_rate": 0.2, "warmup_steps": 0, "validate_every": 1, "steps": 9, "schedule": "constant"}
BEST = Best(metric="validation_bits_per_byte", patience=3)


@pytest.fixture(scope="module")
def stopped(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, list[dict], Path]:
    folder = tmp_path_factory.mktemp("stopped")
    return *run(job, folder, **RISING, best=BEST), folder


def test_a_run_ends_when_nothing_gets_better_and_exports_the_best_step(
    job: TrainingJob, stopped: tuple[TrainingJob, list[dict], Path], tmp_path: Path
) -> None:
    done, curve, folder = stopped
    values = [metrics["validation_bits_per_byte"] for metrics in curve]
    best = int(np.argmin(values)) + 1
    assert len(curve) == best + 3 < 9
    about = read_about(done.export)
    assert (about["step"], about["steps"]) == (best, len(curve))
    assert about["figures"]["validation_bits_per_byte"] == min(values)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step_{best:08d}", f"step_{len(curve):08d}"}
    plain, _ = run(job, tmp_path, **RISING | {"steps": best})  # the rate does not depend on the number of steps
    assert_same_weights(plain.export, done.export)


@pytest.mark.parametrize("die_after", [2, 4])
def test_a_killed_run_knows_its_best_step(
    job: TrainingJob, stopped: tuple[TrainingJob, list[dict], Path], tmp_path: Path, die_after: int
) -> None:
    run(job, tmp_path, **RISING, best=BEST, die_after=die_after)
    done, curve = run(job, tmp_path, **RISING, best=BEST)
    assert curve[-1]["step"] == stopped[1][-1]["step"]
    assert curve[-1]["validation_bits_per_byte"] == stopped[1][-1]["validation_bits_per_byte"]
    assert_same_weights(done.export, stopped[0].export)


def test_a_run_that_had_ended_only_exports(stopped: tuple[TrainingJob, list[dict], Path], tmp_path: Path) -> None:
    shutil.copytree(stopped[2] / "checkpoints", tmp_path / "checkpoints")
    done, curve = run(stopped[0], tmp_path)
    assert curve == []
    assert_same_weights(done.export, stopped[0].export)


# --- steps that are skipped --------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing(job: TrainingJob) -> None:
    model = shard(StudentModel(load_model(job.model)).train(), torch.float32, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = AlignedData.open(job.aligned, (), "train")
    batches = [collate([data.row(n)], top_k=0) for n in (4, 5)]
    counts = Counts(sum(len(batch.rows_s) for batch in batches), ())

    def one(alpha: float) -> Any:
        return step(model, optimizer, batches, Objective(alpha, (), ()), counts, max_grad_norm=1.0)

    def state() -> list[torch.Tensor]:
        tensors = [value for values in optimizer.state.values() for value in values.values()]
        return [getattr(t, "full_tensor", lambda t=t: t)().clone() for t in [*model.parameters(), *tensors]]

    assert not one(1.0).skipped
    before = state()
    outcome = one(float("nan"))
    assert outcome.skipped and outcome.finite == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert not one(1.0).skipped
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_a_poisoned_document_costs_its_steps_and_no_more(poisoned: TrainingJob, tmp_path: Path) -> None:
    done, curve = run(replace(poisoned, method=ALM), tmp_path, steps=8)
    assert curve[-1]["skipped_steps"] == 1.0
    fault = next(metrics for metrics in curve if metrics["skipped_steps"])
    assert not {"loss", "kd", "grad_norm"} & fault.keys() and {"seconds", "learning_rate"} <= fault.keys()
    assert all(np.isfinite(value) for metrics in curve for value in metrics.values())
    assert all(torch.isfinite(tensor).all() for tensor in weights(done.export).values())


def test_the_documents_of_faulty_micro_batches_are_named(poisoned: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 steps in a row had a loss or gradient that is not finite") as raised:
        run(replace(poisoned, method=ALM), tmp_path, steps=8, max_skipped=1, micro_batch_tokens=50)
    assert str(raised.value).count("-lines") == 1 and "05-lines" in str(raised.value)


def test_steps_in_a_row_are_counted_over_a_restart(tmp_path: Path) -> None:
    everything = [document.id for document in tiny.documents(48)]
    job = replace(tiny_job(tmp_path, poisoned=everything), method=ALM)
    run(job, tmp_path, die_after=2, checkpoint_every=1, batch_tokens=1200)
    with pytest.raises(ValueError, match="3 steps in a row") as raised:
        run(job, tmp_path, checkpoint_every=1, batch_tokens=1200)
    data = AlignedData.open(job.aligned, (), "train")
    plan = step_rows(data, seed=job.seed, batch_tokens=1200)
    expected = sorted({data.row(number).id for rows in islice(plan, 3) for number in rows})
    assert f"{', '.join(expected[:20])} and {len(expected) - 20} more; " in str(raised.value)


# --- what is trained ---------------------------------------------------------------------------------------------

LORA = Lora(rank=3, alpha=5, dropout=0.1)


def test_adapters_merge_as_peft_merges_them(job: TrainingJob) -> None:
    model = load_model(job.model)
    adapt(model, LORA, False, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_B" in name:
            parameter.data.normal_(generator=generator)
    found = merged({name: value.clone() for name, value in model.state_dict().items()}, LORA)
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer.merge()
    expected = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    assert found.keys() == expected.keys() == load_model(job.model).state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_adapters_start_alike_on_every_worker(job: TrainingJob) -> None:
    models = [load_model(job.model) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(seed * 7)
        adapt(model, LORA, False, seed=seed)
    one, same, other = (torch.cat([p.flatten() for p in m.parameters() if p.requires_grad]) for m in models)
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("targets", "message"), [(["nowhere"], "nowhere"), (["embed_tokens"], "embed_tokens is a Embedding")]
)
def test_adapters_for_what_is_no_linear_layer_are_refused(job: TrainingJob, targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(load_model(job.model), Lora(targets=targets), False, seed=0)


def test_adapters_train_checkpoint_resume_and_are_merged(job: TrainingJob, tmp_path: Path) -> None:
    job = replace(job, lora=LORA)
    whole, curve = run(job, tmp_path / "whole")
    assert curve[-1]["loss"] < curve[0]["loss"]
    run(job, tmp_path / "killed", die_after=5)
    again, resumed = run(job, tmp_path / "killed")
    assert [metrics["step"] for metrics in resumed] == [5, 6] and resumed[-1]["loss"] == curve[-1]["loss"]
    assert_same_weights(again.export, whole.export)
    before, after = weights(job.model), weights(whole.export)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert all(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= LORA.rank for name in changed)
    (folder,) = (tmp_path / "whole" / "checkpoints").iterdir()
    stored = [name for name in FileSystemReader(folder).read_metadata().state_dict_metadata if ".model." in name]
    assert stored and all(".lora_" in name for name in stored)
    assert not [name for name in vars(AutoModelForCausalLM.from_pretrained(whole.export)) if "peft" in name]


def test_frozen_embeddings_stay(job: TrainingJob, tmp_path: Path) -> None:
    done, _ = run(replace(job, freeze_embeddings=True), tmp_path, steps=2)
    before, after = weights(job.model), weights(done.export)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("settings", "tolerance"), [({"activation_checkpointing": True}, 1e-6), ({"precision": "bfloat16"}, 0.05)]
)
def test_what_saves_memory_gives_the_same_curve(
    job: TrainingJob, tmp_path: Path, settings: dict[str, Any], tolerance: float
) -> None:
    _, plain = run(job, tmp_path / "plain", steps=3)
    done, saving = run(job, tmp_path / "saving", steps=3, **settings)
    for name in ("loss", "ce", "kd"):
        assert [m[name] for m in saving] == pytest.approx([m[name] for m in plain], rel=tolerance)
    assert all(tensor.dtype == torch.float32 for tensor in weights(done.export).values())


def test_compiled_blocks_give_the_same_curve(job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as ever, but run by torch's own operators: C++ for a CPU takes a minute to compile."""
    compiled_blocks = []

    def without_cpp(module: torch.nn.Module, **options: Any) -> None:
        compiled_blocks.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", without_cpp)
    _, plain = run(job, tmp_path / "plain", steps=1)
    done, compiled = run(job, tmp_path / "compiled", steps=1, compile=True)
    assert compiled_blocks == ["LlamaDecoderLayer"] * 2
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in compiled] == pytest.approx([m[name] for m in plain], rel=1e-4)
    assert weights(done.export).keys() == weights(job.model).keys()


# --- what is logged and exported ---------------------------------------------------------------------------------


def test_time_and_padding_add_up(job: TrainingJob, tmp_path: Path) -> None:
    _, curve = run(job, tmp_path, micro_batch_tokens=4000, validate_every=1, checkpoint_every=1)
    shares = [{k: v for k, v in metrics.items() if k.startswith("time_share.")} for metrics in curve]
    assert shares[0] == {} and all(sum(one.values()) == pytest.approx(1) for one in shares[1:])
    assert all(value > 0 for value in shares[-1].values())
    data = AlignedData.open(job.aligned, (), "train")
    lengths = data.sizes["tokens_s"][next(step_rows(data, seed=job.seed, batch_tokens=700))]
    assert curve[0]["padding_share"] == pytest.approx(1 - lengths.sum() / (len(lengths) * lengths.max()))


def test_the_folder_says_where_it_comes_from(job: TrainingJob, tmp_path: Path) -> None:
    done, _ = run(job, tmp_path, steps=1)
    about = read_about(done.export)
    assert about["lineage"]["corpus"] == "of the test" and len(about["lineage"]["teachers"]) == 1
    card = Path(done.export, "README.md").read_text()
    assert card.startswith("---\nlibrary_name:") and "| corpus | of the test |" in card and "type cdm" in card
    assert f"| validation kd | {about['figures'][KD]:.4f} |" in card


def test_a_response_ends_where_it_was_taught_to(job: TrainingJob, tmp_path: Path) -> None:
    model, tokenizer = load_model(job.model), load_tokenizer(str(Path(job.model).parent / "teacher"))
    model.generation_config.eos_token_id = 7
    set_generation(model, tokenizer)
    roles = tokenizer.special_roles
    assert model.generation_config.eos_token_id == sorted({7, roles["eos"], roles["end_of_turn"]})
    assert model.generation_config.pad_token_id == roles["pad"]


def test_prompts_are_rendered_as_they_were_in_training(job: TrainingJob, tmp_path: Path) -> None:
    done, _ = run(job, tmp_path, steps=1)
    tokenizer, used = AutoTokenizer.from_pretrained(done.export), load_tokenizer(job.tokenizer)
    assert used.hf.chat_template is None
    for document in tiny.documents(6):
        chat = [asdict(message) for message in document.prompt]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == used.encode_prompt(document.prompt)
        text = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "Yes."}], tokenize=False)
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == asked + "Yes." + tokenizer.eos_token
    assert load_tokenizer(done.export).end_of_turn_id == used.end_of_turn_id
    assert json.loads(Path(done.export, "generation_config.json").read_text())["eos_token_id"] == [used.end_of_turn_id]
