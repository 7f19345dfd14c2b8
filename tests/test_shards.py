from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdm import parts, shards
from cdm.records import ScoredDocument

IDENTITY = {"teacher": "t", "teacher_identity": "abc", "k": 5, "max_length": 64}
NAME = "train-00000.parquet"


def scored(n_documents: int, k: int = 5, seed: int = 0, *, ragged: bool = False) -> list[ScoredDocument]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n_documents):
        n = int(rng.integers(1, 40))
        logp = -np.sort(rng.gamma(3, 2, (n, k)).astype(np.float16), axis=1)
        columns = [rng.random(n, np.float32) for _ in range(3)]
        ids, ends = rng.integers(0, 150_000, n).astype(np.int32), np.cumsum(rng.integers(0, 5, n)).astype(np.int32)
        topk_ids = rng.integers(0, 150_000, (n, k)).astype(np.int32)
        gone = np.arange(k) >= rng.integers(1, k + 1, n)[:, None] if ragged else np.zeros((n, k), bool)
        topk_ids[gone], logp[gone] = -1, -np.inf
        out.append(ScoredDocument(f"d{i:03}", bool(i % 3 == 0), ids, ends, *columns, topk_ids, logp))
    return out


def write(folder: Path | str, documents: list[ScoredDocument], name: str = NAME) -> parts.Part:
    return shards.write_scores(str(folder), name, documents, quarantined=[("q", "why")], identity=IDENTITY)


def assert_equal(read: list[ScoredDocument], written: list[ScoredDocument]) -> None:
    assert len(read) == len(written)
    for one, two in zip(read, written, strict=True):
        for field in fields(ScoredDocument):
            left, right = getattr(one, field.name), getattr(two, field.name)
            np.testing.assert_array_equal(left, right)
            if isinstance(right, np.ndarray):
                assert left.dtype == right.dtype and left.shape == right.shape


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 40), k=st.integers(1, 9), seed=st.integers(0, 99), ragged=st.booleans())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, n: int, k: int, seed: int, ragged: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = scored(n, k, seed, ragged=ragged)
    write(folder, documents)
    assert_equal(shards.read_scores(str(folder), NAME), documents)


def test_row_groups_can_be_read_alone_and_in_any_order(tmp_path: Path) -> None:
    documents = scored(40)
    write(tmp_path, documents)
    assert_equal(shards.read_scores(str(tmp_path), NAME, row_groups=[2, 0]), documents[32:] + documents[:16])


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_shards_live_at_any_url(tmp_path: Path, scheme: str) -> None:
    folder = f"{scheme}://{tmp_path}/shards"
    documents = scored(20, ragged=True)
    part = write(folder, documents)
    assert part == write(tmp_path / "local", documents)
    manifest = shards.finish_shards(folder, [NAME], IDENTITY)
    assert shards.open_shards(folder, IDENTITY) == manifest and parts.verify(folder).parts == (part,)
    assert_equal(shards.read_scores(folder, NAME, row_groups=[1]), documents[16:])


def test_a_part_written_twice_is_the_same_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a", scored(20))
    second = write(tmp_path / "b", scored(20))
    assert first == second
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_the_columns_of_numbers_are_split_by_byte(tmp_path: Path) -> None:
    write(tmp_path, scored(20))
    group = pq.read_metadata(tmp_path / NAME).row_group(0)
    columns = {group.column(i).path_in_schema.split(".")[0]: group.column(i) for i in range(group.num_columns)}
    for name in ("ids_t", "logp_t", "entropy_t"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings and columns[name].compression == "ZSTD"


def test_the_manifest_counts_and_the_quarantine_is_gathered(tmp_path: Path) -> None:
    documents = scored(20)
    write(tmp_path, documents[:12], "train-00000.parquet")
    write(tmp_path, documents[12:], "test-00000.parquet")
    names = ["train-00000.parquet", "test-00000.parquet"]
    manifest = shards.finish_shards(str(tmp_path), names, IDENTITY)
    assert manifest == shards.open_shards(str(tmp_path), IDENTITY)
    assert manifest.names == names
    tokens = sum(len(document.ids_t) for document in documents)
    counts = {"documents": 20, "tokens": tokens, "truncated": 7, "quarantined": 2}
    assert manifest.meta == IDENTITY | counts
    rows = parts.read_part(str(tmp_path), shards.QUARANTINE).to_pylist()
    assert rows == [{"part": name, "id": "q", "reason": "why"} for name in names]
    assert parts.verify(str(tmp_path)) == manifest


def test_a_mismatch_names_both_values(tmp_path: Path) -> None:
    write(tmp_path, scored(3))
    with pytest.raises(ValueError, match="k is 5, expected 6"):
        shards.finish_shards(str(tmp_path), [NAME], IDENTITY | {"k": 6})
    shards.finish_shards(str(tmp_path), [NAME], IDENTITY)
    with pytest.raises(ValueError, match="teacher_identity is 'abc', expected 'other'"):
        shards.open_shards(str(tmp_path), {"teacher_identity": "other"})


def test_an_unfinished_folder_and_a_truncated_part_are_refused(tmp_path: Path) -> None:
    write(tmp_path, scored(3))
    with pytest.raises(ValueError, match="unfinished"):
        shards.open_shards(str(tmp_path))
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=NAME):
        shards.read_scores(str(tmp_path), NAME)
    with pytest.raises(ValueError, match=NAME):
        shards.finish_shards(str(tmp_path), [NAME], IDENTITY)


def test_another_parquet_file_is_no_shard(tmp_path: Path) -> None:
    parts.write_part(str(tmp_path), NAME, shards.to_table(scored(2)).replace_schema_metadata(None))
    with pytest.raises(ValueError, match="no scores of a teacher"):
        shards.read_footer(str(tmp_path), NAME)


def test_another_schema_version_is_refused_with_both(tmp_path: Path) -> None:
    table = shards.to_table(scored(2))
    footer = {b"cdm.scores": b'{"schema_version": 1, "identity": {}, "tokens": 0, "truncated": 0, "quarantined": []}'}
    parts.write_part(str(tmp_path), NAME, table.replace_schema_metadata(footer | table.schema.metadata))
    for read in (shards.read_footer, shards.read_scores):
        with pytest.raises(ValueError, match=f"{NAME}: schema_version is 1, this version reads 2"):
            read(str(tmp_path), NAME)
