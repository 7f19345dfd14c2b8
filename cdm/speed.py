"""How fast a step is: where its time goes, its operations of what the device could do, its memory (layer 1)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAPS = ("data", "forward", "backward", "optimizer", "validation", "checkpoint", "other")

# Dense bfloat16 operations a second by what a device's name contains, the first that fits: the makers' data sheets.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


class Laps:
    """Seconds by what they were spent on: `end(name)` gives the time since the last `end` to `name`, one of LAPS.

    On a GPU the marks are events in the stream: nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._past: list[tuple[str, Any]] = []
        self._marks = [("", self._now())]

    def end(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds by name between the last two calls of `take`; empty for the first call.

        One call late, because by then the host has waited for those marks for other reasons.
        """
        seconds = dict.fromkeys(LAPS, 0.0) if self._past else {}
        for (_, start), (name, end) in pairwise(self._past):
            seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._past, self._marks = self._marks, self._marks[-1:]
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """`time_share.<name>` of what `Laps.take` gave; nothing of nothing."""
    total = sum(seconds.values())
    return {f"time_share.{name}": value / total for name, value in seconds.items()} if total else {}


@dataclass(frozen=True)
class Costs:
    """Operations that training a causal LM takes: a token, and a pair of tokens of one document (attention).

    6 N a token, 12 layers x width a pair. N leaves out an input embedding that is not the head too; a frozen weight has
    no gradient of its own, which saves 2 of the 6. Source: PaLM, arXiv 2204.02311, appendix B. peak: what one device
    could do in a second, where that is known.
    """

    token: float
    pair: float
    peak: float | None

    @classmethod
    def of(cls, model: Any, device: torch.device, precision: torch.dtype) -> Costs:
        embedding = model.get_input_embeddings().weight
        looked_up = None if embedding is model.get_output_embeddings().weight else embedding
        used = [p for p in model.parameters() if p is not looked_up]
        weights, trained = sum(p.numel() for p in used), sum(p.numel() for p in used if p.requires_grad)
        config = model.config.get_text_config()
        pair = 12.0 * config.num_hidden_layers * config.hidden_size
        return cls(4.0 * weights + 2.0 * trained, pair, _peak(device, precision))

    def mfu(self, lengths: np.ndarray, seconds: float, devices: int) -> dict[str, float]:
        """`mfu` of a step over documents of these lengths; nothing where the device is not in PEAKS."""
        if self.peak is None:
            return {}
        wide = lengths.astype(np.float64)
        operations = self.token * wide.sum() + self.pair * (wide**2).sum()
        return {"mfu": float(operations) / (seconds * devices * self.peak)}


def _peak(device: torch.device, precision: torch.dtype) -> float | None:
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


# --- memory ------------------------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """What `cost_of` says of memory is from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now


def cost_of(step_seconds: Sequence[float], device: torch.device) -> dict[str, float]:
    """What a run took of this process: the median `step_seconds`, and the most memory since `reset_peak_memory`.

    `peak_memory_gib`: of the device; on a CPU what was resident, the libraries included. No steps, no median: a run
    that ended before it was started again.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    median = {"step_seconds": statistics.median(step_seconds)} if step_seconds else {}
    return median | {"peak_memory_gib": peak / 2**30}
