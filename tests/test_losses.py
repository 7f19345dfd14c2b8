from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import losses
from cdm.losses import cdm_directions, cdm_divergence, row_logsumexp, topk_kl
from tests import slow_twins

V_S, V_T, K, K_S = 12, 10, 5, 6


def random_case(seed: int, groups: int = 3, unmapped: float = 0.3) -> dict:
    """Logits and top ids of both sides, and maps with collisions, holes and images outside the teacher's top ids."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, V_S, generator=g, dtype=torch.float64) * 2
    logp_t = (torch.randn(groups, V_T, generator=g, dtype=torch.float64) * 2).log_softmax(-1)
    top = logp_t.topk(K)
    ids_s = logits.topk(K_S).indices
    there = torch.randint(0, V_S, (groups, K), generator=g)
    back = torch.randint(0, V_T, (groups, K_S), generator=g)
    there[torch.rand(there.shape, generator=g) < unmapped] = -1
    back[torch.rand(back.shape, generator=g) < unmapped] = -1
    return {
        "logits_s": logits.requires_grad_(),
        "logp_t": top.values,
        "ids_t": top.indices,
        "map_t_to_s": there,
        "ids_s": ids_s,
        "map_s_to_t": back,
    }


def twin(case: dict, g: int, temperature: float, tail: str, dual: bool) -> float:
    rows = {name: value[g].tolist() for name, value in case.items()}
    return slow_twins.cdm_divergence(
        rows["logits_s"],
        dict(zip(rows["ids_t"], rows["logp_t"], strict=True)),
        dict(zip(rows["ids_t"], rows["map_t_to_s"], strict=True)),
        dict(zip(rows["ids_s"], rows["map_s_to_t"], strict=True)),
        temperature,
        tail,
        dual,
    )


def test_by_hand() -> None:
    z = torch.tensor([[0.5, 0.3, 0.2]]).log()
    none = torch.tensor([[0]]), torch.tensor([[-1]])
    kd = cdm_divergence(
        z, torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[7, 9]]), torch.tensor([[0, 1]]), *none, 1.0, "renormalise"
    )
    assert kd.item() == pytest.approx(0.035375, abs=5e-7)


def test_residual_by_hand() -> None:
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    logp = torch.tensor([[0.6, 0.2]], dtype=torch.float64).log()
    none = torch.tensor([[0]]), torch.tensor([[-1]])
    kd = cdm_divergence(z, logp, torch.tensor([[7, 9]]), torch.tensor([[0, 1]]), *none, 1.0, "residual")
    assert kd.item() == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.2 * math.log(1.0))


def test_several_ids_on_one_add_up() -> None:
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    logp = torch.tensor([[0.4, 0.2, 0.2]], dtype=torch.float64).log()
    none = torch.tensor([[0]]), torch.tensor([[-1]])
    kd = cdm_divergence(z, logp, torch.tensor([[7, 8, 9]]), torch.tensor([[0, 1, 0]]), *none, 1.0, "renormalise")
    assert kd.item() == pytest.approx(0.035375, abs=5e-7)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from(["renormalise", "residual"]),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.9]),
)
def test_divergence_is_the_slow_twin(seed: int, temperature: float, tail: str, dual: bool, unmapped: float) -> None:
    case = random_case(seed, unmapped=unmapped)
    got = cdm_divergence(**case, temperature=temperature, tail=tail, dual=dual)
    wanted = [twin(case, g, temperature, tail, dual) for g in range(len(got))]
    assert got.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    (grad,) = torch.autograd.grad(got.sum(), case["logits_s"])
    assert grad.isfinite().all()


@pytest.mark.parametrize("tail", ["renormalise", "residual"])
def test_gradients_are_right(tail: str) -> None:
    case = random_case(5)
    rest = {name: value for name, value in case.items() if name != "logits_s"}
    assert torch.autograd.gradcheck(
        lambda z: cdm_divergence(z, **rest, temperature=1.7, tail=tail), case["logits_s"], atol=1e-6
    )


def test_the_mean_is_over_the_directions_that_are_defined() -> None:
    case = random_case(1)
    case["map_s_to_t"] = torch.full_like(case["map_s_to_t"], -1)
    one = cdm_divergence(**case, temperature=1.0, tail="renormalise")
    assert one.tolist() == cdm_divergence(**case, temperature=1.0, tail="renormalise", dual=False).tolist()
    assert (one > 0).all()
    case["map_t_to_s"][1] = -1
    none = cdm_divergence(**case, temperature=1.0, tail="residual")
    assert none[1] == 0 and none[0] > 0
    (grad,) = torch.autograd.grad(none.sum(), case["logits_s"])
    assert (grad[1] == 0).all() and grad.isfinite().all()


def test_directions_are_apart() -> None:
    case = random_case(2)
    z_mapped = case["logits_s"].gather(1, case["map_t_to_s"].clamp_min(0))
    z_live = case["logits_s"].gather(1, case["ids_s"])
    rest = [case[name] for name in ("logp_t", "ids_t", "map_t_to_s", "map_s_to_t")]
    both = cdm_directions(z_mapped, z_live, None, *rest, temperature=2.0, tail="renormalise")
    assert both.mapped1.all() and both.mapped2.all()
    torch.testing.assert_close(both.kd, 4.0 * (both.d1 + both.d2) / 2)
    with pytest.raises(ValueError, match="needs the student's logsumexp"):
        cdm_directions(z_mapped, z_live, None, *rest, temperature=2.0, tail="residual")


@pytest.mark.parametrize("tail", ["renormalise", "residual"])
def test_nan_and_infinities_stay_in_their_group(tail: str) -> None:
    case = {name: value.detach().clone() for name, value in random_case(3, groups=5, unmapped=0.0).items()}
    clean = cdm_divergence(**case, temperature=1.0, tail=tail)
    case["logits_s"][1] = torch.nan
    case["logits_s"][2, case["map_t_to_s"][2, 0]] = -torch.inf
    case["logp_t"][3, -1] = -torch.inf
    case["logp_t"][4] = -torch.inf
    got = cdm_divergence(**case, temperature=1.0, tail=tail)
    assert got[0] == clean[0]
    assert got[1].isnan()
    assert got[2] == torch.inf
    assert got[3].isfinite()
    if tail == "renormalise":
        assert got[4] == 0  # no teacher mass anywhere: nothing to compare


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("k", [3, V_S])
def test_topk_kl(temperature: float, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(4, V_S, generator=g, dtype=torch.float64) * 2).requires_grad_()
    logp = (torch.randn(4, V_S, generator=g, dtype=torch.float64) * 2).log_softmax(-1)
    top = logp.topk(k)
    got = topk_kl(z, top.values, top.indices, temperature)
    for row in range(4):
        q, p = slow_twins.softmax(z[row].tolist()), top.values[row].exp().tolist()
        q = [q[i] for i in top.indices[row].tolist()]
        sides = [[*side, max(1e-6, 1 - sum(side))] for side in (p, q)]
        p, q = (slow_twins.normalised([x ** (1 / temperature) for x in side]) for side in sides)
        assert got[row].item() == pytest.approx(temperature**2 * slow_twins.kl(p, q), rel=1e-7)
    same = z.detach().log_softmax(-1).topk(k)
    assert topk_kl(z, same.values, same.indices, temperature).abs().max() < 1e-9


def test_the_other_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.625, 0.375]]).log()
    assert losses.forward_kl(p, q).item() == pytest.approx(0.035375, abs=1e-6)
    assert losses.reverse_kl(p, q).item() == pytest.approx(0.625 * math.log(0.625 / 0.75) + 0.375 * math.log(1.5))
    middle = (0.6875, 0.3125)
    left = slow_twins.kl([0.75, 0.25], middle)
    right = slow_twins.kl([0.625, 0.375], middle)
    assert losses.js(p, q).item() == pytest.approx((left + right) / 2, abs=1e-6)
    mixed = [0.1 * 0.75 + 0.9 * 0.625, 0.1 * 0.25 + 0.9 * 0.375]
    assert losses.skew_kl(p, q).item() == pytest.approx(slow_twins.kl([0.75, 0.25], mixed), abs=1e-6)
    assert losses.skew_kl(p, q, 0.0).item() == losses.forward_kl(p, q).item()
    holes = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-0.7, -0.7]], requires_grad=True)
    out = losses.js(*holes)
    out.sum().backward()
    assert out.isfinite().all() and holes[1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_logsumexp_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LSE_CELLS", 25)
    z = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    got = row_logsumexp(z)
    wide = z.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    wanted = torch.logsumexp(wide, -1)
    torch.testing.assert_close(got, wanted)
    weights = torch.arange(7.0, dtype=got.dtype)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(z.grad, wide.grad.to(dtype))
    assert row_logsumexp(z[:0]).shape == (0,)


def test_half_precision_logits() -> None:
    case = random_case(4)
    case["logits_s"] = case["logits_s"].detach().bfloat16()
    wide = case | {"logits_s": case["logits_s"].float()}
    for tail in ("renormalise", "residual"):
        torch.testing.assert_close(
            cdm_divergence(**case, temperature=1.0, tail=tail), cdm_divergence(**wide, temperature=1.0, tail=tail)
        )


def test_bad_requests() -> None:
    case = random_case(0)
    with pytest.raises(ValueError, match="temperature 0"):
        cdm_divergence(**case, temperature=0, tail="renormalise")
    with pytest.raises(ValueError, match="'renormalise' or 'residual'"):
        cdm_divergence(**case, temperature=1.0, tail="drop")
    with pytest.raises(ValueError, match="must be"):
        cdm_divergence(**case | {"map_t_to_s": case["map_t_to_s"][:, :2]}, temperature=1.0, tail="residual")
    with pytest.raises(ValueError, match="groups differ"):
        cdm_divergence(**case | {"logits_s": case["logits_s"][:2]}, temperature=1.0, tail="residual")
    with pytest.raises(ValueError, match="beta 1"):
        losses.js(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    with pytest.raises(ValueError, match="skew 1"):
        losses.skew_kl(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
