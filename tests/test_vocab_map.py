from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from cdm import vocab_map as module
from cdm.images import exact_map, prefix_map
from cdm.spelling import most_edits, near_texts
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map, cached_vocab_map, dynamic_on_device, vocab_map_file
from tests import slow_twins, tiny


@dataclass(frozen=True)
class Vocabulary:
    """What the map reads of a tokenizer: bytes and roles."""

    pieces: tuple[bytes | None, ...]
    special_roles: dict[str, int] = field(default_factory=dict)
    name: str = "vocabulary"
    byte_pieces: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def fingerprint(self) -> str:
        return f"{hash(self.pieces):x}"

    def all_token_bytes(self) -> list[bytes | None]:
        return list(self.pieces)


def vocabulary(*pieces: bytes | None, **roles: int) -> Vocabulary:
    return Vocabulary(pieces, roles)


LETTERS = st.text("abcAé12 .\n", max_size=6).map(str.encode)
PIECES = st.lists(st.one_of(st.none(), LETTERS, st.sampled_from([b"\xe4\xb8", b"a\xff"])), min_size=1, max_size=24)


def test_exact_map_by_hand() -> None:
    student = vocabulary(b"a", b" the", b"a", None, None, b"\xff", eos=3, bos=4)
    teacher = vocabulary(b" the", b"a", None, b"b", None, None, b"\xff", eos=2, end_of_turn=4, bos=5)
    # lowest of two ids with the same bytes; eos and bos by role; the student has no end of turn
    assert exact_map(student, teacher).tolist() == [1, 0, 3, -1, -1, 4, 5]
    assert exact_map(teacher, student).tolist() == [1, 0, 1, 2, 5, 6]


def test_a_byte_of_byte_fallback_is_a_twin_only_where_nothing_else_is() -> None:
    student = replace(vocabulary(b"(", b"\n", b"b", b"("), byte_pieces=frozenset({0, 1}))
    teacher = vocabulary(b"(", b"\n", b"b")
    assert exact_map(student, teacher).tolist() == [0, 1, 2]
    assert exact_map(student, teacher, "emitted").tolist() == [3, 1, 2]
    assert exact_map(teacher, student, "emitted").tolist() == [0, 1, 2, 0]


def test_byte_pieces_of_real_kinds_of_tokenizers(tmp_path: Path) -> None:
    tiny.sentencepiece_tokenizer().save_pretrained(tmp_path / "sentencepiece")
    tiny.byte_level_tokenizer().save_pretrained(tmp_path / "byte-level")
    sentencepiece, byte_level = (load_tokenizer(str(tmp_path / kind)) for kind in ("sentencepiece", "byte-level"))
    assert sorted(sentencepiece.token_bytes(i) for i in sentencepiece.byte_pieces) == [bytes([b]) for b in range(256)]
    assert byte_level.byte_pieces == frozenset()
    image = exact_map(sentencepiece, byte_level, "emitted")
    ids, _ = byte_level.encode_with_ends("a(b")
    emitted, _ = sentencepiece.encode_with_ends("a(b")
    spelled = {sentencepiece.token_bytes(int(i)): int(i) for i in emitted}
    for token in ids.tolist():
        piece = byte_level.token_bytes(token)
        assert piece not in spelled or image[token] == spelled[piece]


def test_prefixes_by_hand() -> None:
    student = vocabulary(b" token", b" tok", b"1", None, b"quick", eos=3)
    teacher = vocabulary(b" tokenization", b" toks", b"123", b"z", None, b" tok", b"", eos=4)
    assert prefix_map(student, teacher).tolist() == [0, 1, 2, -1, -1, 1, -1]
    one_way = build_vocab_map(student, teacher, unmatched="prefix")
    assert one_way.static.tolist() == [0, 1, 2, -1, 3, 1, -1]
    assert one_way.exact.tolist() == [-1, -1, -1, -1, 3, 1, -1]
    assert one_way.static_back.tolist() == [5, 5, -1, 4, -1] and len(one_way.graph.ids) == 0
    top_t, top_s = np.array([[0, 2, 5]]), np.array([[0, 1, 2]])
    assert one_way.dynamic(top_t, top_s).tolist() == [[0, 2, 1]]
    assert one_way.reverse.dynamic(top_s, top_t).tolist() == [[5, 5, -1]]
    assert one_way.reverse.dynamic(top_s, top_t[:, :2]).tolist() == [[-1, -1, -1]]  # the teacher's mass is unknown
    for device_way, a, b in ((one_way, top_t, top_s), (one_way.reverse, top_s, top_t)):
        on_device = dynamic_on_device(device_way, torch.from_numpy(a), torch.from_numpy(b))
        assert on_device.tolist() == device_way.dynamic(a, b).tolist()


