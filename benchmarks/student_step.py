"""A step with the CDM loss over the same step with cross-entropy alone: time and peak memory.

    python -m benchmarks.student_step

On a GPU: Qwen2-0.5B's shape (V = 151,936), 8 x 1,024 tokens, bfloat16, K = 100. On a CPU: a small shape in float32. The
weights, the tokens, the teacher's rows and the vocabulary map are random. Needs torch, numpy, numba, rapidfuzz and
transformers. `plain` is what a trainer without this project does: the model's own loss over all logits.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import synthetic
from benchmarks.memory import in_fresh_process, peak_rise
from benchmarks.table import finish, machine, show
from cdm.methods import METHODS
from cdm.records import AlignedBatch
from cdm.step import Counts, Objective, StudentModel, shard, step, to_device

KINDS = ("plain", "sft", "cdm")


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    vocabulary_t: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    sequences: int
    length: int
    k: int
    precision: torch.dtype
    repetitions: int


GPU = Shape(151_936, 128_256, 896, 4864, 24, 14, 2, 8, 1024, 100, torch.bfloat16, 10)
CPU = Shape(32_000, 50_000, 384, 1536, 8, 6, 2, 4, 128, 100, torch.float32, 5)


def measure(shape: Shape | None = None) -> dict[str, float]:
    """Ratios of one optimiser step: time and peak memory."""
    shape = shape or (GPU if torch.cuda.is_available() else CPU)
    seconds = in_fresh_process(step_seconds, shape)
    peaks = {kind: in_fresh_process(_peak, shape, kind) for kind in KINDS}
    figures = {f"{kind}_step_s": seconds[kind] for kind in KINDS}
    figures |= {f"{kind}_peak_mb": peaks[kind] / 2**20 for kind in KINDS}
    figures["cdm_over_sft_time"] = seconds["cdm"] / seconds["sft"]
    figures["cdm_over_sft_memory"] = peaks["cdm"] / peaks["sft"]
    figures["cdm_over_plain_time"] = seconds["cdm"] / seconds["plain"]
    figures["cdm_over_plain_memory"] = peaks["cdm"] / peaks["plain"]
    return figures


def steps(shape: Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One model and its steps, each of them forward, backward and update."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = shard(StudentModel(Qwen2ForCausalLM(config).to(device).train()), shape.precision, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = to_device(
        synthetic.batch(shape.sequences, shape.length, shape.vocabulary, shape.vocabulary_t, shape.k), device
    )
    vocab_map = synthetic.vocabulary_map(shape.vocabulary, shape.vocabulary_t)
    counts = Counts(len(batch.rows_s), (len(batch.teachers[0].groups_s),))
    objectives = {
        "sft": Objective(1.0, (), ()),
        "cdm": Objective(0.5, (lambda z, t, _: METHODS["cdm"](z, t, vocab_map, top_k=shape.k),), (1.0,)),
    }
    fused = {
        kind: lambda objective=objective: step(model, optimizer, [batch], objective, counts, max_grad_norm=1.0)
        for kind, objective in objectives.items()
    }
    return {"plain": lambda: _plain(model, optimizer, batch), **fused}


def _plain(model: StudentModel, optimizer: torch.optim.Optimizer, batch: AlignedBatch) -> None:
    """The step with the model's own loss, called through our module because the hooks of sharding are on it."""
    labels = batch.input_ids
    own: Any = model  # its forward is another's for a moment
    hidden_forward = own.forward
    own.forward = lambda: own.model(input_ids=labels, attention_mask=batch.attention_mask, labels=labels).loss
    try:
        own().backward()
    finally:
        own.forward = hidden_forward
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _device() -> torch.device:
    """The device, in a process group of one."""
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = Path(tempfile.mkdtemp()) / "store"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    return device


def step_seconds(shape: Shape) -> dict[str, float]:
    """Median seconds of each step, one after the other in turns: CPU time on a CPU, elapsed on a GPU."""
    device = _device()
    calls = steps(shape, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repetition in range(shape.repetitions + 1):
        for kind, call in calls.items():
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition:  # the first compiles and allocates
                times[kind].append(clock() - start)
    dist.destroy_process_group()
    return {kind: statistics.median(values) for kind, values in times.items()}


def _peak(shape: Shape, kind: str) -> int:
    """Peak bytes of two steps, the model, its gradients and the optimiser's state included."""
    device = _device()

    def twice() -> None:
        call = steps(shape, device)[kind]
        call()
        call()

    if device.type == "cuda":
        twice()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_rise(twice)
    dist.destroy_process_group()
    return peak


def main() -> None:
    gpu = torch.cuda.is_available()
    shape = GPU if gpu else CPU
    figures = measure(shape)
    where = torch.cuda.get_device_name() if gpu else f"one thread, {machine()}"
    rows = [[kind, f"{figures[f'{kind}_step_s'] * 1e3:,.0f}", f"{figures[f'{kind}_peak_mb']:,.0f}"] for kind in KINDS]
    title = f"A step of {shape.sequences} x {shape.length} tokens, V = {shape.vocabulary:,}, K = {shape.k}; {where}"
    show(title, ["step", "ms", "peak MiB"], rows)
    finish(figures)


if __name__ == "__main__":
    main()
