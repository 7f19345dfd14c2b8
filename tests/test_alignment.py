from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.alignment import align, align_dtw, align_exact, as_groups, entropy_weights, exact_bounds, text_tokens
from cdm.tokenizers import Tokenizer, load_tokenizer
from tests import slow_twins, tiny

WORDS = st.text("ab c1é", max_size=4)


@st.composite
def two_tokenizations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Byte ends of one text of 0 to 20 bytes on both sides, zero-width tokens anywhere."""
    size = draw(st.integers(0, 20))
    sides = []
    for _ in range(2):
        cuts = draw(st.lists(st.integers(0, size), max_size=12))
        trailing = draw(st.integers(0, 2))
        sides.append(sorted([*cuts, size]) if size else [0] * (1 + trailing))
        sides[-1] += [size] * (trailing if size else 0)
    return sides[0], sides[1]


def check_cover(groups: list, n_s: int, n_t: int) -> None:
    for side, n in ((0, n_s), (1, n_t)):
        flat = [i for group in groups for i in range(*group[side])]
        assert flat == list(range(n))
        assert all(group[side][0] < group[side][1] for group in groups)


def test_by_hand() -> None:
    # un|happy| cat against unhap|py| c|at
    assert align_exact([2, 7, 11], [5, 7, 9, 11]) == [((0, 2), (0, 2)), ((2, 3), (2, 4))]


@pytest.mark.parametrize(
    ("ends_s", "ends_t", "groups"),
    [
        ([], [], []),
        ([3], [3], [((0, 1), (0, 1))]),
        ([0], [0], [((0, 1), (0, 1))]),  # an empty response: the ends of turn alone
        ([0, 3], [3], [((0, 2), (0, 1))]),  # a dummy space of its own in front
        ([0, 3], [0, 3], [((0, 1), (0, 1)), ((1, 2), (1, 2))]),
        ([1, 1, 2], [1, 2], [((0, 2), (0, 1)), ((2, 3), (1, 2))]),  # joins the group that it ends with
        ([3, 3, 3], [3], [((0, 3), (0, 1))]),
        ([3, 3, 3], [1, 3, 3], [((0, 1), (0, 2)), ((1, 3), (2, 3))]),
    ],
)
def test_zero_width_tokens(ends_s: list[int], ends_t: list[int], groups: list) -> None:
    assert align_exact(ends_s, ends_t) == groups
    assert slow_twins.align_exact(ends_s, ends_t) == groups


@settings(max_examples=400, deadline=None)
@given(two_tokenizations())
def test_exact_is_the_slow_twin(sides: tuple[list[int], list[int]]) -> None:
    ends_s, ends_t = sides
    groups = align_exact(ends_s, ends_t)
    assert groups == slow_twins.align_exact(ends_s, ends_t)
    check_cover(groups, len(ends_s), len(ends_t))
    for (_, s1), (_, t1) in groups:
        assert ends_s[s1 - 1] == ends_t[t1 - 1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=9), st.lists(WORDS, min_size=1, max_size=9), st.randoms(use_true_random=False)
)
def test_dtw_is_the_slow_twin(texts_s: list[str], texts_t: list[str], random) -> None:
    for weights in (lambda n: [1.0] * n, lambda n: [random.uniform(3, 6) for _ in range(n)]):
        w_s, w_t = weights(len(texts_s)), weights(len(texts_t))
        groups = align_dtw(texts_s, texts_t, w_s, w_t)
        assert groups == slow_twins.align_dtw(texts_s, texts_t, w_s, w_t)
        check_cover(groups, len(texts_s), len(texts_t))


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab\u00e9 ", min_size=40, max_size=160),
    rate=st.sampled_from([0.2, 0.6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dtw_leaves_no_cell_out_that_the_slow_twin_needs(text: str, rate: float, seed: int) -> None:
    """One text cut in two ways, long enough that cells far from the path are left out; characters are cut as well."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(2):
        cuts = np.flatnonzero(rng.random(len(text.encode()) - 1) < rate) + 1
        parts = np.split(np.frombuffer(text.encode(), np.uint8), cuts)
        pieces.append([part.tobytes().decode("utf-8", "surrogateescape") for part in parts])
    for weights in ([np.ones(len(texts)) for texts in pieces], [rng.uniform(3, 6, len(texts)) for texts in pieces]):
        assert align_dtw(*pieces, *weights) == slow_twins.align_dtw(*pieces, *weights)


def test_dtw_ties_go_diagonally_then_back_on_the_teacher() -> None:
    assert align_dtw(["a", "a"], ["a", "a"], [1, 1], [1, 1]) == [((0, 1), (0, 1)), ((1, 2), (1, 2))]
    assert align_dtw(["", ""], ["", "", ""], [1, 1], [1, 1, 1]) == [((0, 1), (0, 2)), ((1, 2), (2, 3))]


