"""Every method by hand on one group, and the invariants of docs/method.md, section 6, over all of them."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from cdm.config_methods import AnyMethod
from cdm.methods import CONTEXT, METHODS
from cdm.records import LossOutput, TeacherRows
from cdm.vocab_map import VocabMap, build_vocab_map
from tests import slow_twins
from tests.test_vocab_map import Vocabulary, vocabulary

Batch = dict[str, Any]  # logits_s [R, V], teacher, targets_s [R], documents_s [R]

WORDS = [b"the", b"cat", b"sat", b"onward", b"mat", b"and", b"seven", b"slept", b"!", b"?", b"12", b"3"]
STUDENT = vocabulary(*WORDS, b"helpless", b"wonderful", b"quickly", None, eos=15)
TEACHER = vocabulary(b"!", b"12", *WORDS[:7], b"helplesz", b"wonderfull", b"quiick", b"zzz", b"?!", None, eos=14)
V_S, V_T, K = STUDENT.vocab_size + 2, TEACHER.vocab_size, 6  # two padded rows of the student's embedding
SAME = ["kl", "reverse_kl", "js", "skew_kl"]
VARIANTS = [(name, {}) for name in METHODS] + [
    ("cdm", {"tail": "residual"}),
    ("cdm", {"rows": "mean"}),
    ("cdm", {"rows": "mean", "tail": "residual", "dual": False}),
    ("cdm", {"top_k": 1000}),
    ("cdm", {"observed": True}),
    ("strict", {"reverse": False}),
]
EVERY = pytest.mark.parametrize(
    ("method", "options"), VARIANTS, ids=["-".join([name, *map(str, o.values())]) for name, o in VARIANTS]
)


def document(seed: int, groups: list[tuple[int, int]], v_t: int = V_T) -> Batch:
    """One response with groups of the given numbers of student and teacher tokens; float64, random rows."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(groups)
    ends = sizes.cumsum(0)
    n_s, n_t = ends[-1].tolist()
    logp = (2 * torch.randn(n_t, v_t, generator=g, dtype=torch.float64)).log_softmax(-1)
    top = logp.topk(min(K, v_t))
    ids_t = torch.randint(0, v_t, (n_t,), generator=g)
    bounds = torch.stack([ends - sizes, ends], 2)
    teacher = TeacherRows(
        bounds[:, 0], bounds[:, 1], ids_t, logp.gather(1, ids_t[:, None])[:, 0], top.indices, top.values
    )
    logits = 2 * torch.randn(n_s, V_S, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V_S - 2, (n_s,), generator=g)
    return {"logits_s": logits, "teacher": teacher, "targets_s": targets, "documents_s": torch.zeros(n_s).long()}


def collate(documents: list[Batch]) -> Batch:
    offset_s = offset_t = 0
    parts: dict[str, list[torch.Tensor]] = {}
    for number, batch in enumerate(documents):
        rows = batch["teacher"]
        parts.setdefault("groups_s", []).append(rows.groups_s + offset_s)
        parts.setdefault("groups_t", []).append(rows.groups_t + offset_t)
        for name in ("ids_t", "logp_t", "topk_ids_t", "topk_logp_t"):
            parts.setdefault(name, []).append(getattr(rows, name))
        for name in ("logits_s", "targets_s"):
            parts.setdefault(name, []).append(batch[name])
        parts.setdefault("documents_s", []).append(torch.full((len(batch["logits_s"]),), number))
        offset_s, offset_t = offset_s + len(batch["logits_s"]), offset_t + len(rows.ids_t)
    whole = {name: torch.cat(value) for name, value in parts.items()}
    names = ("groups_s", "groups_t", "ids_t", "logp_t", "topk_ids_t", "topk_logp_t")
    return {
        "teacher": TeacherRows(*(whole[name] for name in names)),
        **{name: whole[name] for name in ("logits_s", "targets_s", "documents_s")},
    }


