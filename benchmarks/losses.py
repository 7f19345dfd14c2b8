"""The loss with its gradients: against Hugging Face TRL, against the sparse floor, and its peak memory.

    CDM_REAL_DATA=FOLDER python -m benchmarks.losses

FOLDER holds tokenizers/gpt2, tokenizers/qwen2.5 and instructions/. TRL comes from benchmarks/requirements.txt, in a
folder of its own. One thread; times are medians of CPU seconds, taken in turns.

- TRL: `ULDLoss` (GOLD's hybrid, merge strategy `bayesian`) takes all logits of both models, V 50,257 and 151,936, and
  aligns. Ours takes the student's logits and the teacher's cached top 64, aligns, maps both ways and compares. Both
  give the gradient of all student logits. No cross-entropy on either side.
- The floor: a KL over the teacher's top 64 without alignment and maps: gather, logsumexp, gradient.
- Memory: hidden states -> loss and gradients at V = 151,936, fused (`cdm.head`) and with all logits at once.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import synthetic
from benchmarks.memory import in_fresh_process, peak_rise
from benchmarks.table import finish, machine, show
from cdm.alignment import exact_bounds
from cdm.head import PIECE_CELLS, read_rows
from cdm.methods import METHODS
from cdm.pieces import divide
from cdm.records import AlignedBatch, TeacherRows
from cdm.step import Counts, Objective, piece_loss
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map

K = 64
PEERS = Path(__file__).parent / ".peers"
INSTALL = "python -m pip install --no-deps --target benchmarks/.peers -r benchmarks/requirements.txt"
TEXTS = "instructions/dolly_valid500.jsonl.gz"
ROWS_T = 151_936  # rows of Qwen2.5's embedding; its tokenizer has fewer ids
MEMORY_ROWS = tuple(n * (PIECE_CELLS // ROWS_T) for n in (1, 2, 4))  # whole pieces
HIDDEN = 64  # of the memory figures: what is counted is the logits

Seconds = dict[str, float]


def measure() -> dict[str, float]:
    """All figures. Raises ValueError where TRL or the real data is missing."""
    torch.set_num_threads(1)
    folder = Path(os.environ.get("CDM_REAL_DATA", ""))
    if not (folder / TEXTS).is_file():
        raise ValueError(f"CDM_REAL_DATA must name a folder with tokenizers/ and {TEXTS}")
    student, teacher = (load_tokenizer(str(folder / "tokenizers" / name)) for name in ("gpt2", "qwen2.5"))
    with gzip.open(folder / TEXTS, "rt", encoding="utf-8") as lines:
        text = "\n\n".join(json.loads(line)["response"].strip() for line in lines)
    vocab_map = build_vocab_map(student, teacher)
    figures: dict[str, float] = {}
    for length in (128, 256):
        seconds = times(Case(student, teacher, vocab_map, text, length, ROWS_T), repetitions=3)
        figures |= {f"{name}_ms_{length}": value * 1e3 for name, value in seconds.items()}
        figures[f"speedup_vs_trl_fwd_bwd_{length}"] = seconds["trl"] / seconds["cdm"]
        figures[f"over_sparse_floor_{length}"] = seconds["cdm"] / seconds["floor"]
    figures["speedup_vs_trl_fwd_bwd"] = min(figures[f"speedup_vs_trl_fwd_bwd_{length}"] for length in (128, 256))
    figures["over_sparse_floor"] = max(figures[f"over_sparse_floor_{length}"] for length in (128, 256))
    return figures | memory(MEMORY_ROWS, ROWS_T)


# --- time --------------------------------------------------------------------------------------------------------


class Case:
    """One response on both sides: random logits with the real next token on top, and what each loss takes of them."""

    def __init__(
        self, student: Tokenizer, teacher: Tokenizer, vocab_map: VocabMap, text: str, length: int, rows_t: int
    ) -> None:
        self.student, self.teacher, self.vocab_map = student, teacher, vocab_map
        _, ends = student.encode_with_ends(text)
        text = text.encode()[: ends[length - 1]].decode(errors="ignore")
        (ids_s, self.ends_s), (ids_t, self.ends_t) = (side.encode_with_ends(text) for side in (student, teacher))
        self.ids_s, self.ids_t = torch.from_numpy(ids_s).long(), torch.from_numpy(ids_t).long()
        self.logits_s, self.logits_t = _logits(self.ids_s, student.vocab_size, 0), _logits(self.ids_t, rows_t, 1)
        logp = self.logits_t.log_softmax(-1)
        self.top = logp.topk(K)
        self.logp_t = logp.gather(1, self.ids_t[:, None]).squeeze(1)
        self.logits_s.requires_grad_()

    def cdm(self) -> torch.Tensor:
        """Ours, from what a shard holds."""
        found = exact_bounds(self.ends_s, self.ends_t)
        groups_s, groups_t = (torch.from_numpy(x).long().unfold(0, 2, 1) for x in (found.bounds_s, found.bounds_t))
        teacher = TeacherRows(groups_s, groups_t, self.ids_t, self.logp_t, self.top.indices, self.top.values)
        return METHODS["cdm"](self.logits_s, teacher, self.vocab_map, top_k=K).total

    def floor(self) -> torch.Tensor:
        """A KL at the same number of ids in rows paired by position."""
        rows = min(len(self.ids_s), len(self.ids_t))
        ids = self.top.indices[:rows] % self.logits_s.shape[1]
        log_q = self.logits_s[:rows].gather(1, ids) - torch.logsumexp(self.logits_s[:rows], 1, keepdim=True)
        log_p = self.top.values[:rows]
        return (log_p.exp() * (log_p - log_q)).sum()

    def trl(self) -> Callable[[], torch.Tensor]:
        """TRL's loss of the same logits, a prompt of one token before them: its rows are those of the next token."""
        sides = [(self.ids_s, self.ends_s, self.logits_s), (self.ids_t, self.ends_t, self.logits_t)]
        ids = [torch.cat([side[:1], side])[None] for side, _, _ in sides]
        labels = [torch.cat([torch.full((1,), -100), side])[None] for side, _, _ in sides]
        offsets = [
            torch.tensor([[0, 0], *zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)])[None]
            for _, ends, _ in sides
        ]
        loss = _uld_loss()(_GOLD, self.student.hf, self.teacher.hf, torch.device("cpu"))
        logits_t = torch.cat([self.logits_t, self.logits_t[-1:]])[None]

        def call() -> torch.Tensor:
            logits_s = torch.cat([self.logits_s, self.logits_s[-1:]])[None]
            return loss(logits_s, logits_t, *labels, *ids, *offsets)

        return call