def test_the_end_of_turn_comes_before_eos_where_one_token_is_both() -> None:
    student = vocabulary(None, None, end_of_turn=1, eos=0)
    teacher = vocabulary(None, end_of_turn=0, eos=0)
    assert exact_map(student, teacher).tolist() == [1]


def test_dynamic_map_by_hand() -> None:
    student = vocabulary(b"hello", b"hallo", b"yelp", b" world", b"12", b"!!", b"colour")
    teacher = vocabulary(b"hello", b"helo", b"world1", b"13", b"?!", b"color", b"word")
    one_way = build_vocab_map(student, teacher)
    live = np.array([[2, 1, 0, 3, 4, 5]])
    # hello is exact, helo ~ hallo (never hello, which is taken), word ~ world; digits and punctuation do not bend
    assert one_way.dynamic(np.array([[0, 1, 2, 3, 4, 5, 6]]), live).tolist() == [[0, 1, -1, -1, -1, -1, 3]]
    paper = build_vocab_map(student, teacher, protect=False)
    assert paper.dynamic(np.array([[3, 4]]), live).tolist() == [[4, 5]]
    back = one_way.reverse
    assert back.dynamic(np.array([[0, 1, 6]]), np.array([[1, 5]])).tolist() == [[-1, 1, 5]]
    assert back.dynamic(np.array([[0]]), np.array([[1, 0]])).tolist() == [[0]]
    assert back.reverse.dynamic(np.array([[0]]), np.array([[3]])).tolist() == [[0]]