def run(method: str, batch: Batch, vocab_map: VocabMap | None, **options: Any) -> LossOutput:
    context = {CONTEXT[method]: batch[CONTEXT[method]]} if method in CONTEXT else {}
    return METHODS[method](batch["logits_s"], batch["teacher"], vocab_map, **context, **options)


def documents(method: str) -> list[Batch]:
    if method in SAME:
        shapes = [[(1, 1)] * 3, [(1, 1)] * 5, [(1, 1)]]
    else:
        shapes = [[(1, 1), (2, 1), (1, 1)], [(1, 3), (1, 1), (2, 2), (1, 1)], [(1, 1)]]
    return [document(seed, shape) for seed, shape in enumerate(shapes, 1)]


@pytest.fixture(scope="module")
def vocab_map() -> VocabMap:
    return build_vocab_map(STUDENT, TEACHER)


def temperatures(method: str) -> list[dict[str, float]]:
    tempered = "temperature" in inspect.signature(METHODS[method]).parameters
    return [{"temperature": tau} for tau in (0.5, 1.0, 2.0, 4.0)] if tempered else [{}]


@EVERY
def test_the_student_gets_a_gradient_the_teacher_none(method: str, options: dict, vocab_map: VocabMap) -> None:
    batch = collate(documents(method))
    batch["logits_s"].requires_grad_()
    watched = [batch["teacher"].logp_t.requires_grad_(), batch["teacher"].topk_logp_t.requires_grad_()]
    out = run(method, batch, vocab_map, **options)
    out.total.backward()
    assert batch["logits_s"].grad.abs().sum() > 0 and batch["logits_s"].grad.isfinite().all()
    assert all(tensor.grad is None for tensor in watched)
    assert out.groups == len(batch["teacher"].groups_s)
    assert not any(value.requires_grad for value in out.metrics.values())
    assert out.metrics["kd"].item() == pytest.approx(out.total.item())


@EVERY
def test_equal_models_diverge_nowhere(method: str, options: dict) -> None:
    batch = document(7, [(1, 1)] * 6)
    logp = batch["logits_s"].log_softmax(-1)
    top = logp.topk(K)
    batch["teacher"] = replace(
        batch["teacher"],
        ids_t=batch["targets_s"],
        logp_t=logp.gather(1, batch["targets_s"][:, None])[:, 0],
        topk_ids_t=top.indices,
        topk_logp_t=top.values,
    )
    wide = vocabulary(*WORDS, *STUDENT.pieces[12:], b"p1", b"p2")
    same = build_vocab_map(wide, wide)
    for tau in temperatures(method):
        assert run(method, batch, same, **options, **tau).total.item() == pytest.approx(0.0, abs=1e-9)


@EVERY
def test_names_of_ids_do_not_matter(method: str, options: dict, vocab_map: VocabMap) -> None:
    batch = collate(documents(method))
    g = torch.Generator().manual_seed(3)
    new_s = torch.cat([torch.randperm(STUDENT.vocab_size, generator=g), torch.arange(STUDENT.vocab_size, V_S)])
    new_t = new_s[:V_T] if method in SAME else torch.randperm(V_T, generator=g)
    renamed = dict(batch)
    renamed["logits_s"] = torch.empty_like(batch["logits_s"]).index_copy(1, new_s, batch["logits_s"])
    renamed["targets_s"] = new_s[batch["targets_s"]]
    rows = batch["teacher"]
    renamed["teacher"] = replace(rows, ids_t=new_t[rows.ids_t], topk_ids_t=new_t[rows.topk_ids_t])
    other = build_vocab_map(rename(STUDENT, new_s), rename(TEACHER, new_t)) if method not in SAME else None
    before, after = run(method, batch, vocab_map, **options), run(method, renamed, other, **options)
    assert after.total.item() == pytest.approx(before.total.item(), rel=1e-9)
    assert {k: v.item() for k, v in after.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in before.metrics.items()}
    )


