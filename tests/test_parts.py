"""Parts and manifests under real faults: truncation, a full disk, kill -9."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm import parts


def _table(rows: int = 50, seed: int = 0) -> pa.Table:
    values = np.random.default_rng(seed).integers(0, 100, (rows, 4))
    return pa.table({"id": [f"{row:04d}" for row in range(rows)], "ids": pa.array(list(values), pa.list_(pa.int32()))})


def _run(code: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(parts.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    places = {
        "local": str(tmp_path / "shards"),
        "file": f"file://{tmp_path}/shards",
        "memory": f"memory://{tmp_path}/s",
    }
    return places[request.param]


def test_what_was_written_is_read_back(folder: str) -> None:
    written = [parts.write_part(folder, f"train-{n:05d}.parquet", _table(seed=n), row_group_size=16) for n in range(3)]
    manifest = parts.finish(folder, {"k": 4, "teacher": "Lehrer-ä"}, kind="shards", written=written[:1])
    assert manifest.parts == tuple(written)
    assert parts.read_manifest(folder, {"kind": "shards", "k": 4}) == manifest
    assert parts.verify(folder).fingerprint == manifest.fingerprint
    assert (manifest.rows, manifest.part("train-00002.parquet")) == (150, written[2])
    assert parts.read_part(folder, "train-00001.parquet", expect=written[1]).equals(_table(seed=1))
    assert parts.read_part(folder, "train-00001.parquet", ["id"]).column_names == ["id"]
    with parts.open_part(folder, "train-00002.parquet", expect=written[2]) as file:
        assert file.num_row_groups == 4
        assert file.read_row_group(1).equals(_table(seed=2).slice(16, 16))


def test_missing_parts_are_listed_in_order(folder: str) -> None:
    names = ["b.parquet", "a.parquet", "c.parquet"]
    assert parts.missing_parts(folder, names) == names
    parts.write_part(folder, "a.parquet", _table())
    assert parts.part_exists(folder, "a.parquet") and not parts.part_exists(folder, "b.parquet")
    assert parts.missing_parts(folder, names) == ["b.parquet", "c.parquet"]
    with pytest.raises(ValueError, match=r"2 parts are missing, the first is b\.parquet"):
        parts.finish(folder, {}, kind="shards", names=names)
    assert not parts.is_finished(folder)


def test_an_unfinished_stage_is_named(folder: str) -> None:
    parts.write_part(folder, "a.parquet", _table())
    with pytest.raises(parts.UnfinishedError, match="the corpus stage is unfinished"):
        parts.read_manifest(folder, {"kind": "corpus"})


def test_a_mismatch_names_key_and_both_values(folder: str) -> None:
    parts.write_part(folder, "a.parquet", _table())
    parts.finish(folder, {"k": 4}, kind="shards")
    with pytest.raises(ValueError, match="k is 4, expected 8"):
        parts.read_manifest(folder, {"k": 8})
    with pytest.raises(ValueError, match="revision is absent, expected 'main'"):
        parts.read_manifest(folder, {"revision": "main"})
    with pytest.raises(ValueError, match="kind is 'shards', expected 'corpus'"):
        parts.read_manifest(folder, {"kind": "corpus"})


@given(cuts=st.lists(st.integers(1, 49), max_size=6, unique=True), seed=st.integers(0, 5))
def test_equal_tables_are_equal_files_however_they_were_built(
    cuts: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    bounds = [0, *sorted(cuts), 50]
    whole = _table(seed=seed)
    pieces = pa.concat_tables([whole.slice(a, b - a) for a, b in itertools.pairwise(bounds)])
    options = {"row_group_size": 16, "use_dictionary": ["id"]}
    parts.write_part(str(folder), "a.parquet", whole, **options)
    parts.write_part(str(folder), "b.parquet", pieces, **options)
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()


def test_the_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    prints = []
    for place, seed, meta in [("a", 0, {"k": 1}), ("b", 0, {"k": 1}), ("c", 1, {"k": 1}), ("d", 0, {"k": 2})]:
        parts.write_part(str(tmp_path / place), "x.parquet", _table(seed=seed))
        prints.append(parts.finish(str(tmp_path / place), meta, kind="corpus").fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_truncated_part_is_refused_with_both_sizes(tmp_path: Path) -> None:
    part = parts.write_part(str(tmp_path), "a.parquet", _table())
    parts.finish(str(tmp_path), {}, kind="shards")
    file = tmp_path / "a.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    expected = rf"a\.parquet: {part.bytes - 100} bytes, the manifest says {part.bytes}"
    for read in (
        lambda: parts.verify(str(tmp_path)),
        lambda: parts.read_part(str(tmp_path), "a.parquet", expect=part),
        lambda: parts.open_part(str(tmp_path), "a.parquet", expect=part),
    ):
        with pytest.raises(ValueError, match=expected):
            read()
    for read in (parts.read_part, parts.open_part):
        with pytest.raises(ValueError, match=r"a\.parquet: no whole Parquet file"):
            read(str(tmp_path), "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no whole Parquet file"):
        parts.finish(str(tmp_path), {}, kind="shards")


def test_a_flipped_bit_is_refused_with_both_checksums(tmp_path: Path) -> None:
    part = parts.write_part(str(tmp_path), "a.parquet", _table())
    parts.finish(str(tmp_path), {}, kind="shards")
    file = tmp_path / "a.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    for read in (lambda: parts.verify(str(tmp_path)), lambda: parts.read_part(str(tmp_path), "a.parquet", expect=part)):
        with pytest.raises(ValueError, match=rf"sha256 is [0-9a-f]{{64}}, the manifest says {part.sha256}"):
            read()


def test_a_broken_manifest_or_another_schema_is_refused(tmp_path: Path) -> None:
    parts.write_part(str(tmp_path), "a.parquet", _table())
    parts.finish(str(tmp_path), {}, kind="shards")
    file = tmp_path / parts.MANIFEST
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version is 99, this version reads 2"):
        parts.read_manifest(str(tmp_path))
    file.write_text(json.dumps(fields)[:40])
    with pytest.raises(ValueError, match="not a manifest"):
        parts.read_manifest(str(tmp_path))


def test_a_missing_part_and_a_bad_name_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="no such part"):
        parts.read_part(folder, "a.parquet")
    for name in ("a", ".a.parquet", "b/a.parquet"):
        with pytest.raises(ValueError, match="a part's name"):
            parts.write_part(folder, name, _table())


def test_a_full_disk_leaves_nothing_and_the_error_travels(tmp_path: Path) -> None:
    code = f"""
        import resource, pyarrow as pa, numpy as np
        from cdm import parts
        table = pa.table({{"x": np.random.default_rng(0).integers(0, 1 << 60, 100_000)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        parts.write_part({str(tmp_path)!r}, "a.parquet", table)
    """
    done = _run(code)
    assert done.returncode == 1 and "OSError: [Errno 27]" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["half written", "written, not renamed"])
def test_kill_9_leaves_no_part_and_the_next_run_cleans_up(tmp_path: Path, moment: str) -> None:
    # The limit's own signal, back at its default action, kills inside write(2): a death half-way that needs no timing.
    fault = {
        "half written": "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
        "written, not renamed": "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)",
    }[moment]
    code = "\n".join(
        [
            "import os, resource, signal, pyarrow as pa, numpy as np",
            "from cdm import parts",
            "table = pa.table({'x': np.random.default_rng(0).integers(0, 1 << 60, 100_000)})",
            fault,
            f"parts.write_part({str(tmp_path)!r}, 'a.parquet', table)",
        ]
    )
    done = _run(code)
    assert done.returncode == -(signal.SIGXFSZ if moment == "half written" else signal.SIGKILL), done.stderr
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".tmp")
    assert parts.missing_parts(str(tmp_path), ["a.parquet"]) == ["a.parquet"]
    parts.write_part(str(tmp_path), "a.parquet", _table())
    assert parts.finish(str(tmp_path), {}, kind="shards").names == ["a.parquet"]
    assert sorted(os.listdir(tmp_path)) == ["a.parquet", "manifest.json", "parts.parquet"]
