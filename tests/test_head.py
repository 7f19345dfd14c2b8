"""The fused head against the plain one: the same losses and gradients however the rows are divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from cdm import head
from cdm.head import read_rows
from cdm.methods import CONTEXT, METHODS
from cdm.models import load_model
from cdm.pieces import Piece, cuts, divide
from cdm.records import AlignedBatch, LossOutput, TeacherRows
from cdm.rows import STRIDE, StudentRows, best_ids, student_rows, token_logp
from cdm.step import Counts, Objective, StudentModel, batch_loss, piece_loss, to_device
from cdm.vocab_map import VocabMap, build_vocab_map
from tests import tiny
from tests.test_methods import EVERY, STUDENT, TEACHER, V_S, documents
from tests.test_methods import collate as joined

H = 5


@pytest.fixture(scope="module")
def vocab_map() -> VocabMap:
    return build_vocab_map(STUDENT, TEACHER)


def linear(bias: bool, dtype: torch.dtype, v: int = V_S) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(H, v, bias=bias).to(dtype)


def hidden_states(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype) * 2


def plain(hidden: torch.Tensor, layer: torch.nn.Linear, softcap: float | None) -> torch.Tensor:
    logits = layer(hidden)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gradients(loss: torch.Tensor, hidden: torch.Tensor, layer: torch.nn.Linear) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *layer.parameters()]))


@EVERY
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_piece_is_the_unfused_loss(method: str, options: dict, softcap: float | None, vocab_map: VocabMap) -> None:
    batch = joined(documents(method))
    context = {CONTEXT[method]: batch[CONTEXT[method]]} if method in CONTEXT else {}
    layer, hidden = linear(True, torch.float64), hidden_states(len(batch["logits_s"])).requires_grad_()

    def read(rows: StudentRows | torch.Tensor, _: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        out = METHODS[method](rows, batch["teacher"], vocab_map, **context, **options)
        nats = -token_logp(student_rows(rows), batch["targets_s"])
        return 0.3 * out.total + nats.sum(), out.metrics

    wanted, wanted_sums = read(plain(hidden, layer, softcap))
    got, sums = read_rows(hidden, layer, softcap, [0, len(hidden)], read)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(sums, wanted_sums)
    torch.testing.assert_close(gradients(got * 2, hidden, layer), gradients(wanted * 2, hidden, layer))
    with torch.no_grad():
        torch.testing.assert_close(read_rows(hidden, layer, softcap, [0, len(hidden)], read)[0], wanted.detach())


def aligned(method: str) -> AlignedBatch:
    """The documents of `test_methods` as a batch of one padding token: its rows are what matters."""
    batch = joined(documents(method))
    none = torch.zeros(1, 1, dtype=torch.long)
    teachers = (batch["teacher"],)
    rows = torch.arange(len(batch["targets_s"]))
    return AlignedBatch(none, none, rows, batch["targets_s"], batch["documents_s"], teachers, cuts(len(rows), teachers))


@pytest.mark.parametrize("options", [{}, {"rows": "mean"}, {"tail": "residual"}], ids=["first", "mean", "residual"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_pieces_change_nothing(options: dict, dtype: torch.dtype, rows: int, vocab_map: VocabMap) -> None:
    batch = aligned("cdm")
    layer = linear(False, dtype)
    hidden = hidden_states(len(batch.targets_s), dtype).requires_grad_()
    objective = Objective(0.4, (lambda z, t, _: METHODS["cdm"](z, t, vocab_map, **options),), (0.7,))
    counts = Counts(11, (5,))
    (whole,) = divide(batch, 1000)
    wanted, wanted_sums = piece_loss(
        layer(hidden).to(torch.promote_types(dtype, torch.float32)), whole, objective, counts
    )
    pieces = divide(batch, rows)
    assert (len(pieces) == 1) == (rows == 100)
    got, sums = read_rows(
        hidden, layer, None, [0, *(p.end for p in pieces)], lambda z, i: piece_loss(z, pieces[i], objective, counts)
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, wanted, **close, check_dtype=False)
    assert sums.keys() == wanted_sums.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, wanted_sums[name], **close, check_dtype=False)
    rounding = {"rtol": 3e-2, "atol": 1e-3} if dtype == torch.bfloat16 else close
    torch.testing.assert_close(gradients(got, hidden, layer), gradients(wanted, hidden, layer), **rounding)


def test_a_frozen_head_gets_no_gradient_and_no_rows_are_zero() -> None:
    layer, hidden = linear(True, torch.float32), hidden_states(3, torch.float32).requires_grad_()
    layer.weight.requires_grad_(False)
    read_rows(hidden, layer, None, [0, 3], lambda z, _: (z.lse.sum(), {}))[0].backward()
    assert layer.weight.grad is None and hidden.grad.abs().sum() > 0
    torch.testing.assert_close(layer.bias.grad.sum(), torch.tensor(3.0))
    none = hidden_states(0, torch.float32).requires_grad_()
    layer.weight.requires_grad_(True)
    total, sums = read_rows(none, layer, None, [0], lambda z, _: (z.lse.sum(), {}))
    total.backward()
    assert total.item() == 0 and sums == {} and (layer.weight.grad == 0).all()


def test_no_piece_leaves_more_than_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass keeps does not grow with R * V: it is the gradients of the inputs."""
    layer, hidden = linear(False, torch.float32, v=97), hidden_states(50, torch.float32).requires_grad_()
    seen: list[int] = []
    original = head._logits
    monkeypatch.setattr(head, "_logits", lambda *args: seen.append(len(args[0])) or original(*args))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss, _ = read_rows(hidden, layer, None, range(0, 51, 10), lambda z, _: (z.lse.sum(), {}))
    assert seen == [10] * 5
    assert max(x.numel() for x in [*kept, *(g for g in loss.grad_fn.grads if g is not None)]) == layer.weight.numel()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6 * STRIDE), st.integers(0, 5), st.booleans())