def rename(old: Vocabulary, new: torch.Tensor) -> Vocabulary:
    pieces: list[bytes | None] = [None] * old.vocab_size
    for token_id, piece in enumerate(old.pieces):
        pieces[int(new[token_id])] = piece
    return Vocabulary(tuple(pieces), {role: int(new[i]) for role, i in old.special_roles.items()})


@EVERY
def test_batching_and_order_change_nothing(method: str, options: dict, vocab_map: VocabMap) -> None:
    each = documents(method)
    singles = [run(method, collate([one]), vocab_map, **options) for one in each]
    total = sum(out.total.item() for out in singles)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        whole = run(method, collate([each[i] for i in order]), vocab_map, **options)
        assert whole.total.item() == pytest.approx(total, rel=1e-9)
        for name, value in whole.metrics.items():
            assert value.item() == pytest.approx(sum(out.metrics[name].item() for out in singles), abs=1e-9)
    pair = run(method, collate(each[:2]), vocab_map, **options)
    assert pair.total.item() + singles[2].total.item() == pytest.approx(total, rel=1e-9)
    assert pair.groups + singles[2].groups == whole.groups


@EVERY
def test_float32_is_close_and_finite(method: str, options: dict, vocab_map: VocabMap) -> None:
    batch = collate(documents(method))
    wanted = run(method, batch, vocab_map, **options).total.item()
    rows = batch["teacher"]
    batch["teacher"] = replace(rows, logp_t=rows.logp_t.float(), topk_logp_t=rows.topk_logp_t.float())
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        logits = batch["logits_s"].to(dtype).requires_grad_()
        out = run(method, batch | {"logits_s": logits}, vocab_map, **options).total
        assert out.item() == pytest.approx(wanted, rel=close, abs=close)
        out.backward()
        assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@EVERY
def test_a_batch_without_groups_is_zero_and_in_the_graph(method: str, options: dict, vocab_map: VocabMap) -> None:
    batch = document(1, [(1, 1)])
    none = torch.zeros(0, 2, dtype=torch.long)
    batch["teacher"] = replace(batch["teacher"], groups_s=none, groups_t=none)
    batch["logits_s"].requires_grad_()
    out = run(method, batch, vocab_map, **options)
    out.total.backward()
    assert out.total.item() == 0 and out.groups == 0 and (batch["logits_s"].grad == 0).all()


# --- rows of which the teacher kept fewer than K end in padding ------------------------------------------------------


def padded(teacher: TeacherRows, kept: torch.Tensor, width: int) -> TeacherRows:
    """The best `kept` [R] ids of each row, in `width` columns."""
    more = width - teacher.topk_ids_t.shape[1]
    gone = torch.arange(width) >= kept[:, None]
    ids = torch.nn.functional.pad(teacher.topk_ids_t, (0, more)).masked_fill(gone, -1)
    logp = torch.nn.functional.pad(teacher.topk_logp_t, (0, more)).masked_fill(gone, -torch.inf)
    return replace(teacher, topk_ids_t=ids, topk_logp_t=logp)


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_padding_change_nothing(method: str, vocab_map: VocabMap) -> None:
    batch = collate(documents(method))
    rows = len(batch["teacher"].ids_t)
    wide = batch | {"teacher": padded(batch["teacher"], torch.full((rows,), K), K + 3)}
    wanted, found = run(method, batch, vocab_map), run(method, wide, vocab_map)
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-12)
    assert {name: value.item() for name, value in found.metrics.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.metrics.items()}
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_row_with_fewer_ids_counts_as_it_would_alone(method: str, vocab_map: VocabMap) -> None:
    each, total = documents(method), 0.0
    for kept, one in zip((2, 4, K), each, strict=True):
        rows = one["teacher"]
        short = replace(rows, topk_ids_t=rows.topk_ids_t[:, :kept], topk_logp_t=rows.topk_logp_t[:, :kept])
        total += run(method, one | {"teacher": short}, vocab_map).total.item()
        one["teacher"] = padded(rows, torch.full((len(rows.ids_t),), kept), K)
    assert run(method, collate(each), vocab_map).total.item() == pytest.approx(total, rel=1e-12)