def test_entropy_weights_by_hand() -> None:
    np.testing.assert_allclose(entropy_weights([0.2, 1.0, 0.6]), [3.357609, 5.642391, 4.5], atol=5e-7)
    assert entropy_weights([7.0]).tolist() == [4.5]
    assert entropy_weights([2.0, 2.0 + 1e-13]).tolist() == [4.5, 4.5]
    assert entropy_weights([]).shape == (0,)
    with pytest.raises(ValueError, match="row 1 is not finite"):
        entropy_weights([0.1, float("nan")])


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folders = [tmp_path_factory.mktemp(name) for name in ("student", "teacher")]
    tiny.sentencepiece_tokenizer().save_pretrained(folders[0])
    tiny.byte_level_tokenizer().save_pretrained(folders[1])
    return [load_tokenizer(str(folder)) for folder in folders]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_characters="▁", codec="utf-8"), min_size=1, max_size=40))
def test_an_exact_group_spells_the_same_bytes_on_both_sides(two_tokenizers: list[Tokenizer], text: str) -> None:
    (ids_s, ends_s), (ids_t, ends_t) = (tokenizer.encode_with_ends(text) for tokenizer in two_tokenizers)
    groups = align_exact(ends_s, ends_t)
    check_cover(groups, len(ids_s), len(ids_t))
    for number, group in enumerate(groups):
        bytes_s, bytes_t = (
            b"".join(tokenizer.token_bytes(int(i)) for i in ids[slice(*side)])
            for tokenizer, ids, side in zip(two_tokenizers, (ids_s, ids_t), group, strict=True)
        )
        assert bytes_s == (b" " + bytes_t if number == 0 else bytes_t)  # the student's dummy space


def test_the_end_of_turn_is_a_group_of_its_own_under_both_methods() -> None:
    ends_s, ends_t = [2, 7, 11, 11], [5, 7, 9, 11, 11]
    texts_s, texts_t = ["un", "happy", " cat", ""], ["unhap", "py", " c", "at", ""]
    exact = align(method="exact", ends_s=ends_s, ends_t=ends_t)
    assert as_groups(exact) == [((0, 2), (0, 2)), ((2, 3), (2, 4)), ((3, 4), (4, 5))]
    entropies = {"entropy_s": [0.1, 0.5, 0.9, 99.0], "entropy_t": [0.1, 0.5, 0.9, 0.3, 99.0]}
    dtw = align(method="dtw", ends_s=ends_s, ends_t=ends_t, texts_s=texts_s, texts_t=texts_t, **entropies)
    alone = align_dtw(texts_s[:3], texts_t[:4], entropy_weights([0.1, 0.5, 0.9]), entropy_weights([0.1, 0.5, 0.9, 0.3]))
    assert as_groups(dtw) == [*alone, ((3, 4), (4, 5))]
    one_sided = align(method="dtw", ends_s=ends_s[:3], ends_t=ends_t, texts_s=texts_s[:3], texts_t=texts_t)
    check_cover(as_groups(one_sided), 3, 5)
    empty = align(method="dtw", ends_s=[0], ends_t=[0], texts_s=[""], texts_t=[""])
    assert as_groups(empty) == [((0, 1), (0, 1))]


def test_bounds_are_int32_and_text_tokens_count() -> None:
    bounds = exact_bounds(np.array([2, 4], dtype=np.int32), np.array([4], dtype=np.int64))
    assert bounds.bounds_s.tolist() == [0, 2] and bounds.bounds_t.tolist() == [0, 1]
    assert bounds.bounds_s.dtype == np.int32 and bounds.bounds_t.dtype == np.int32
    assert [text_tokens(ends) for ends in ([], [0], [3], [3, 3], [0, 3, 5, 5, 5])] == [0, 0, 1, 1, 3]


@pytest.mark.parametrize(
    ("ends_s", "ends_t", "message"),
    [
        ([1, 2], [1, 3], "end at byte 2, the teacher's at 3"),
        ([2, 1], [1], "never fall"),
        ([-1, 1], [1], "never fall"),
        ([], [1], "one side is empty"),
    ],
)
def test_ends_that_are_not_of_one_text(ends_s: list[int], ends_t: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_exact(ends_s, ends_t)


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="'exact' or 'dtw'"):
        align(method="fuzzy", ends_s=[1], ends_t=[1])
    with pytest.raises(ValueError, match="needs texts_s"):
        align(method="dtw", ends_s=[1], ends_t=[1])
    with pytest.raises(ValueError, match="weights"):
        align_dtw(["a"], ["a"], [1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="negative or not finite"):
        align_dtw(["a"], ["a"], [1.0], [-1.0])