def test_the_threshold_is_strict_and_ties_go_to_the_better_rank() -> None:
    student = vocabulary(b"abcde", b"abcxy", b"abxyz")
    teacher = vocabulary(b"abcdx")  # 1/10, 2/10, 3/10 apart
    tops = np.array([[0]]), np.array([[2]])
    assert build_vocab_map(student, teacher, 0.3).dynamic(*tops).tolist() == [[-1]]
    assert build_vocab_map(student, teacher, 0.31).dynamic(*tops).tolist() == [[2]]
    student = vocabulary(b"abcda", b"abcdb")
    for order in ([0, 1], [1, 0]):
        assert build_vocab_map(student, teacher).dynamic(np.array([[0]]), np.array([order])).tolist() == [[order[0]]]


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_bad_thresholds(bad: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        build_vocab_map(vocabulary(b"a"), vocabulary(b"a"), bad)


@settings(max_examples=120, deadline=None)
@given(PIECES, PIECES, st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0]), st.booleans(), st.integers(0, 2**31))
def test_dynamic_is_the_slow_twin(
    pieces_s: list[bytes | None], pieces_t: list[bytes | None], threshold: float, protect: bool, seed: int
) -> None:
    """Duplicate bytes, holes, broken UTF-8; ids beyond the vocabularies, padding and repetitions among the top ids."""
    student, teacher = Vocabulary(tuple(pieces_s)), Vocabulary(tuple(pieces_t))
    one_way = build_vocab_map(student, teacher, threshold, protect)
    assert one_way.exact.tolist() == slow_twins.exact_map(pieces_s, pieces_t)
    random = np.random.default_rng(seed)
    top_t = np.stack([random.permutation(np.arange(-1, len(pieces_t) + 3)) for _ in range(3)])[:, :9]
    top_s = np.stack([random.permutation(np.arange(-1, len(pieces_s) + 3)) for _ in range(3)])[:, :7]
    top_t[2], top_s[2] = random.choice(top_t[2], top_t.shape[1]), random.choice(top_s[2], top_s.shape[1])  # named twice
    for each, a, b, x, y in (
        (one_way, top_t, top_s, pieces_t, pieces_s),
        (one_way.reverse, top_s, top_t, pieces_s, pieces_t),
    ):
        exact = slow_twins.exact_map(y, x)
        wanted = [
            slow_twins.dynamic(p, q, exact, x, y, threshold, protect, each.live_only)
            for p, q in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert each.dynamic(a, b).tolist() == wanted
        assert each.dynamic(torch.from_numpy(a), torch.from_numpy(b)).tolist() == wanted
        assert dynamic_on_device(each, torch.from_numpy(a), torch.from_numpy(b)).tolist() == wanted
        assert [one.tolist() for one in each.both(a, b)] == [wanted, each.reverse.dynamic(b, a).tolist()]
    assert one_way.reverse.reverse is one_way


def test_the_device_path_in_chunks_and_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    one_way = build_vocab_map(vocabulary(b"abcd", b"abce"), vocabulary(b"abcf", b"abcd"))
    top_t, top_s = torch.tensor([[0, 1]] * 5), torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    monkeypatch.setattr(module, "PAIRS_PER_CHUNK", 8)
    assert dynamic_on_device(one_way, top_t, top_s).tolist() == one_way.dynamic(top_t, top_s).tolist() == [[1, 0]] * 5
    for empty in (top_t[:0], top_t[:, :0]):
        assert dynamic_on_device(one_way, empty, top_s[: len(empty)]).shape == empty.shape
    assert dynamic_on_device(one_way, top_t, top_s[:, :0]).tolist() == [[-1, 0]] * 5
    assert dynamic_on_device(one_way.reverse, top_t, top_s[:, :0]).tolist() == [[-1, -1]] * 5
    assert one_way.images(torch.tensor([[0, 1], [-1, 9]])).tolist() == [[-1, 0], [-1, -1]]


def test_shapes_that_do_not_fit() -> None:
    one_way = build_vocab_map(vocabulary(b"a"), vocabulary(b"a"))
    with pytest.raises(ValueError, match="top ids must be"):
        one_way.dynamic(np.zeros((2, 1), int), np.zeros((3, 1), int))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abcdeé知", min_size=1, max_size=9), unique=True),
    st.lists(st.text("abcdeé知", min_size=1, max_size=9), unique=True),
    st.sampled_from([0.0, 0.15, 0.3, 0.5, 0.9]),
)
def test_near_texts_are_those_of_cdist(texts_a: list[str], texts_b: list[str], threshold: float) -> None:
    check_near_texts(texts_a, texts_b, threshold)


def test_near_texts_longer_than_a_machine_word() -> None:
    base = "".join(chr(0x100 + i) for i in range(70))
    check_near_texts([base, base[:63], base[:64], base[:65], "x" * 64], [base[1:], base[:64] + "yz", "x" * 66], 0.3)


def check_near_texts(texts_a: Sequence[str], texts_b: Sequence[str], threshold: float) -> None:
    wanted = {}
    if texts_a and texts_b:
        edits = cdist(texts_a, texts_b, scorer=Levenshtein.distance, dtype=np.int32)
        for i, j in np.ndindex(edits.shape):
            distance = edits[i, j] / (len(texts_a[i]) + len(texts_b[j]))
            if distance < threshold:
                wanted[i, j] = np.float32(distance)
    found = list(zip(*near_texts(texts_a, texts_b, threshold), strict=True))
    assert len(found) == len(wanted)
    assert {(int(i), int(j)): distance for i, j, distance in found} == wanted


def test_most_edits() -> None:
    lengths = np.arange(1, 400)
    for threshold in (0.0, 0.1, 0.3, 0.7, 1.0):
        wanted = [max((e for e in range(n + 1) if e / n < threshold), default=-1) for n in lengths]
        assert most_edits(lengths, threshold).tolist() == wanted