@EVERY
def test_padding_leaves_a_finite_gradient_and_no_divergence_of_equals(
    method: str, options: dict, vocab_map: VocabMap
) -> None:
    batch = collate(documents(method))
    rows = batch["teacher"]
    batch["teacher"] = padded(rows, torch.arange(len(rows.ids_t)) % K + 1, K)
    batch["logits_s"].requires_grad_()
    run(method, batch, vocab_map, **options).total.backward()
    assert batch["logits_s"].grad.abs().sum() > 0 and batch["logits_s"].grad.isfinite().all()
    equal = document(7, [(1, 1)] * 6)
    logp = equal["logits_s"].log_softmax(-1)
    best, ids = logp.topk(K)
    own = logp.gather(1, equal["targets_s"][:, None])[:, 0]
    teacher = replace(equal["teacher"], ids_t=equal["targets_s"], logp_t=own, topk_ids_t=ids, topk_logp_t=best)
    equal["teacher"] = padded(teacher, torch.tensor([1, 2, 3, 4, 5, 6]), K)
    wide = vocabulary(*WORDS, *STUDENT.pieces[12:], b"p1", b"p2")
    for tau in temperatures(method):
        out = run(method, equal, build_vocab_map(wide, wide), **options, **tau)
        assert out.total.item() == pytest.approx(0.0, abs=1e-9)


# --- by hand: the student has (0.5, 0.3, 0.2), the teacher's top two are 0.6 and 0.2 ---------------------------------

KL = 0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.3)


def small(groups: list[tuple[int, int]] = [(1, 1)], top: tuple[int, int] = (0, 1)) -> Batch:  # noqa: B006
    sizes = torch.tensor(groups)
    ends = sizes.cumsum(0)
    bounds = torch.stack([ends - sizes, ends], 2)
    n_s, n_t = ends[-1].tolist()
    logp = torch.tensor([[0.6, 0.2]] * n_t, dtype=torch.float64).log()
    rows = TeacherRows(bounds[:, 0], bounds[:, 1], torch.zeros(n_t).long(), logp[:, 0], torch.tensor([top] * n_t), logp)
    logits = torch.tensor([[0.5, 0.3, 0.2]] * n_s, dtype=torch.float64).log()
    return {
        "logits_s": logits,
        "teacher": rows,
        "targets_s": torch.arange(n_s) % 3,
        "documents_s": torch.zeros(n_s).long(),
    }


LETTERS_S, LETTERS_T = vocabulary(b"a", b"b", b"c"), vocabulary(b"a", b"b", b"x")


def test_same_tokenizer_methods_by_hand() -> None:
    p, q = [0.6, 0.2, 0.2], [0.5, 0.3, 0.2]
    middle, mixed = ([s * x + (1 - s) * y for x, y in zip(p, q, strict=True)] for s in (0.5, 0.1))
    wanted = {
        "kl": KL,
        "reverse_kl": slow_twins.kl(q, p),
        "js": (slow_twins.kl(p, middle) + slow_twins.kl(q, middle)) / 2,
        "skew_kl": slow_twins.kl(p, mixed),
    }
    for method, value in wanted.items():
        out = run(method, small(), None)
        assert out.total.item() == pytest.approx(value)
        assert out.metrics["mass_exact"].item() == pytest.approx(0.8)
        assert out.metrics["mass_unmapped"].item() == pytest.approx(0.2)


def test_an_id_that_the_student_lacks_is_residual() -> None:
    out = run("kl", small(top=(0, 9)), None)
    assert out.total.item() == pytest.approx(slow_twins.kl([0.6, 0.4], [0.5, 0.5]))


