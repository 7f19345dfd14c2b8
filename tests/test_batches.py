"""Aligned parts, the order of rows, micro-batches and collating, on real (tiny) tokenizers and scores."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import parts, shards
from cdm.alignment import align
from cdm.batches import AlignedData, align_part, collate, micro_batches, step_rows, token_bytes
from cdm.corpus import documents_of
from cdm.grouping import Grouping
from cdm.pieces import divide
from cdm.records import Document, ScoredDocument
from cdm.shards import ROW_GROUP_DOCUMENTS
from cdm.tokenizers import Tokenizer, load_tokenizer
from tests import tiny

K = 4
DOCUMENTS = 40

NAME = "train-00000.parquet"


def scores(
    document: Document, tokenizer: Tokenizer, rng: np.random.Generator, cut: int | None = None
) -> ScoredDocument:
    """What a teacher with random rows says of a document, or of its first `cut` tokens."""
    ids, ends = tokenizer.encode_with_ends(document.response)
    if cut is None:
        ids = np.append(ids, tokenizer.end_of_turn_id).astype(np.int32)
        ends = np.append(ends, ends[-1] if len(ends) else 0).astype(np.int32)
    ids, ends = ids[:cut], ends[:cut]
    topk = np.stack([rng.permutation(tokenizer.vocab_size)[:K] for _ in ids]).astype(np.int32)
    logp = -np.sort(rng.random((len(ids), K)), axis=1).astype(np.float16) - np.float16(1)
    plain = rng.random((3, len(ids))).astype(np.float32)
    return ScoredDocument(document.id, cut is not None, ids, ends, -plain[0], plain[1], plain[2], topk, logp)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A corpus part, its shard part (one document is missing, one was cut) and the aligned part, on disk."""
    from cdm.corpus import table_of

    root = tmp_path_factory.mktemp("aligned")
    tokenizer_t = load_tokenizer(tiny.tiny_teacher(root / "teacher"))
    tokenizer_s = load_tokenizer(tiny.tiny_student(root / "student"))
    documents = tiny.documents(DOCUMENTS)
    name, folders = NAME, {kind: str(root / kind) for kind in ("corpus", "shards", "aligned")}
    parts.write_part(folders["corpus"], name, table_of(documents), row_group_size=ROW_GROUP_DOCUMENTS)
    rng = np.random.default_rng(0)
    scored = [scores(d, tokenizer_t, rng, cut=5 if i == 7 else None) for i, d in enumerate(documents) if i != 3]
    quarantined = [(documents[3].id, "for the test")]
    shards.write_scores(folders["shards"], name, scored, quarantined=quarantined, identity={})
    table, counts = align_part(
        folders["corpus"], [folders["shards"]], name, Grouping("exact", tokenizer_s), max_length=1024
    )
    parts.write_part(folders["aligned"], name, table, row_group_size=ROW_GROUP_DOCUMENTS)
    parts.finish(folders["aligned"], {}, kind="aligned")
    return {"folders": folders, "documents": documents, "counts": counts, "s": tokenizer_s, "t": tokenizer_t}


def data(world: dict, teachers: int = 1) -> AlignedData:
    return AlignedData.open(world["folders"]["aligned"], [world["folders"]["shards"]] * teachers, "train")


def test_every_group_spells_the_same_bytes_on_both_sides(world: dict) -> None:
    rows = [data(world).row(number) for number in range(DOCUMENTS)]
    assert [row.id for row in rows] == [document.id for document in world["documents"]]
    checked = 0
    for row in rows:
        scored, groups = row.scores[0], row.alignments[0]
        assert (groups.bounds_s[0], groups.bounds_t[0]) == (0, 0)
        if scored is None:
            continue
        for s0, s1, t0, t1 in zip(
            groups.bounds_s[:-1], groups.bounds_s[1:], groups.bounds_t[:-1], groups.bounds_t[1:], strict=True
        ):
            spelled_s = b"".join(world["s"].token_bytes(int(i)) or b"" for i in row.ids_s[s0:s1])
            spelled_t = b"".join(world["t"].token_bytes(int(i)) or b"" for i in scored.ids_t[t0:t1])
            assert spelled_s == spelled_t or (s0 == 0 and spelled_s == b" " + spelled_t)  # the dummy space
            checked += 1
    assert checked == world["counts"]["groups"] > 200