def test_save_and_load(tmp_path: Path) -> None:
    one_way = build_vocab_map(vocabulary(b"abcd", b"abce", b"x"), vocabulary(b"abcf", b"abcd"), protect=False)
    path = tmp_path / "new" / "map.npz"
    one_way.save(path)
    first = path.read_bytes()
    again = VocabMap.load(path)
    again.save(path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["map.npz"]
    top_t, top_s = np.array([[0, 1]]), np.array([[0, 1, 2]])
    assert again.dynamic(top_t, top_s).tolist() == one_way.dynamic(top_t, top_s).tolist()
    assert again.reverse.dynamic(top_s, top_t).tolist() == one_way.reverse.dynamic(top_s, top_t).tolist()
    assert (again.threshold, again.protect, again.fingerprint_t) == (0.3, False, one_way.fingerprint_t)
    one_way.reverse.save(path)
    assert VocabMap.load(path).live_only


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    build_vocab_map(vocabulary(b"a"), vocabulary(b"a")).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"map\.npz: not a readable vocabulary map"):
        VocabMap.load(path)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", 0)
    build_vocab_map(vocabulary(b"a"), vocabulary(b"a")).save(tmp_path / "map.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 0, not 2"):
        VocabMap.load(tmp_path / "map.npz")


def build_in_process(student: str, teacher: str, folder: str) -> None:
    assert len(cached_vocab_map(load_tokenizer(student), load_tokenizer(teacher), 0.3, True, folder).exact)


def test_the_cache_is_keyed_and_safe_when_several_ask(tmp_path: Path) -> None:
    student, teacher = str(tmp_path / "student"), str(tmp_path / "teacher")
    tiny.sentencepiece_tokenizer().save_pretrained(student)
    tiny.byte_level_tokenizer().save_pretrained(teacher)
    folder = tmp_path / "maps"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_in_process, args=(student, teacher, str(folder))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    (path,) = folder.iterdir()
    pair = load_tokenizer(student), load_tokenizer(teacher)
    made = path.stat().st_mtime_ns
    one_way = cached_vocab_map(*pair, 0.3, True, folder)
    assert path.stat().st_mtime_ns == made and (one_way.name_s, one_way.name_t) == (student, teacher)
    build_vocab_map(*pair, twins="emitted").save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    others = {vocab_map_file(*pair, 0.2, True, folder), vocab_map_file(*pair, 0.3, False, folder)}
    others.add(vocab_map_file(pair[1], pair[0], 0.3, True, folder))
    assert len(others | {path}) == 4


def test_several_ask_for_a_map_of_real_size(real_data: Path, tmp_path: Path) -> None:
    """Whoever comes later reads a whole file or builds the same bytes: 32,000 x 50,257 ids, a million edges."""
    names = [str(real_data / "tokenizers" / name) for name in ("gpt2", "llama2")]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_in_process, args=(*names, str(tmp_path / "maps"))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (path,) = (tmp_path / "maps").iterdir()
    VocabMap.load(path).save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_map_on_a_gpu_waits_for_nothing() -> None:
    random = np.random.default_rng(0)
    words = [bytes(random.choice(list(b"abcd"), size=random.integers(3, 8)).tolist()) for _ in range(600)]
    one_way = build_vocab_map(Vocabulary(tuple(words[:300])), Vocabulary(tuple(words[300:])))
    top_t = torch.from_numpy(np.stack([random.permutation(310)[:50] for _ in range(40)]))
    top_s = torch.from_numpy(np.stack([random.permutation(310)[:60] for _ in range(40)]))
    on_gpu = top_t.cuda(), top_s.cuda()
    for each, (a, b), (x, y) in (
        (one_way, (top_t, top_s), on_gpu),
        (one_way.reverse, (top_s, top_t), on_gpu[::-1]),
    ):
        each.dynamic(x, y)  # moves the map there
        torch.cuda.set_sync_debug_mode("error")
        got = each.dynamic(x, y)
        torch.cuda.set_sync_debug_mode("default")
        assert got.cpu().tolist() == each.dynamic(a, b).tolist()