def test_uld_by_hand() -> None:
    assert run("uld", small(), None).total.item() == pytest.approx(0.1 + 0.1 + 0.0)
    # three student rows against two: the third is left out
    assert run("uld", small([(1, 1), (2, 1)]), None).total.item() == pytest.approx(0.4)


def test_multilevel_ot_by_hand() -> None:
    out = run("multilevel_ot", small(), None, temperature=1.0)
    assert out.total.item() == pytest.approx(0.2 + 0.1 * KL + 0.1 * 0.2)


def test_multilevel_ot_moves_rows_in_a_sequence() -> None:
    batch = small([(1, 1), (1, 1)])
    batch["logits_s"] = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]], dtype=torch.float64).log()
    swapped = batch["logits_s"].flip(0)
    batch["teacher"] = replace(batch["teacher"], topk_logp_t=swapped[:, :2])
    apart = run("multilevel_ot", batch, None, temperature=1.0, log_weight=0.0, sequence_weight=0.0).total.item()
    both = run(
        "multilevel_ot", batch, None, temperature=1.0, log_weight=0.0, sequence_weight=1.0, blur=0.02
    ).total.item()
    assert apart == pytest.approx(2 * (0.58 + 0.29 + 0.29))
    assert both == pytest.approx(apart, abs=1e-6)  # the same rows in another order: no transport between sequences


def test_min_edit_by_hand() -> None:
    near = build_vocab_map(vocabulary(b"abcde", b"b", b"c"), vocabulary(b"abcdx", b"b", b"x"))
    out = run("min_edit", small([(1, 1), (2, 1)]), near)
    assert out.total.item() == pytest.approx(KL - math.log(0.3) - math.log(0.2))


def test_alm_by_hand() -> None:
    batch = small([(2, 1)])
    wanted = slow_twins.kl([0.6, 0.4], [0.15, 0.85])  # 0.5 * 0.3 is the student's probability of the text
    assert run("alm", batch, None, scale=1.0).total.item() == pytest.approx(wanted)
    p, q = 0.6**0.01, 0.15**0.01
    assert run("alm", batch, None).total.item() == pytest.approx(slow_twins.kl([p, 1 - p], [q, 1 - q]))
    with pytest.raises(ValueError, match="scale 0"):
        run("alm", batch, None, scale=0)


def test_gold_by_hand() -> None:
    shared = build_vocab_map(vocabulary(b"a", b"y", b"z"), LETTERS_T)  # one of three
    p, q = [0.6, 0.4], [0.5, 0.5]
    middle = [0.55, 0.45]
    jsd = (slow_twins.kl(p, middle) + slow_twins.kl(q, middle)) / 2
    rest = abs(0.2 - 0.3)  # of the student's best two, one is unshared
    out = run("gold", small(), shared)
    assert out.total.item() == pytest.approx(jsd / 3 + rest * 2 / 3)
    assert out.metrics["mass_exact"].item() == pytest.approx(0.6)


def test_strict_by_hand() -> None:
    shared = build_vocab_map(LETTERS_S, LETTERS_T)
    wanted = slow_twins.kl([0.625, 0.375], [0.75, 0.25])
    out = run("strict", small([(1, 1), (2, 1)]), shared)
    assert out.total.item() == pytest.approx(wanted)
    assert out.groups == 2 and out.metrics["one_to_one"].item() == 1
    assert run("strict", small(), shared, reverse=False).total.item() == pytest.approx(0.035375, abs=1e-6)
    assert run("strict", small(), shared, top_k=1).total.item() == pytest.approx(0.0)


