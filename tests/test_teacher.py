from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from cdm.engines import TransformersEngine
from cdm.logit_rows import BLOCK_ROWS, LOWEST_LOGP, RowBlocks, row_statistics
from cdm.records import Document, Message, ScoredDocument
from cdm.teacher import LEAST_KEPT, CannotScore, TeacherScorer, render
from cdm.tokenizers import load_tokenizer
from tests import tiny

TOP_K = 12
MAX_LENGTH = 128
TRANSFORMERS = {"type": "transformers", "dtype": "float32", "batch_tokens": 512}
# Small steps: long prompts come in chunks, and requests of different progress share a step.
VLLM = {
    "type": "vllm",
    "dtype": "float32",
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.5,
    "kv_cache_gib": 0.05,
    "max_num_batched_tokens": 48,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def scorer(model: str) -> TeacherScorer:
    return TeacherScorer(model, engine=TRANSFORMERS, top_k=TOP_K, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")  # the last test that takes it breaks it
def vllm_scorer(model: str) -> Iterator[TeacherScorer]:
    before = dict(os.environ)
    scorer = TeacherScorer(model, engine=VLLM, top_k=TOP_K, max_length=MAX_LENGTH)
    yield scorer
    scorer.engine.llm.llm_engine.engine_core.shutdown()  # and its process group with it
    os.environ.clear()
    os.environ.update(before)


@torch.no_grad()
def slow_rows(model: Any, prompt_ids: list[int], ids: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """One sequence, the whole log_softmax in float64."""
    sequence = torch.tensor([[*prompt_ids, *ids.tolist()]])
    logp = model(sequence).logits[0].double().log_softmax(-1)[len(prompt_ids) - 1 : -1]
    top = logp.topk(top_k)
    return {
        "logp_t": logp[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)].numpy(),
        "entropy_t": -(logp.exp() * logp).sum(-1).numpy(),
        "tail_t": 1 - top.values.exp().sum(-1).numpy(),
        "topk_logp_t": top.values.numpy(),
        "topk_ids_t": top.indices.numpy(),
    }


def assert_same_rows(scored: ScoredDocument, expected: dict[str, np.ndarray]) -> None:
    for name in ("logp_t", "entropy_t", "tail_t"):
        assert getattr(scored, name).dtype == np.float32
        np.testing.assert_allclose(getattr(scored, name), expected[name], atol=1e-3)
    np.testing.assert_allclose(scored.topk_logp_t, expected["topk_logp_t"], atol=1e-3, rtol=1e-3)
    np.testing.assert_array_equal(scored.topk_ids_t[:, 0], expected["topk_ids_t"][:, 0])
    assert (scored.topk_ids_t == expected["topk_ids_t"]).mean() > 0.99  # ties may swap


def assert_equals_twin(scorer: TeacherScorer, model: str, documents: list[Document]) -> list[ScoredDocument]:
    scored, quarantined = scorer(documents)
    assert not quarantined
    assert [s.id for s in scored] == [d.id for d in documents]
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for one, document in zip(scored, documents, strict=True):
        prompt_ids = scorer.tokenizer.encode_prompt(document.prompt)
        assert_same_rows(one, slow_rows(full, prompt_ids, one.ids_t, TOP_K))
    return scored


def test_transformers_engine_equals_the_slow_twin(scorer: TeacherScorer, model: str) -> None:
    scored = assert_equals_twin(scorer, model, tiny.documents(30))
    assert any(one.truncated for one in scored) and not all(one.truncated for one in scored)
    assert len({one.entropy_t.round(1).tobytes() for one in scored}) > 20  # rows that are all alike would prove nothing


@pytest.mark.slow
def test_vllm_engine_equals_the_slow_twin_in_chunks(vllm_scorer: TeacherScorer, model: str) -> None:
    assert_equals_twin(vllm_scorer, model, tiny.documents(30))


@pytest.mark.slow
def test_vllm_engine_gives_the_same_bits_again(vllm_scorer: TeacherScorer) -> None:
    first, _ = vllm_scorer(tiny.documents(9))
    again, _ = vllm_scorer(tiny.documents(9))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.topk_logp_t, two.topk_logp_t)
        np.testing.assert_array_equal(one.entropy_t, two.entropy_t)


def test_a_document_has_a_row_for_each_token_and_the_end_of_turn(scorer: TeacherScorer) -> None:
    empty, wide = scorer(tiny.documents(2))[0]
    end_of_turn = scorer.tokenizer.end_of_turn_id
    assert empty.ids_t.tolist() == [end_of_turn] and empty.ends_t.tolist() == [0] and not empty.truncated
    assert wide.ids_t[-1] == end_of_turn
    assert wide.ends_t[-1] == wide.ends_t[-2] == len(tiny.documents(2)[1].response.encode())
    assert wide.topk_ids_t.shape == (len(wide.ids_t), TOP_K) and wide.topk_ids_t.dtype == np.int32


def test_top_mass_keeps_the_shortest_prefix_that_holds_it(model: str, scorer: TeacherScorer) -> None:
    short = TeacherScorer(model, engine=TRANSFORMERS, top_k=TOP_K, top_mass=0.6, max_length=MAX_LENGTH)
    kept = []
    for one, whole in zip(short(tiny.documents(12))[0], scorer(tiny.documents(12))[0], strict=True):
        for row in range(len(one.ids_t)):
            p = np.exp(whole.topk_logp_t[row].astype(np.float64))
            n = next((n for n in range(LEAST_KEPT, TOP_K) if p[:n].sum() >= 0.6), TOP_K)
            kept.append(n)
            np.testing.assert_array_equal(one.topk_ids_t[row], [*whole.topk_ids_t[row, :n], *[-1] * (TOP_K - n)])
            np.testing.assert_array_equal(one.topk_logp_t[row, :n], whole.topk_logp_t[row, :n])
            assert np.isneginf(one.topk_logp_t[row, n:]).all()
            assert one.tail_t[row] == pytest.approx(whole.tail_t[row] + p[n:].sum(), abs=1e-6)
        np.testing.assert_array_equal(one.logp_t, whole.logp_t)
    assert LEAST_KEPT in kept and TOP_K in kept and len(set(kept)) > 2


def test_stored_rows_are_best_first_finite_and_leave_the_tail(scorer: TeacherScorer) -> None:
    for one in scorer(tiny.documents(12))[0]:
        assert one.topk_logp_t.dtype == np.float16
        assert (np.diff(one.topk_logp_t.astype(np.float32), axis=1) <= 0).all()
        mass = np.exp(one.topk_logp_t.astype(np.float64)).sum(1) + one.tail_t
        np.testing.assert_allclose(mass, 1, atol=5e-3)
        assert (one.tail_t >= 0).all() and (one.entropy_t >= 0).all()


def test_masked_logits_are_clipped_to_the_lowest_float16() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]])
    rows = row_statistics(logits, torch.tensor([2]), 3)
    assert rows.logp[0] == rows.topk_logp[0, 2] == LOWEST_LOGP
    assert np.isfinite(rows.topk_logp.astype(np.float16)).all()
    p = np.exp(rows.topk_logp[0, :2].astype(np.float64))
    np.testing.assert_allclose(rows.entropy[0], -(p * np.log(p)).sum(), rtol=1e-5)
    assert rows.tail[0] == pytest.approx(0, abs=1e-6)