def test_whole_documents_are_covered_and_end_in_a_group_of_their_own(world: dict) -> None:
    row = data(world).row(5)
    groups = row.alignments[0]
    assert groups.bounds_s[-1] == len(row.ids_s) and groups.bounds_t[-1] == len(row.scores[0].ids_t)
    assert groups.bounds_s[-1] - groups.bounds_s[-2] == 1 and row.ids_s[-1] == world["s"].end_of_turn_id


def test_a_document_without_scores_is_still_taught(world: dict) -> None:
    row = data(world).row(3)
    assert row.scores == (None,) and len(row.alignments[0].bounds_s) == 1 and len(row.ids_s) > 1


def test_a_cut_document_pairs_what_both_sides_have(world: dict) -> None:
    row = data(world).row(7)
    groups, scored = row.alignments[0], row.scores[0]
    assert scored.truncated and 0 < groups.bounds_t[-1] <= 5 and groups.bounds_s[-1] < len(row.ids_s)
    assert row.ends_s[groups.bounds_s[-1] - 1] == scored.ends_t[groups.bounds_t[-1] - 1]


def test_long_responses_are_cut_for_the_student_with_their_groups(world: dict) -> None:
    folders = world["folders"]
    table, counts = align_part(
        folders["corpus"], [folders["shards"]], "train-00000.parquet", Grouping("exact", world["s"]), max_length=40
    )
    assert counts["cut"] > 0 and max(table["tokens_s"].to_pylist()) <= 40
    for ids, bounds in zip(table["ids_s"].to_pylist(), table["bounds_s0"].to_pylist(), strict=True):
        assert bounds[-1] <= len(ids)


def test_prompts_that_leave_no_room_are_left_out_and_counted(world: dict) -> None:
    folders = world["folders"]
    table, counts = align_part(
        folders["corpus"], [], "train-00000.parquet", Grouping("exact", world["s"]), max_length=3
    )
    assert counts["prompt_too_long"] == DOCUMENTS and table.num_rows == 0


@pytest.mark.parametrize("limit", [1, ROW_GROUP_DOCUMENTS - 1, ROW_GROUP_DOCUMENTS, DOCUMENTS - 1, 10 * DOCUMENTS])
def test_with_a_limit_the_first_rows_are_all_there_is(world: dict, limit: int) -> None:
    folders, kept = world["folders"], min(limit, DOCUMENTS)
    limited = AlignedData.open(folders["aligned"], [folders["shards"]], "train", limit)
    assert len(limited) == kept == sum(rows for *_, rows in limited.blocks)
    assert [limited.row(number).id for number in range(kept)] == [d.id for d in world["documents"][:kept]]
    epoch = np.concatenate(list(islice(step_rows(limited, seed=0, batch_tokens=1), kept)))
    assert sorted(epoch) == list(range(kept))


def test_steps_are_a_pure_function_of_seed_and_read_each_row_once_an_epoch(world: dict) -> None:
    source = data(world)
    first = list(islice(step_rows(source, seed=1, batch_tokens=200), 60))
    again = list(islice(step_rows(data(world), seed=1, batch_tokens=200), 60))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    other = list(islice(step_rows(source, seed=2, batch_tokens=200), 60))
    assert not all(len(a) == len(b) and (a == b).all() for a, b in zip(first, other, strict=True))
    flat = np.concatenate(first)
    epochs = len(flat) // DOCUMENTS
    assert epochs >= 2
    for epoch in range(epochs):
        assert sorted(flat[epoch * DOCUMENTS : (epoch + 1) * DOCUMENTS]) == list(range(DOCUMENTS))
    lengths = source.sizes["tokens_s"]
    assert all(lengths[rows].sum() <= 200 or len(rows) == 1 for rows in first)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=60),
    world_size=st.integers(1, 5),
    budget=st.integers(20, 400),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], world_size: int, budget: int) -> None:
    sizes = np.array(lengths)
    chunks = micro_batches(np.arange(len(sizes)), sizes, world=world_size, micro_batch_tokens=budget)
    assert len(chunks) % world_size == 0
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(sizes)))
    for chunk in chunks:
        assert len(chunk) < 2 or len(chunk) * sizes[chunk].max() <= budget