def test_cdm_by_hand() -> None:
    shared = build_vocab_map(LETTERS_S, LETTERS_T)
    out = run("cdm", small([(1, 1), (2, 1)]), shared, tail="residual")
    assert out.total.item() == pytest.approx(2 * KL)
    assert {name: round(value.item(), 6) for name, value in out.metrics.items()} == {
        "kd": pytest.approx(2 * KL, abs=1e-6),
        "one_to_one": 1,
        "mass_exact": 1.6,
        "mass_dynamic": 0.0,
        "mass_unmapped": 0.4,
        "d1": pytest.approx(2 * KL, abs=1e-6),
        "d2": pytest.approx(2 * KL, abs=1e-6),
    }
    near = build_vocab_map(vocabulary(b"abcde", b"b", b"c"), vocabulary(b"abcdx", b"b", b"x"))
    assert run("cdm", small(), near).metrics["mass_dynamic"].item() == pytest.approx(0.6)
    # only the student's best id is live: abcde; so b, the teacher's second, keeps its exact image, and D2 has one id
    live = run("cdm", small(top=(1, 0)), near, top_k=1)
    assert live.metrics["d1"].item() == pytest.approx(0.0) and live.metrics["d2"].item() == pytest.approx(0.0)


def test_cdm_over_all_rows_of_a_group_by_hand() -> None:
    batch = small([(2, 2)])
    q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    p = torch.tensor([[0.6, 0.2], [0.5, 0.3]], dtype=torch.float64)
    batch["logits_s"] = q.log() + torch.tensor([[1.0], [-2.0]])  # logits are free up to a constant
    batch["teacher"] = replace(batch["teacher"], topk_logp_t=p.log(), topk_ids_t=torch.tensor([[0, 1], [1, 2]]))
    letters = vocabulary(b"a", b"b", b"c")
    out = run("cdm", batch, build_vocab_map(letters, letters), rows="mean")
    # union {0, 1, 2}, an absent id at its row's smallest; the best two are kept
    teacher = [math.sqrt(0.6 * 0.3), math.sqrt(0.2 * 0.5), math.sqrt(0.2 * 0.3)][:2]
    student = [math.sqrt(0.5 * 0.1), math.sqrt(0.3 * 0.6)]
    wanted = slow_twins.kl(slow_twins.normalised(teacher), slow_twins.normalised(student))
    assert out.total.item() == pytest.approx(wanted)


def test_nothing_maps_names_the_tokenizers() -> None:
    apart = build_vocab_map(
        Vocabulary((b"q", b"r", b"s"), name="the student"), Vocabulary((b"a", b"b"), name="the teacher")
    )
    with pytest.raises(ValueError, match=r"nothing maps.*'the teacher'.*'the student'"):
        run("cdm", small(), apart)


@pytest.mark.parametrize("method", ["cdm", "gold", "strict", "min_edit"])
def test_maps_that_do_not_fit(method: str) -> None:
    with pytest.raises(ValueError, match="needs a vocabulary map"):
        run(method, small(), None)
    wide = vocabulary(b"a", b"b", b"c", b"d")
    with pytest.raises(ValueError, match="has 3 logits but its tokenizer"):
        run(method, small(), build_vocab_map(wide, wide))


def test_unknown_rows() -> None:
    with pytest.raises(ValueError, match="'first' or 'mean'"):
        run("cdm", small(), build_vocab_map(LETTERS_S, LETTERS_T), rows="last")


# --- the config --------------------------------------------------------------------------------------------------

SECTIONS = {
    get_args(section.model_fields["type"].annotation)[0]: section for section in get_args(get_args(AnyMethod)[0])
}
# Read before the loss: where the groups and the map come from, and what the terms weigh.
ELSEWHERE = {"type", "alpha", "align", "threshold", "protect", "unmatched"}


def test_every_method_has_a_section() -> None:
    assert SECTIONS.keys() - {"sft"} == METHODS.keys()


@pytest.mark.parametrize("kind", METHODS)
def test_a_section_has_its_methods_options_and_defaults(kind: str) -> None:
    parameters = inspect.signature(METHODS[kind]).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != CONTEXT.get(kind)}
    section = {name: field.default for name, field in SECTIONS[kind].model_fields.items() if name not in ELSEWHERE}
    assert section == (options | {"rows": "mean"} if kind == "cdm_paper" else options)
