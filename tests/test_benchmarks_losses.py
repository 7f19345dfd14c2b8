"""The benchmarks of the loss run, at a tiny size; what they measure is not judged here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import losses, student_step, synthetic
from benchmarks.memory import in_fresh_process, peak_rise
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import build_vocab_map
from tests import tiny


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> losses.Case:
    student, teacher = (tokenizer(tmp_path_factory.mktemp(str(size)), size) for size in (400, 480))
    return losses.Case(student, teacher, build_vocab_map(student, teacher), "".join(tiny.texts()), 40, 512)


def tokenizer(folder: Path, size: int) -> Tokenizer:
    tiny.byte_level_tokenizer(size).save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_both_losses_have_a_gradient(case: losses.Case) -> None:
    for call in (case.cdm, case.floor):
        (grad,) = torch.autograd.grad(call(), case.logits_s)
        assert grad.isfinite().all() and grad.abs().sum() > 0


def test_without_trl_the_error_says_what_to_run(
    case: losses.Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(losses, "PEERS", tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps --target"):
        case.trl()
    monkeypatch.setenv("CDM_REAL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="CDM_REAL_DATA must name"):
        losses.measure()


SIZE = 64 << 20


def rise() -> int:
    return peak_rise(lambda: np.ones(SIZE, np.uint8))


def test_memory_is_measured() -> None:
    assert 0.9 * SIZE <= in_fresh_process(rise) < 1.5 * SIZE
    for kind in ("fused", "unfused"):
        assert losses._peak(kind, 8, 200) >= 0


def test_a_synthetic_map_is_a_map() -> None:
    vocab_map = synthetic.vocabulary_map(300, 400)
    known = np.flatnonzero(vocab_map.exact >= 0)
    assert len(known) == 240 and (vocab_map.inverse[vocab_map.exact[known]] == known).all()
    graph = vocab_map.graph
    assert len(graph.starts) == 401 and (np.diff(graph.starts)[known] == 0).all()
    for a in (0, 1, 2, 3, 399):
        ids = graph.ids[graph.starts[a] : graph.starts[a + 1]]
        assert (np.diff(ids) > 0).all() and (vocab_map.inverse[ids] == -1).all()


def test_every_kind_of_step_runs() -> None:
    shape = replace(student_step.CPU, vocabulary=400, vocabulary_t=300, hidden=16, intermediate=16, layers=1, heads=2,
                    kv_heads=1, sequences=2, length=16, k=8, repetitions=1)  # fmt: skip
    seconds = in_fresh_process(partial(student_step.step_seconds, shape))  # vLLM leaves a process group in this one
    assert seconds.keys() == set(student_step.KINDS) and min(seconds.values()) > 0
