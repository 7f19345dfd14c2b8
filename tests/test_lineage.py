"""Who was made from whom, on a storage folder with manifests and logs but no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from cdm import parts
from cdm.config import parse_config
from cdm.lineage import Lineage, print_lineage, storage_of
from cdm.models import model_identity
from cdm.tracking import Experiment
from tests.whole import CONFIG


def stage(storage: Path, kind: str, name: str, **meta: object) -> str:
    """A finished folder of parts; its fingerprint."""
    folder = str(storage / kind / name)
    parts.write_part(folder, "train-00000.parquet", pa.table({"id": [name]}))
    return parts.finish(folder, meta, kind=kind, names=["train-00000.parquet"]).fingerprint


def model(storage: Path, name: str, about: dict | None = None) -> str:
    folder = storage / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": name}))
    if about is not None:
        (folder / "cdm.json").write_text(json.dumps(about))
    return str(folder)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "storage"
    corpus = stage(root, "corpus", "c1", source="python_packages")
    teacher = model(root, "models/teacher-1")
    student = model(root, "models/student-1")
    ours = {"teacher": "teacher", "teacher_identity": model_identity(teacher), "corpus": corpus}
    hub = {"teacher": "org/big", "teacher_identity": "org/big@main", "corpus": corpus}
    shards = [stage(root, "shards", "teacher-a", **ours), stage(root, "shards", "big-b", **hub)]
    for number, used in enumerate((shards[:1], shards)):
        stage(root, "aligned", f"a{number}", corpus=corpus, shards=used)
        folders = [str(root / "shards" / name) for name in ("teacher-a", "big-b")[: number + 1]]
        about = {"method": {"type": "cdm"}, "steps": 8, "from": student, "scores": folders}
        model(root, f"students/tiny-cdm-{number}", about | {"aligned": str(root / "aligned" / f"a{number}")})
    config = parse_config(CONFIG | {"storage": str(root)})
    run = Experiment(config).run("train", "train cdm", "1")
    run.tags({"cdm.export": str(root / "students" / "tiny-cdm-1"), "cdm.commit": "c" * 40, "cdm.dirty": "true"})
    run.close()
    return root


def test_both_ways(storage: Path) -> None:
    found = Lineage(str(storage))
    assert set(found.made_from["students/tiny-cdm-1"]) == {
        "models/student-1", "shards/teacher-a", "shards/big-b", "aligned/a1",
    }  # fmt: skip
    assert found.made_from["shards/teacher-a"] == ["corpus/c1", "models/teacher-1"]
    assert found.made_from["shards/big-b"] == ["corpus/c1", "org/big@main"]
    assert found.made_from["corpus/c1"] == []
    assert {name for name in found.made_into["shards/teacher-a"] if name.startswith("students/")} == {
        "students/tiny-cdm-0", "students/tiny-cdm-1",
    }  # fmt: skip
    assert {name for name in found.made_into["shards/big-b"]} == {"aligned/a1", "students/tiny-cdm-1"}


def test_a_storage_folder_that_moved_has_the_same_lineage(storage: Path, tmp_path: Path) -> None:
    before = Lineage(str(storage)).made_from
    moved = shutil.move(storage, tmp_path / "elsewhere")
    assert Lineage(str(moved)).made_from == before


@pytest.mark.parametrize("what", ["train cdm", "train-1", "students/tiny-cdm-1", "students/tiny-cdm-1/config.json"])
def test_a_path_or_a_run_names_an_artefact(storage: Path, what: str) -> None:
    given = str(storage / what) if "/" in what else what
    found = Lineage(storage_of(given) or str(storage))
    assert found.resolve(given) == "students/tiny-cdm-1"


def test_what_is_neither_is_said(storage: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: neither a finished folder of .* nor a run that made one"):
        Lineage(str(storage)).resolve("nothing")
    assert storage_of(str(storage.parent)) is None


def test_the_trees(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Lineage(str(storage))
    print_lineage(found, "students/tiny-cdm-1", Console(width=120))
    out = capsys.readouterr().out
    assert "students/tiny-cdm-1  cdm, 8 steps, run train cdm, FINISHED, commit cccccccccc with changes" in out
    assert "org/big@main  a model from elsewhere" in out and out.index("made from") < out.index("made into")
    print_lineage(found, "corpus/c1", Console(width=120))
    assert "students/tiny-cdm-0" in capsys.readouterr().out
