"""Where time goes, and operations against what torch counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cdm import speed
from cdm.speed import Costs, Laps, time_shares

CPU = torch.device("cpu")


def model(**options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
        attn_implementation="eager", **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [16, 200])
def test_operations_are_those_that_torch_counts(tied: bool, length: int) -> None:
    student = model(tie_word_embeddings=tied)
    ids = torch.arange(length)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        student(ids).logits.sum().backward()
    costs = Costs.of(student, CPU, torch.float32)
    assert costs.token * length + costs.pair * length**2 == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    student = model()
    before = Costs.of(student, CPU, torch.float32)
    student.requires_grad_(False)
    student.lm_head.weight.requires_grad_(True)
    after = Costs.of(student, CPU, torch.float32)
    blocks = sum(p.numel() for p in student.model.layers.parameters()) + student.model.norm.weight.numel()
    assert before.token - after.token == 2 * blocks and after.pair == before.pair


def test_mfu_is_what_was_done_over_what_could_be() -> None:
    costs = Costs(token=10.0, pair=0.5, peak=1000.0)
    assert costs.mfu(np.array([2, 4], np.int32), seconds=0.5, devices=2) == {"mfu": (60 + 0.5 * 20) / 1000}
    assert Costs(10.0, 0.5, None).mfu(np.array([2]), 1.0, 1) == {}
    assert Costs.of(model(), CPU, torch.bfloat16).peak is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("NVIDIA T4", None)],
)
def test_peaks_by_the_devices_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert Costs.of(model(), gpu, torch.bfloat16).peak == peak
    assert Costs.of(model(), gpu, torch.float32).peak is None


def test_laps_give_time_to_what_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    laps = Laps(CPU)
    for name in ("data", "forward", "backward", "forward"):
        laps.end(name)
    assert laps.take() == {}
    laps.end("checkpoint")
    first = laps.take()
    assert {name: value for name, value in first.items() if value} == {"data": 1, "forward": 2, "backward": 1}
    assert {name: value for name, value in laps.take().items() if value} == {"checkpoint": 1}
    assert time_shares(first)["time_share.forward"] == 0.5 and time_shares({}) == {}


def test_peak_memory_is_from_the_reset_on() -> None:
    speed.reset_peak_memory(CPU)
    before = speed.cost_of([], CPU)["peak_memory_gib"]
    held = torch.ones(2**26)  # a quarter of a GiB
    del held
    assert speed.cost_of([], CPU)["peak_memory_gib"] - before == pytest.approx(0.25, abs=0.05)
    speed.reset_peak_memory(CPU)
    assert speed.cost_of([], CPU)["peak_memory_gib"] - before == pytest.approx(0, abs=0.05)
    assert speed.cost_of([3.0, 1.0, 2.0], CPU)["step_seconds"] == 2.0