def test_the_head_keeps_the_models_soft_capping(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=64, **shape, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    options = {"dtype": "float32", "batch_tokens": 64}
    engine = TransformersEngine(str(tmp_path), revision=None, top_k=4, max_length=32, **options)
    sequence = list(range(3, 20))
    rows = engine.token_rows([sequence], [5])[0]
    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    expected = slow_rows(full, sequence[:5], np.array(sequence[5:]), 4)
    np.testing.assert_allclose(rows.entropy, expected["entropy_t"], atol=1e-3)
    np.testing.assert_allclose(rows.topk_logp, expected["topk_logp_t"], atol=1e-3)


# --- memory -------------------------------------------------------------------------------------------------------


class Memory:
    """A head or a decoder that runs out of memory on more than `most` items, as an accelerator or a CPU says it."""

    def __init__(self, work: Any, most: int, size: Any, error: Exception) -> None:
        self.work, self.most, self.size, self.error = work, most, size, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.size(*args, **kwargs) > self.most:
            raise self.error
        return self.work(*args, **kwargs)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["accelerator", "cpu"])
def test_a_block_of_rows_that_does_not_fit_is_halved_and_changes_nothing(error: Exception) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(600, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (600,), generator=generator)
    expected = row_statistics(hidden @ weight.T, targets, 5)
    blocks = RowBlocks(vocab_size=50)
    head = Memory(lambda h: h @ weight.T, most=40, size=len, error=error)
    rows = blocks(head, hidden, targets, 5)
    assert blocks.backoffs == 3 and blocks.rows == BLOCK_ROWS // 8
    for name in ("logp", "entropy", "tail", "topk_ids", "topk_logp"):
        np.testing.assert_allclose(getattr(rows, name), getattr(expected, name), atol=1e-5)
    head.most = 0
    with pytest.raises(type(error), match="memory"):
        blocks(head, hidden, targets, 5)
    with pytest.raises(type(error), match="memory"):  # ranks would wait for each other's blocks
        RowBlocks(vocab_size=50, ranks=2)(Memory(len, 0, len, error), hidden, targets, 5)
    with pytest.raises(RuntimeError, match="shapes"):  # no other error is taken for one of memory
        blocks(Memory(len, 0, len, RuntimeError("shapes")), hidden, targets, 5)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["accelerator", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_down_to_one_document(model: str, error: Exception) -> None:
    scorer = TeacherScorer(model, engine=TRANSFORMERS, top_k=TOP_K, max_length=MAX_LENGTH)
    engine = scorer.engine
    assert isinstance(engine, TransformersEngine)
    undisturbed, _ = scorer(tiny.documents(20))
    assert engine.memory_backoffs == 0
    engine._decode = Memory(engine._decode, 100, lambda input_ids, use_cache: input_ids.numel(), error)
    scored, quarantined = scorer(tiny.documents(20))
    assert engine.memory_backoffs > 0 and 0 < len(quarantined) < 20
    assert all(re.fullmatch(r"its \d+ tokens do not fit in memory, even alone", reason) for _, reason in quarantined)
    by_id = {one.id: one for one in undisturbed}
    assert {one.id for one in scored} | {name for name, _ in quarantined} == set(by_id)
    for one in scored:
        np.testing.assert_array_equal(one.topk_ids_t, by_id[one.id].topk_ids_t)
        np.testing.assert_allclose(one.entropy_t, by_id[one.id].entropy_t, atol=1e-4)


@pytest.mark.slow
def test_vllm_halves_our_block_and_names_the_keys_where_its_own_memory_ends(
    vllm_scorer: TeacherScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = vllm_scorer(tiny.documents(9))
    engine: Any = vllm_scorer.engine
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    whole = runner.model.compute_logits
    monkeypatch.setattr(runner.model, "compute_logits", Memory(whole, 40, len, OUT_OF_MEMORY[0]))
    halved, _ = vllm_scorer(tiny.documents(9))
    assert engine.memory_backoffs > 0
    for one, two in zip(halved, undisturbed, strict=True):
        np.testing.assert_array_equal(one.topk_ids_t, two.topk_ids_t)
        np.testing.assert_allclose(one.entropy_t, two.entropy_t, atol=1e-4)
    monkeypatch.setattr(runner.model, "compute_logits", Memory(whole, 0, len, OUT_OF_MEMORY[0]))
    with pytest.raises(ValueError, match=r"lower teacher\.engine\.max_num_batched_tokens"):
        vllm_scorer(tiny.documents(9))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="failed in an earlier call"):  # its old requests would get new rows
        vllm_scorer(tiny.documents(9))


# --- rendering ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(response=st.text(st.sampled_from("aé日🙂\n def_0"), max_size=60), max_length=st.integers(20, 90))
def test_a_cut_response_is_the_start_of_the_text_and_fits(model: str, response: str, max_length: int) -> None:
    tokenizer = load_tokenizer(model) if model not in _TOKENIZERS else _TOKENIZERS[model]
    _TOKENIZERS[model] = tokenizer
    document = Document("x", (Message("user", "Go."),), response)
    whole, ends = tokenizer.encode_with_ends(response)
    try:
        rendered = render(tokenizer, document, max_length)
    except CannotScore as error:
        assert "tokens" in str(error)
        assert len(tokenizer.encode_prompt(document.prompt)) + len(whole) + 1 > max_length
        return
    assert len(rendered.prompt_ids) + len(rendered.ids) <= max_length
    assert rendered.truncated == (len(rendered.prompt_ids) + len(whole) + 1 > max_length)
    text = response.encode()[: rendered.ends[-1]].decode()  # raises in the middle of a character
    ids, ends = tokenizer.encode_with_ends(text)
    if not rendered.truncated:
        ids, ends = np.append(ids, tokenizer.end_of_turn_id), np.append(ends, len(response.encode()))
    assert rendered.ids.tolist() == ids.tolist() and rendered.ends.tolist() == ends.tolist()


_TOKENIZERS: dict[str, Any] = {}


def test_what_cannot_be_scored_is_quarantined_with_its_reason(scorer: TeacherScorer) -> None:
    good = tiny.documents(3)[1]
    long_prompt = Document("long", (Message("user", "word " * 200),), "x")
    no_prompt = Document("none", (), "x")
    surrogate = Document("bad", good.prompt, "a\ud800b")
    scored, quarantined = scorer([long_prompt, good, no_prompt, surrogate])
    assert [one.id for one in scored] == [good.id]
    reasons = dict(quarantined)
    assert set(reasons) == {"long", "none", "bad"}
    assert f"teacher.max_length is {MAX_LENGTH}" in reasons["long"]
    assert "at least one message" in reasons["none"] and "Unicode" in reasons["bad"]


def test_a_teacher_with_broken_weights_scores_nothing(model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken = TeacherScorer(str(tmp_path), engine=TRANSFORMERS, top_k=TOP_K, max_length=MAX_LENGTH)
    scored, quarantined = broken(tiny.documents(3))
    assert not scored
    assert {reason for _, reason in quarantined} == {"the teacher's logits are not finite"}


def test_limits_are_refused_by_name(model: str) -> None:
    with pytest.raises(ValueError, match=f"max_length: 999 exceeds the context of .*{tiny.CONTEXT}"):
        TeacherScorer(model, engine=TRANSFORMERS, top_k=TOP_K, max_length=999)
    with pytest.raises(ValueError, match=r"top_k: 513 exceeds the vocabulary of .*512"):
        TeacherScorer(model, engine=TRANSFORMERS, top_k=513, max_length=MAX_LENGTH)
