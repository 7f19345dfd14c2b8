"""What is known before anything runs: coverage against its slow twin, the teacher's mass, memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from cdm.batches import AlignedData
from cdm.config_models import Lora, Student
from cdm.preflight import GIB, Coverage, check_coverage, coverage, memory_problems, teacher_mass, training_memory
from cdm.records import Document
from cdm.student import TrainingJob
from cdm.teacher import render
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import VocabMap
from tests import tiny, training


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return training.tiny_job(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def sides(job: TrainingJob) -> tuple[Tokenizer, Tokenizer]:
    return load_tokenizer(job.model), load_tokenizer(str(Path(job.model).parent / "teacher"))


# --- coverage ----------------------------------------------------------------------------------------------------


def slow_bytes(document: Document, sides: tuple[Tokenizer, Tokenizer], max_length_s: int, max_length_t: int) -> int:
    """The last byte up to which both sides read, where a token of each ends."""
    prompt = sides[0].encode_prompt(document.prompt)
    seen = [0, *sides[0].encode_with_ends(document.response)[1].tolist()][: max(0, max_length_s - len(prompt)) + 1]
    try:
        ends_t = {0, *render(sides[1], document, max_length_t).ends.tolist()}
    except ValueError:
        return 0
    return max(end for end in seen if end in ends_t)


@pytest.mark.parametrize(("max_length_s", "max_length_t"), [(256, 256), (60, 256), (256, 60), (40, 50), (10, 256)])
def test_bytes_are_those_that_both_sides_read(
    sides: tuple[Tokenizer, Tokenizer], max_length_s: int, max_length_t: int
) -> None:
    documents = tiny.documents(30)
    found = coverage(documents, *sides, max_length_s=max_length_s, max_length_t=max_length_t)
    seen = sum(slow_bytes(document, sides, max_length_s, max_length_t) for document in documents)
    total = sum(len(document.response.encode()) for document in documents)
    assert found.bytes == pytest.approx(seen / total) and found.documents == 30
    assert found.bytes > 0.98 or min(max_length_s, max_length_t) < 256


def test_one_to_one_is_that_of_the_aligned_data(job: TrainingJob, sides: tuple[Tokenizer, Tokenizer]) -> None:
    data = AlignedData.open(job.aligned, job.shards, "train")
    tokens = alone = 0
    for row in map(data.row, range(len(data))):
        groups = row.alignments[0]
        tokens += int(groups.bounds_s[-1])
        alone += int(((np.diff(groups.bounds_s) == 1) & (np.diff(groups.bounds_t) == 1)).sum())
    found = coverage(tiny.documents(48)[:40], *sides, max_length_s=256, max_length_t=256)
    assert found.one_to_one == pytest.approx(alone / tokens) and 0 < found.one_to_one < 1


def test_a_response_that_cannot_be_read_covers_nothing(sides: tuple[Tokenizer, Tokenizer]) -> None:
    good = tiny.documents(5)[-1]
    unreadable = replace(good, prompt=())
    found = coverage([good, unreadable], *sides, max_length_s=256, max_length_t=256)
    assert found.bytes == pytest.approx(0.5)


def test_the_floor_says_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    check_coverage(Coverage(7, 0.9, 0.4), 0.9, "big")
    assert "big, coverage: 90.0% of the bytes, 40.0% of the tokens 1:1 (7 documents)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"teacher big see 89\.9% of the bytes of 7 .*min_coverage is 90\.0%"):
        check_coverage(Coverage(7, 0.899, 0.4), 0.9, "big")


def test_the_teachers_mass_by_where_it_can_go(job: TrainingJob) -> None:
    vocab_map = VocabMap.load(str(job.maps[0]))
    data = AlignedData.open(job.aligned, job.shards, "train")
    sums = np.zeros(2)
    groups = 0
    for row in map(data.row, range(len(data))):
        for start in row.alignments[0].bounds_t[:-1]:
            groups += 1
            for token, logp in zip(row.scores[0].topk_ids_t[start], row.scores[0].topk_logp_t[start], strict=True):
                near = vocab_map.graph.starts[token] < vocab_map.graph.starts[token + 1]
                if vocab_map.exact[token] >= 0:
                    sums[0] += np.exp(float(logp))
                elif near:
                    sums[1] += np.exp(float(logp))
    found = teacher_mass(job.aligned, job.shards, 0, vocab_map)
    assert (found.exact, found.near) == pytest.approx(tuple(sums / groups)) and found.near > 0
    assert found.unmapped == pytest.approx(1 - sums.sum() / groups)
    own = teacher_mass(job.aligned, job.shards, 0, None)
    assert own.near == 0 and own.exact > found.exact + found.near


# --- memory ------------------------------------------------------------------------------------------------------

SHAPE = Qwen2Config(
    vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def student(**options: Any) -> Student:
    return Student.model_validate({"model": "org/student", "steps": 1, "precision": "float32"} | options)


def test_the_state_is_shared_by_the_workers() -> None:
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(SHAPE).parameters())
    alone, four = (training_memory(SHAPE, student(), workers) for workers in (1, 4))
    assert alone.state == 16 * weights and four.state == 4 * weights
    assert (alone.gathered, alone.logits, alone.activations) == (four.gathered, four.logits, four.activations)


def test_adapters_need_little_beside_the_weights() -> None:
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(SHAPE).parameters())
    lora = training_memory(SHAPE, student(lora=Lora(rank=2)), 1)
    assert 4 * weights < lora.state < 4.8 * weights
    assert lora.gathered < training_memory(SHAPE, student(), 1).gathered - 4 * 64 * 1000 + 100_000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_a_forward_pass_keeps(checkpointing: bool) -> None:
    model = AutoModelForCausalLM.from_config(SHAPE).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(512)[None] % 1000
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    section = student(micro_batch_tokens=512, activation_checkpointing=checkpointing)
    estimate = training_memory(SHAPE, section, 1).activations
    if checkpointing:  # one block is made again at a time: what it keeps then is not seen here
        estimate -= training_memory(SHAPE, student(micro_batch_tokens=512), 1).activations // 3
    assert hidden.requires_grad and 0.7 < sum(kept.values()) / estimate < 1.4


def test_a_student_that_cannot_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    name = tiny.tiny_student(tmp_path)
    need = training_memory(AutoConfig.from_pretrained(name), student(), 2)
    assert (
        memory_problems(name, None, student(), 2, None) == memory_problems(name, None, student(), 2, need.least) == []
    )
    (line,) = memory_problems(name, None, student(), 2, need.least - 1)
    assert re.search(rf"needs at least {need.least / GIB:,.1f} GiB .*now 2\), or set student\.lora", line)
