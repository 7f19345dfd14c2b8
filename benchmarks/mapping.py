"""Alignment and both dynamic maps: ours against the published procedure, step by step, in one run.

CPU seconds of one thread. The texts are real, the rows of logits are not (benchmarks/rows.py). Both sides follow the
same rules (`protect` off) and their maps are compared. On the longer response the published top k and maps are measured
on every fourth group and multiplied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import published, rows, table
from cdm.alignment import align_dtw, dtw_bounds, entropy_weights, exact_bounds
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map

K, THRESHOLD, REPETITIONS = 100, 0.3, 31
PAIRS = (("llama2", "gpt2"), ("llama3", "qwen2.5"))  # teacher, student
LENGTHS = {512: 1, 2048: 4}  # student tokens: the published procedure maps every n-th group
STEPS = ("weights", "token texts", "dtw", "merged rows", "top k and decoding", "both maps")

Seconds = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One response of one pair, and what both ways of mapping start from: the groups' top ids [G, K] of either side."""

    side_s: rows.Side
    side_t: rows.Side
    vocab_map: VocabMap
    top_s: torch.Tensor
    top_t: torch.Tensor


def measure() -> dict[str, float]:
    """The figures of both pairs and lengths; each ratio is the worst of the four."""
    folder = table.real_data()
    texts = rows.corpus(folder / "instructions")
    found: list[dict[str, float]] = []
    for names in PAIRS:
        teacher, student = (load_tokenizer(str(folder / "tokenizers" / name)) for name in names)
        bare = build_vocab_map(student, teacher, THRESHOLD, protect=False)
        for tokens, every in LENGTHS.items():
            title = f"{names[0]} -> {names[1]}, {tokens} student tokens, K = {K}"
            found.append(compare(title, *rows.sides(student, teacher, texts, tokens), bare, k=K, every=every))
    figures = {name: min(each[name] for each in found) for name in found[0] if name.startswith("speedup")}
    figures["exact_align_us_per_token"] = max(each["exact_align_us_per_token"] for each in found)
    shortest = found[:: len(LENGTHS)]
    return figures | {f"{name}_512": max(each[name] for each in shortest) for name in ("dtw_ms", "map_ms")}


def compare(
    title: str, side_s: rows.Side, side_t: rows.Side, vocab_map: VocabMap, *, k: int, every: int
) -> dict[str, float]:
    """Both procedures on one response, as a table and as figures. Raises ValueError where their results differ."""
    theirs, case, maps = _published(side_s, side_t, vocab_map, k, every)
    ours, exact, from_rows = _ours(case, k)
    _check_same(case, maps, every)
    whole, ours_whole = sum(theirs.values()), sum(ours.values())
    figures = {
        "speedup_vs_published": whole / (exact + ours["both maps"]),
        "speedup_with_dtw": whole / ours_whole,
        "speedup_same_steps": (theirs["dtw"] + theirs["both maps"]) / (ours_whole - ours["weights"]),
        "speedup_from_full_rows": whole / (ours_whole + from_rows),
        "exact_align_us_per_token": 1e6 * exact / len(side_s.ids),
        "dtw_ms": 1e3 * (ours["token texts"] + ours["dtw"]),
        "map_ms": 1e3 * ours["both maps"],
    }
    lines = [(step, *(f"{1e3 * each[step]:.3f}" if step in each else "-" for each in (theirs, ours))) for step in STEPS]
    lines.append(("total", f"{1e3 * whole:.1f}", f"{1e3 * ours_whole:.3f}"))
    lines.append(("exact groups instead of weights, texts and dtw", "-", f"{1e3 * exact:.3f}"))
    lines.append(("entropies and top k from full rows, where nothing is stored", "above", f"{1e3 * from_rows:.1f}"))
    table.show(title, ("CPU milliseconds", "published", "ours"), lines)
    print(_shares(case))
    print(", ".join(f"{name} {value:,.0f}" for name, value in figures.items() if "speedup" in name), "\n")
    return figures


