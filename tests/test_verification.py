"""`cdm verify` on a real tiny storage folder: what is whole passes, and each kind of damage is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cdm import parts, shards
from cdm.cli import app
from cdm.corpus import read_documents, table_of
from cdm.models import model_identity
from cdm.records import ScoredDocument
from cdm.teacher import TeacherScorer
from cdm.verification import row_faults, verify_folder
from tests import tiny

NAMES = ["train-00000.parquet", "train-00001.parquet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with a corpus of two parts, its teacher and the teacher's scores."""
    root = tmp_path_factory.mktemp("verify")
    documents = tiny.documents(24)
    for name, some in zip(NAMES, (documents[:20], documents[20:]), strict=True):
        parts.write_part(str(root / "corpus" / "c"), name, table_of(some), row_group_size=16)
    corpus = parts.finish(str(root / "corpus" / "c"), {}, kind="corpus")
    teacher = tiny.tiny_teacher(root / "models" / "tiny")
    options = {"type": "transformers", "dtype": "float32", "batch_tokens": 512}
    scorer = TeacherScorer(teacher, engine=options, top_k=12, top_mass=0.9, max_length=96)
    identity = {
        **{"teacher": "tiny", "teacher_identity": model_identity(teacher), "tokenizer_t": "x", "dtype": "float32"},
        **{"k": 12, "top_mass": 0.9, "max_length": 96, "corpus": corpus.fingerprint},
    }
    folder = str(root / "shards" / "s")
    for name in NAMES:
        scored, quarantined = scorer(read_documents(str(root / "corpus" / "c"), name))
        shards.write_scores(folder, name, scored, quarantined=quarantined, identity=identity)
    shards.finish_shards(folder, NAMES, identity)
    return root


@pytest.fixture
def storage(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "storage")
    return tmp_path / "storage"


def rewrite(storage: Path, change) -> None:  # type: ignore[no-untyped-def]
    """The first part with its first document changed, and a manifest that agrees with it."""
    folder = str(storage / "shards" / "s")
    identity = shards.read_footer(folder, NAMES[0]).identity
    documents = shards.read_scores(folder, NAMES[0])
    shards.write_scores(folder, NAMES[0], [change(documents[0]), *documents[1:]], quarantined=[], identity=identity)
    shards.finish_shards(folder, NAMES, identity)


def test_a_whole_folder_passes_and_a_sample_is_scored_again(storage: Path) -> None:
    for kind, name in (("shards", "s"), ("corpus", "c")):
        found = verify_folder(str(storage / kind / name), sample=2)
        assert found.faults == [] and found.checked["documents"] == 24
    assert verify_folder(str(storage / "shards" / "s"), sample=2).checked["scored again"] == "2 documents"
    shutil.rmtree(storage / "models")
    checked = verify_folder(str(storage / "shards" / "s"), sample=2).checked
    assert checked["scored again"] == "nothing: the teacher tiny is not here"


def test_every_broken_part_is_named_and_the_exit_code_is_1(storage: Path) -> None:
    folder = storage / "shards" / "s"
    data = bytearray((folder / NAMES[0]).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / NAMES[0]).write_bytes(data)
    (folder / NAMES[1]).unlink()
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert f"{NAMES[0]}: sha256 is" in result.stderr and f"{NAMES[1]}: no such part" in result.stderr
    assert CliRunner().invoke(app, ["verify", str(storage / "corpus" / "c"), "--sample", "0"]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(storage)]).exit_code == 1


def test_scores_of_another_model_are_found(storage: Path) -> None:
    rewrite(storage, lambda d: replace(d, logp_t=d.logp_t - 0.1, entropy_t=d.entropy_t + 0.02))
    faults = verify_folder(str(storage / "shards" / "s"), sample=2).faults
    assert any("scored again its log-probabilities differ by 0.1" in fault for fault in faults)


def test_counts_that_differ_are_named(storage: Path) -> None:
    folder = str(storage / "shards" / "s")
    manifest = parts.read_manifest(folder)
    parts.write_manifest(folder, replace(manifest, meta=manifest.meta | {"tokens": 7, "k": 13}))
    faults = verify_folder(folder, sample=0).faults
    assert any("k is 12, expected 13" in fault for fault in faults)
    assert any("tokens in the parts, the manifest says 7" in fault for fault in faults)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda d: replace(d, tail_t=d.tail_t + 0.1), "do not add up to 1"),
        (lambda d: replace(d, entropy_t=d.entropy_t * 0), "entropy is below"),
        (lambda d: replace(d, entropy_t=d.entropy_t + 20), "entropy is above"),
        (lambda d: replace(d, ids_t=d.topk_ids_t[:, 0].copy(), logp_t=d.logp_t - 9), "not the one among the kept"),
        (lambda d: replace(d, ids_t=d.ids_t * 0 - 2, logp_t=d.logp_t * 0), "exceeds the tail"),
        (lambda d: replace(d, ends_t=d.ends_t[::-1].copy()), "byte ends fall"),
    ],
)
def test_rows_that_are_no_probabilities_are_found(whole: Path, change, rule: str) -> None:  # type: ignore[no-untyped-def]
    document: ScoredDocument = shards.read_scores(str(whole / "shards" / "s"), NAMES[0])[2]
    assert list(row_faults(document)) == [] and len(np.unique(document.ends_t)) > 1
    assert any(rule in fault for fault in row_faults(change(document)))