# What `ULDLoss` reads of GOLDConfig: the hybrid loss with the correct merging of probabilities.
_GOLD = SimpleNamespace(
    uld_crossentropy_weight=0.0,
    uld_distillation_weight=1.0,
    uld_student_temperature=1.0,
    uld_teacher_temperature=1.0,
    uld_skip_student_eos=False,
    uld_skip_teacher_eos=False,
    use_extended_uld=True,
    uld_token_merge_strategy="bayesian",
    uld_use_hybrid_loss=True,
    uld_hybrid_matched_weight=None,
    uld_hybrid_unmatched_weight=None,
    beta=0.5,
)


def _uld_loss() -> Any:
    if not (PEERS / "trl").is_dir():
        raise ValueError(f"{PEERS} does not hold TRL; install it there: {INSTALL}")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    from trl.experimental.gold.gold_trainer import ULDLoss

    return ULDLoss


def _logits(ids: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    logits = 2 * torch.randn(len(ids), rows, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(ids)), ids] = 12.0
    return logits


def times(case: Case, repetitions: int) -> Seconds:
    """Median CPU seconds of loss and gradient: `trl`, and `cdm` and `floor`, ten of each in every turn."""
    calls = {"trl": (case.trl(), 1), "cdm": (case.cdm, 10), "floor": (case.floor, 10)}
    case.cdm()  # compiles the join
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, (call, often) in calls.items():
            for _ in range(often):
                start = time.process_time()
                torch.autograd.grad(call(), case.logits_s)
                found[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in found.items()}