def test_best_ids_is_topk(seed: int, v: int, k: int, ties: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 5, (4, v), generator=g).float() if ties else torch.randn(4, v, generator=g)
    logits[0, : v // 2] = -torch.inf
    rows = torch.tensor([3, 0, 0, 2])
    ids = best_ids(logits, rows, k)
    wanted = logits[rows].topk(min(k, v))
    torch.testing.assert_close(logits[rows].gather(1, ids), wanted.values)
    assert all(len(set(row)) == min(k, v) for row in ids.tolist())
    if not ties:
        assert ids[0].tolist() == wanted.indices[0].tolist()


# --- the whole student -------------------------------------------------------------------------------------------


def test_a_model_gives_the_same_loss_and_gradients_in_any_pieces(tmp_path: Path) -> None:
    model = StudentModel(load_model(tiny.tiny_student(tmp_path / "student")))
    model.check_head()
    tokens = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 3, 4, 5, 10, 11, 12])
    batch = AlignedBatch(
        tokens,
        torch.ones_like(tokens),
        rows,
        tokens.reshape(-1)[rows + 1],
        rows // 9,
        (),
        torch.arange(8).numpy()[:, None],
    )
    counts, objective = Counts(7, ()), Objective(1.0, (), ())
    results = []
    for piece_rows in (1, 2, 7):
        model.zero_grad()
        model.piece_rows = piece_rows
        loss, sums = batch_loss(model, batch, objective, counts)
        loss.backward()
        results.append([loss.detach(), sums["ce"], *(p.grad.clone() for p in model.parameters())])
    labels = torch.full_like(tokens, -100).view(-1).index_copy(0, rows + 1, batch.targets_s).view_as(tokens)
    model.zero_grad()
    loss = model.model(tokens, labels=labels).loss
    loss.backward()
    wanted = [loss.detach(), loss.detach(), *(p.grad for p in model.parameters())]
    for got in results:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_soft_caps_and_other_heads() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, initializer_range=1.0,
    )  # fmt: skip
    model = StudentModel(Gemma2ForCausalLM(config).eval())
    assert model.softcap == 0.05
    model.check_head()
    model.softcap = None
    with pytest.raises(ValueError, match="no plain head"):
        model.check_head()
    model.model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 64))
    with pytest.raises(ValueError, match="its head is a Sequential"):
        StudentModel(model.model)


@EVERY
def test_on_an_accelerator_nothing_is_waited_for(method: str, options: dict, vocab_map: VocabMap) -> None:
    """Meta tensors have no values: whoever asks for one, or needs a shape that depends on one, fails."""
    if method == "multilevel_ot":
        pytest.skip("it asks for the lengths of the responses, whose rows it transports to one another")
    batch = to_device(aligned(method), torch.device("meta"))
    layer = linear(True, torch.bfloat16).to("meta")
    hidden = torch.empty(len(batch.targets_s), H, dtype=torch.bfloat16, device="meta", requires_grad=True)

    def term(rows: StudentRows, teacher: TeacherRows, piece: Piece) -> LossOutput:
        context = {CONTEXT[method]: getattr(piece, CONTEXT[method])} if method in CONTEXT else {}
        return METHODS[method](rows, teacher, vocab_map, **context, **options)

    pieces = divide(batch, 3)
    assert len(pieces) > 1
    objective, counts = Objective(0.4, (term,), (1.0,)), Counts(9, (8,))
    loss, _ = read_rows(
        hidden,
        layer,
        None,
        [0, *(p.end for p in pieces)],
        lambda rows, i: piece_loss(rows, pieces[i], objective, counts),
    )
    loss.backward()
    assert hidden.grad is not None and layer.weight.grad is not None
