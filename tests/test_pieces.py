"""Dividing a batch: pieces cover everything once, in order, and cut no group of any teacher."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm.pieces import cuts, divide
from cdm.records import AlignedBatch, TeacherRows

SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=6)
# A document: its groups with each of two teachers, and rows of either side that are in no group at its end.
DOCUMENT = st.tuples(SIZES, SIZES, st.integers(0, 3), st.integers(0, 2))


def batch_of(documents: list) -> AlignedBatch:
    lengths = [max(sum(s for s, _ in groups) for groups in (a, b)) + more for a, b, more, _ in documents]
    rows = sum(lengths)
    teachers = tuple(
        teacher_of([(d[k], length, d[3]) for d, length in zip(documents, lengths, strict=True)]) for k in (0, 1)
    )
    none = torch.zeros(1, 1, dtype=torch.long)
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    ids = torch.arange(rows)
    return AlignedBatch(none, none, ids, ids + 100, of, teachers, cuts(rows, teachers))


def teacher_of(documents: list) -> TeacherRows:
    groups_s, groups_t = [], []
    start_s = start_t = 0
    for sizes, length, more in documents:
        at_s, at_t = start_s, start_t
        for size_s, size_t in sizes:
            groups_s.append((at_s, at_s + size_s))
            groups_t.append((at_t, at_t + size_t))
            at_s, at_t = at_s + size_s, at_t + size_t
        start_s, start_t = start_s + length, at_t + more
    bounds = [torch.tensor(groups, dtype=torch.long).view(-1, 2) for groups in (groups_s, groups_t)]
    ids = torch.arange(start_t)
    return TeacherRows(*bounds, ids, ids.float(), ids[:, None], ids[:, None].float())


@settings(max_examples=200, deadline=None)
@given(st.lists(DOCUMENT, max_size=5), st.integers(1, 12))
def test_pieces_cover_everything_once_and_cut_no_group(documents: list, rows: int) -> None:
    batch = batch_of(documents)
    total = len(batch.rows_s)
    inside = {row for t in batch.teachers for a, b in t.groups_s.tolist() for row in range(a + 1, b)}
    assert batch.cuts[:, 0].tolist() == [row for row in range(total + 1) if row not in inside]
    pieces = divide(batch, rows)
    assert [p.start for p in pieces] == [0, *(p.end for p in pieces)][: len(pieces)]
    assert not pieces or pieces[-1].end == total
    assert all(p.start < p.end and p.targets_s.tolist() == list(range(100 + p.start, 100 + p.end)) for p in pieces)
    if not inside:
        assert all(p.end - p.start <= rows for p in pieces)
    for k, whole in enumerate(batch.teachers):
        found_s, found_t = [], []
        for piece in pieces:
            part = piece.teachers[k]
            found_s += (part.groups_s + piece.start).tolist()
            found_t += [part.ids_t[a:b].tolist() for a, b in part.groups_t.tolist()]
            assert all(0 <= a < b <= piece.end - piece.start for a, b in part.groups_s.tolist())
            assert part.ids_t.float().equal(part.logp_t) and part.topk_ids_t[:, 0].equal(part.ids_t)
        assert found_s == whole.groups_s.tolist()
        assert found_t == [list(range(a, b)) for a, b in whole.groups_t.tolist()]


def test_one_group_longer_than_a_piece_stays_whole() -> None:
    batch = batch_of([([(4, 1), (1, 1), (1, 3)], [], 0, 0)])
    assert [(p.start, p.end) for p in divide(batch, 2)] == [(0, 4), (4, 6)]
    assert divide(batch_of([]), 5) == []