def test_collate_asks_each_row_for_the_token_it_predicts(world: dict) -> None:
    rows = [data(world).row(number) for number in (2, 3, 7)]
    batch = collate(rows, top_k=K)
    flat = batch.input_ids.reshape(-1)
    assert torch.equal(flat[batch.rows_s + 1], batch.targets_s)
    assert batch.targets_s.tolist() == [int(i) for row in rows for i in row.ids_s]
    assert batch.attention_mask.sum().item() == sum(len(row.prompt_s) + len(row.ids_s) for row in rows)
    teacher = batch.teachers[0]
    assert len(teacher.groups_s) == sum(len(row.alignments[0].bounds_s) - 1 for row in rows)
    g = len(rows[0].alignments[0].bounds_s) - 1  # the third document's first group: its rows follow the others'
    assert teacher.groups_s[g, 0] == len(rows[0].ids_s) + len(rows[1].ids_s)
    assert teacher.groups_t[g, 0] == len(rows[0].scores[0].ids_t)
    assert teacher.topk_ids_t.shape == (len(teacher.ids_t), K)


def test_collating_all_targets_teaches_the_prompt_too(world: dict) -> None:
    rows = [data(world).row(number) for number in (2, 4)]
    batch = collate(rows, top_k=K, targets="all")
    expected = [int(i) for row in rows for i in np.concatenate([row.prompt_s, row.ids_s])[1:]]
    assert batch.targets_s.tolist() == expected


def test_an_empty_batch_asks_nothing(world: dict) -> None:
    batch = collate([], top_k=K)
    assert batch.input_ids.shape == (1, 1) and len(batch.rows_s) == 0 and batch.teachers == ()


def test_token_bytes_sum_to_the_text(world: dict) -> None:
    row = data(world).row(1)
    sizes = token_bytes([row])
    assert sizes.sum() == len(world["documents"][1].response.encode()) and sizes[-1] == 0


def test_a_split_without_documents_says_so(world: dict) -> None:
    with pytest.raises(ValueError, match="no documents in the validation split"):
        AlignedData.open(world["folders"]["aligned"], [], "validation")


def test_the_corpus_comes_back_as_it_went_in(world: dict) -> None:
    assert documents_of(parts.read_part(world["folders"]["corpus"], "train-00000.parquet")) == world["documents"]


# --- groups by warping -------------------------------------------------------------------------------------------


def test_warped_groups_are_those_of_the_alignment_and_stay_in_the_room(world: dict) -> None:
    folders, entropies = world["folders"], {}
    for document in world["documents"]:
        ids, _ = world["s"].encode_with_ends(document.response)
        entropies[document.id] = np.random.default_rng(len(ids)).random(len(ids) + 1)
    scored = {doc.id: doc for doc in shards.read_scores(folders["shards"], NAME)}
    for method, own in (("dtw", entropies), ("dtw_unweighted", None)):
        grouping = Grouping(method, world["s"], (world["t"],), own)
        table, _ = align_part(folders["corpus"], [folders["shards"]], NAME, grouping, max_length=60)
        assert table.num_rows > 20
        for row in table.to_pylist():
            if row["row_t0"] < 0 or scored[row["id"]].truncated:
                continue
            document = next(d for d in world["documents"] if d.id == row["id"])
            ids, ends = world["s"].encode_with_ends(document.response)
            ids, ends = np.append(ids, world["s"].end_of_turn_id), np.append(ends, ends[-1] if len(ends) else 0)
            teacher = scored[row["id"]]
            expected = align(
                method="dtw", ends_s=ends, ends_t=teacher.ends_t,
                texts_s=world["s"].texts(ids), texts_t=world["t"].texts(teacher.ids_t),
                entropy_s=own and own[row["id"]], entropy_t=own and teacher.entropy_t,
            )  # fmt: skip
            kept = [b for b in expected.bounds_s.tolist() if b <= 60 - len(row["prompt_s"])]
            assert row["bounds_s0"] == kept
            assert row["bounds_t0"] == expected.bounds_t[: len(kept)].tolist()


def test_a_document_without_entropies_is_not_warped(world: dict) -> None:
    grouping = Grouping("dtw", world["s"], (world["t"],), {})
    table, counts = align_part(world["folders"]["corpus"], [world["folders"]["shards"]], NAME, grouping, max_length=60)
    assert counts["groups"] == 0 and table.num_rows > 20


def test_whole_documents_are_divided_between_documents_only(world: dict) -> None:
    aligned = data(world)
    rows = [aligned.row(number) for number in range(6)]
    batch = collate(rows, top_k=None, whole_documents=True)
    lengths = [len(row.ids_s) for row in rows]
    assert batch.cuts[:, 0].tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.documents_s.tolist() == np.repeat(np.arange(6), lengths).tolist()
    pieces = divide(batch, 1)
    assert [len(set(piece.documents_s.tolist())) for piece in pieces] == [1] * 6
    assert batch.teachers[0].topk_ids_t.shape[1] == K, "no top_k: all that the teacher stored"