def _published(
    side_s: rows.Side, side_t: rows.Side, vocab_map: VocabMap, k: int, every: int
) -> tuple[Seconds, Case, tuple[torch.Tensor, torch.Tensor]]:
    sides, seconds = (side_s, side_t), dict[str, float]()
    weights, seconds["weights"] = _timed(lambda: [published.weights(side.logits) for side in sides])
    texts = [side.tokenizer.texts(side.ids) for side in sides]
    groups, seconds["dtw"] = _timed(lambda: published.dtw(texts[0], texts[1], weights[0], weights[1]))
    if groups != align_dtw(texts[0], texts[1], weights[0], weights[1]):
        raise ValueError("the published DTW and ours found different groups")
    logits, ranges = [side.logits for side in sides], list(zip(*groups, strict=True))
    merged, seconds["merged rows"] = _timed(lambda: [published.merge(*one) for one in zip(logits, ranges, strict=True)])
    tops, once = _timed(
        lambda: [published.top_strings(s.tokenizer, m[::every], k) for s, m in zip(sides, merged, strict=True)]
    )
    seconds["top k and decoding"] = once * every
    exact, inverse = (torch.from_numpy(x.astype(np.int64)) for x in (vocab_map.exact, vocab_map.inverse))
    images_s, images_t = set(exact.tolist()), set(inverse.tolist())
    (ids_s, strings_s), (ids_t, strings_t) = tops
    maps, once = _timed(
        lambda: (
            published.dynamic_map(ids_t, strings_t, ids_s, strings_s, exact, images_s, THRESHOLD),
            published.dynamic_map(ids_s, strings_s, ids_t, strings_t, inverse, images_t, THRESHOLD),
        )
    )
    seconds["both maps"] = once * every
    top_s, top_t = (m.topk(k).indices for m in merged)
    return seconds, Case(side_s, side_t, vocab_map, top_s, top_t), maps


def _ours(case: Case, k: int) -> tuple[Seconds, float, float]:
    """Seconds by step; of exact groups; of entropies and top k, which the teacher's shards store, from full rows."""
    sides = (case.side_s, case.side_t)
    (entropies, _), from_rows = _timed(
        lambda: ([_entropy(s.logits) for s in sides], [s.logits.topk(k).indices for s in sides])
    )
    weights = [entropy_weights(entropy) for entropy in entropies]
    texts = [side.tokenizer.texts(side.ids) for side in sides]

    def median(call: Callable[[], object]) -> float:
        return table.cpu_seconds(call, REPETITIONS)

    seconds = {
        "weights": median(lambda: [entropy_weights(entropy) for entropy in entropies]),
        "token texts": median(lambda: [side.tokenizer.texts(side.ids) for side in sides]),
        "dtw": median(lambda: dtw_bounds(*texts, *weights)),
        "both maps": median(lambda: case.vocab_map.both(case.top_t, case.top_s)),
    }
    return seconds, median(lambda: exact_bounds(case.side_s.ends, case.side_t.ends)), from_rows


def _entropy(logits: torch.Tensor) -> np.ndarray:
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1).numpy()


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def _check_same(case: Case, maps: tuple[torch.Tensor, torch.Tensor], every: int) -> None:
    t_to_s, s_to_t = maps
    top_s, top_t = case.top_s[::every], case.top_t[::every]
    live = (s_to_t[:, :, None] == top_t[:, None, :]).any(-1)
    ours = case.vocab_map.both(top_t, top_s)
    for wanted, got in zip((t_to_s, torch.where(live, s_to_t, -1)), ours, strict=True):
        same = (wanted == got).double().mean().item()
        if same < 0.999:  # decoded strings of broken characters all read alike; token bytes do not
            raise ValueError(f"the published maps and ours agree on {same:.4f} of the ids only")


def _shares(case: Case) -> str:
    """What the rows look like, so that a reader can judge them."""
    t_to_s, _ = case.vocab_map.both(case.top_t, case.top_s)
    exact_t = case.vocab_map.images(case.top_t) >= 0
    exact_s = case.vocab_map.reverse.images(case.top_s) >= 0
    inside = (t_to_s[:, :, None] == case.top_s[:, None, :]).any(-1)
    shares = {
        "have an exact twin (teacher)": exact_t,
        "(student)": exact_s,
        "of the teacher's map by spelling": (t_to_s >= 0) & ~exact_t,
        "of the teacher's land in the student's": inside,
    }
    found = ", ".join(f"{share.double().mean():.0%} {name}" for name, share in shares.items())
    return f"Of the top {case.top_t.shape[1]} of {len(case.top_t)} groups: {found}."
