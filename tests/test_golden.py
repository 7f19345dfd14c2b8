"""The golden cases of docs/method.md: real tokenizer pairs, from a slow independent implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdm.alignment import align_dtw, align_exact, entropy_weights
from cdm.losses import cdm_divergence
from cdm.tokenizers import Tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map, dynamic_on_device
from tests.slow_twins import real_tokenizer

PAIRS = [("phi-3", "qwen2.5"), ("qwen2.5", "opt"), ("llama3", "gemma")]


@pytest.fixture(scope="module")
def cases(real_data: Path) -> list[dict[str, Any]]:
    path = real_data.parent / "golden" / "cases.json"
    if not path.exists():
        pytest.skip("no golden cases beside CDM_REAL_DATA")
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=PAIRS, ids="->".join)
def pair(request: pytest.FixtureRequest, real_data: Path) -> tuple[Tokenizer, Tokenizer]:
    teacher, student = request.param
    return real_tokenizer(real_data / "tokenizers" / student), real_tokenizer(real_data / "tokenizers" / teacher)


@pytest.fixture(scope="module")
def vocab_map(pair: tuple[Tokenizer, Tokenizer]) -> VocabMap:
    return build_vocab_map(*pair, threshold=0.3)


def of_pair(cases: list[dict[str, Any]], kind: str, pair: tuple[Tokenizer, Tokenizer]) -> list[dict[str, Any]]:
    names = [Path(side.name).name for side in pair]
    found = [case for case in cases if case["kind"] == kind and [case["student"], case["teacher"]] == names]
    assert found
    return found


def as_tuples(groups: list[list[list[int]]]) -> list[tuple[tuple[int, int], ...]]:
    return [tuple((start, end) for start, end in group) for group in groups]


def test_ids_and_ends(cases: list[dict[str, Any]], pair: tuple[Tokenizer, Tokenizer]) -> None:
    for case in of_pair(cases, "align", pair):
        for side, tokenizer in zip("st", pair, strict=True):
            ids, ends = tokenizer.encode_with_ends(case["text"])
            assert ids.tolist() == case[f"ids_{side}"]
            assert ends.tolist() == case[f"ends_{side}"]


def test_alignments(cases: list[dict[str, Any]], pair: tuple[Tokenizer, Tokenizer]) -> None:
    for case in of_pair(cases, "align", pair):
        assert align_exact(case["ends_s"], case["ends_t"]) == as_tuples(case["exact_groups"])
        weights = [entropy_weights(case[f"entropy_{side}"]) for side in "st"]
        for side, got in zip("st", weights, strict=True):
            np.testing.assert_allclose(got, case[f"weights_{side}"], atol=5.1e-7)
        texts = [tokenizer.texts(case[f"ids_{side}"]) for side, tokenizer in zip("st", pair, strict=True)]
        assert align_dtw(*texts, *weights) == as_tuples(case["dtw_groups"])


def test_ends_of_turn(cases: list[dict[str, Any]]) -> None:
    found = [case for case in cases if case["kind"] == "ends"]
    assert len(found) == 6
    for case in found:
        assert align_exact(case["ends_s"], case["ends_t"]) == as_tuples(case["exact_groups"])


def test_exact_map(cases: list[dict[str, Any]], pair: tuple[Tokenizer, Tokenizer], vocab_map: VocabMap) -> None:
    (case,) = of_pair(cases, "exact_map", pair)
    spelled = [piece is not None for piece in pair[1].all_token_bytes()]
    assert len(vocab_map.exact) == case["teacher_size"]
    assert int((vocab_map.exact[spelled] >= 0).sum()) == case["matched"]
    for token_id, image in case["sample"].items():
        assert vocab_map.exact[int(token_id)] == image


def test_dynamic_maps(cases: list[dict[str, Any]], pair: tuple[Tokenizer, Tokenizer], vocab_map: VocabMap) -> None:
    maps = [row for case in of_pair(cases, "align", pair) for row in case["maps"]]
    top_t, top_s = (np.array([row[key] for row in maps]) for key in ("top_t", "top_s"))
    for one_way, a, b, key in ((vocab_map, top_t, top_s, "t_to_s"), (vocab_map.reverse, top_s, top_t, "s_to_t")):
        wanted = np.array([row[key] for row in maps])
        np.testing.assert_array_equal(one_way.dynamic(a, b), wanted)
        on_device = dynamic_on_device(one_way, torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_array_equal(on_device.numpy(), wanted)


def test_divergences(cases: list[dict[str, Any]]) -> None:
    found = [case for case in cases if case["kind"] == "kd"]
    assert len(found) == 20
    for case in found:
        ids_t = [int(a) for a in case["logp_t"]]
        there, back = dict(case["map_ts"]), case["map_st"]
        got = cdm_divergence(
            torch.tensor([case["logits_s"]], dtype=torch.float64),
            torch.tensor([list(case["logp_t"].values())], dtype=torch.float64),
            torch.tensor([ids_t]),
            torch.tensor([[there[a] for a in ids_t]]),
            torch.tensor([[b for b, _ in back]]),
            torch.tensor([[a for _, a in back]]),
            case["temperature"],
            "renormalise",
        )
        assert got.item() == pytest.approx(case["kd"], abs=6e-9)
