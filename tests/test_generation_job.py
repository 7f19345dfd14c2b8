"""`cdm generate` on real Ray and vLLM: the driver killed in mid-generation, and the same command again."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from cdm import parts
from cdm.config import load_config
from cdm.corpus import read_documents, split_parts
from cdm.generation import SAMPLE
from cdm.inspection import inspect_path
from ray_jobs.generate import GeneratePart, generate, generator_arguments
from tests import whole

pytestmark = [pytest.mark.slow, pytest.mark.long]

CHECK = {"type": "function", "name": "tests.whole:brief"}
GENERATION = {"replace": "all", "samples": 2, "max_tokens": 48, "stop": ["e"], "top_p": 0.95, "check": CHECK}


def tiny_config(folder: Path) -> str:
    """A teacher with random weights that writes all training responses of many small parts."""
    (teacher,) = whole.CONFIG["teachers"]
    teacher = teacher | {"model": teacher["model"] | {"training": {"steps": 0}}}
    corpus = whole.CONFIG["corpus"] | {"part_documents": 6}
    return whole.write_config(folder, folder / "storage", teachers=[teacher], corpus=corpus, generation=GENERATION)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def kill_at_the_first_part(config: str, storage: Path) -> Path:
    """Starts `cdm generate` and kills it, and all that it started, once it has written a part."""
    process = whole.start("generate", config)
    while not list(storage.glob("corpus/generated-*/*.parquet")):
        assert process.poll() is None, whole.finish(process)
        threading.Event().wait(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    whole.finish(process)
    return only(storage, "corpus/generated-*")


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, storage = tiny_config(tmp_path), tmp_path / "storage"
    folder = kill_at_the_first_part(file, storage)
    source = only(storage, "corpus/[!g]*")
    asked = parts.read_manifest(str(source))
    inodes = {name: (folder / name).stat().st_ino for name in parts.list_parts(str(folder))}
    assert 0 < len(inodes) < len(asked.names) and not parts.is_finished(str(folder))

    again = whole.start("generate", file)
    output = whole.finish(again)
    assert again.returncode == 0 and "done generate teacher" in output and "samples kept" in output, output
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes, "a part was written again"

    manifest = parts.read_manifest(str(folder), {"kind": "corpus"})
    counts = manifest.meta["counts"]
    assert counts["prompts"] == asked.meta["counts"]["to_generate"]
    assert counts["given"] == asked.rows - counts["prompts"]
    assert counts["samples"] > counts["prompts"] and counts["check_failed"] > 0
    for name in split_parts(asked, "test"):
        written = read_documents(str(folder), name)
        assert all(d in written for d in read_documents(str(source), name) if d.response), "references stay"

    config, model = load_config(file), str(only(storage, "models/teacher-*"))
    identity = manifest.meta["generation"]
    by_hand = tmp_path / "by_hand"
    worker = GeneratePart(
        generator_arguments(config, model), str(source), str(by_hand), identity, count_attempt=lambda name: 1
    )
    for part in asked.parts:
        row = {"name": part.name, "rows": part.rows, "bytes": part.bytes, "sha256": part.sha256}
        assert worker(pa.Table.from_pylist([row]))["error"] == [""]
        assert (by_hand / part.name).read_bytes() == (folder / part.name).read_bytes()

    done = generate(config, identity, model_path=model, source_folder=str(source), generated_folder=str(folder))
    assert done == (manifest, 0.0), "a finished folder needs no Ray"
    run = whole.runs(storage)["generate teacher"]
    assert run.info.status == "FINISHED" and run.data.metrics["generated"] == counts["generated"] > 0
    assert run.data.metrics["tokens_a_second"] > 0 and run.data.params["samples"] == "2"
    inspect_path(str(folder), 1)
    shown = capsys.readouterr().out
    assert SAMPLE in shown and "tokens" in shown