# --- memory ------------------------------------------------------------------------------------------------------


def memory(rows: tuple[int, ...], v: int) -> dict[str, float]:
    """Peak bytes a row above hidden states and weights, and how many bytes one more row takes at the peak."""
    figures: dict[str, float] = {}
    for kind in ("fused", "unfused"):
        peaks = [in_fresh_process(_peak, kind, n, v) for n in rows]
        figures |= {f"{kind}_peak_bytes_per_row_{n}": peak / n for n, peak in zip(rows, peaks, strict=True)}
        figures[f"{kind}_bytes_per_added_row"] = (peaks[-1] - peaks[0]) / (rows[-1] - rows[0])
    figures["peak_bytes_per_row"] = figures[f"fused_peak_bytes_per_row_{rows[-1]}"]
    return figures


def _peak(kind: str, rows: int, v: int) -> int:
    torch.set_num_threads(1)
    vocab_map = synthetic.vocabulary_map(v, v)
    objective = Objective(0.5, (lambda z, t, _: METHODS["cdm"](z, t, vocab_map, top_k=K),), (1.0,))
    head = torch.nn.Linear(HIDDEN, v, bias=False)
    _backward(kind, 8, head, objective)  # compiles the join
    hidden_and_batch = _inputs(rows, v)
    return peak_rise(lambda: _backward(kind, rows, head, objective, *hidden_and_batch))


def _inputs(rows: int, v: int) -> tuple[torch.Tensor, AlignedBatch]:
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(0))
    return hidden, synthetic.batch(1, rows + 1, v, v, K)


def _backward(
    kind: str,
    rows: int,
    head: torch.nn.Linear,
    objective: Objective,
    hidden: torch.Tensor | None = None,
    batch: AlignedBatch | None = None,
) -> None:
    if hidden is None or batch is None:
        hidden, batch = _inputs(rows, head.out_features)
    hidden = hidden.requires_grad_()
    counts = Counts(rows, (len(batch.teachers[0].groups_s),))
    pieces = divide(batch, PIECE_CELLS // head.out_features if kind == "fused" else rows)
    if kind == "fused":
        bounds = [0, *(piece.end for piece in pieces)]
        loss, _ = read_rows(hidden, head, None, bounds, lambda z, i: piece_loss(z, pieces[i], objective, counts))
    else:
        loss, _ = piece_loss(head(hidden), pieces[0], objective, counts)
    loss.backward()
    head.weight.grad = None


def main() -> None:
    figures = measure()
    title = f"The loss and its gradient; one thread, {machine()}"
    by_length = [
        ["TRL 1.16, GOLD hybrid, ms", *(f"{figures[f'trl_ms_{n}']:,.0f}" for n in (128, 256))],
        ["cdm from the cached top 64, ms", *(f"{figures[f'cdm_ms_{n}']:,.1f}" for n in (128, 256))],
        ["sparse floor, ms", *(f"{figures[f'floor_ms_{n}']:,.1f}" for n in (128, 256))],
        ["TRL over cdm", *(f"{figures[f'speedup_vs_trl_fwd_bwd_{n}']:,.0f}" for n in (128, 256))],
        ["cdm over the floor", *(f"{figures[f'over_sparse_floor_{n}']:.2f}" for n in (128, 256))],
    ]
    show(title, ["student tokens", "128", "256"], by_length)
    by_rows = [
        [kind, *(f"{figures[f'{kind}_peak_bytes_per_row_{n}'] * n / 2**20:,.0f}" for n in MEMORY_ROWS),
         f"{figures[f'{kind}_bytes_per_added_row']:,.0f}"]
        for kind in ("unfused", "fused")
    ]  # fmt: skip
    columns = ["peak MiB at rows", *map(str, MEMORY_ROWS), "bytes an added row"]
    show(f"Memory from hidden states to gradients, V = {ROWS_T:,}", columns, by_rows)
    finish(figures)


if __name__ == "__main__":
    main()
