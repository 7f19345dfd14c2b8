"""kill -9 of all that scores, twenty times, and a disk that is full: nothing is lost and nothing is half there."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cdm import parts, shards
from cdm.config import TeacherPool
from cdm.records import Document
from ray_jobs.cluster import connect
from tests import tiny
from tests.scoring import TRANSFORMERS, asked, family, files, in_process, one_row, run, wait_for, workers, write_corpus

DOCUMENTS, PART_DOCUMENTS = 480, 8
ONE_CPU = TeacherPool(cpus=1)  # one engine: while it is dead nothing else goes on
# What dies in each run of the driver, in order. The last run lives. Twenty in all.
RUNS = [
    ["actor", "actor", "actor", "driver"],
    ["actor", "actor", "actor", "ray"],
    ["actor", "actor", "actor", "driver"],
    ["actor", "actor", "actor", "ray"],
    ["actor", "actor", "driver"],
    ["actor"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    documents = tiny.documents(DOCUMENTS - 1)
    documents.insert(40, Document("no-prompt", (), "x"))  # one that cannot be scored
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents, PART_DOCUMENTS)


@pytest.fixture(scope="module")
def undisturbed(model: str, corpus_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    actor = in_process(asked(model, TRANSFORMERS), model, corpus_folder, folder)
    corpus = parts.read_manifest(corpus_folder)
    for part in corpus.parts:
        assert actor(one_row(part))["error"] == [""]
    shards.finish_shards(str(folder), corpus.names, actor.identity)
    return folder


def drive(model: str, corpus_folder: str, folder: str) -> None:
    """A driver, as `cdm score` is one."""
    with connect():
        run(model, corpus_folder, folder, TRANSFORMERS, pool=ONE_CPU)


class Killer:
    """Waits for a moment that a seed chooses (a new engine, or so many new parts), then kills."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.inodes: dict[str, int] = {}
        self.seen: set[psutil.Process] = set()
        self.killed: set[int] = set()
        self.victims = 0

    def kill(self, what: str, driver: multiprocessing.process.BaseProcess) -> None:
        # Looking at all processes costs more than listing a folder: not as often.
        engine = wait_for(lambda: self._engine(driver), every=0.05)
        parts_before, more = len(self.parts()), self.random.choice([0, 0, 0, 1, 2])
        wait_for(lambda: len(self.parts()) >= parts_before + more)
        assert driver.is_alive() and not parts.is_finished(str(self.folder)), "the kill came after the last part"
        started = family(driver.pid)
        self.seen |= set(started)
        itself = psutil.Process(driver.pid)
        for victim in {"actor": [engine], "driver": [itself], "ray": [itself, *started]}[what]:
            with suppress(psutil.NoSuchProcess):  # it went down with its parent
                victim.kill()
        assert psutil.wait_procs([engine], timeout=60)[1] == [], "the engine of a dead driver lives on"
        self.killed.add(engine.pid)
        self.victims += 1

    def _engine(self, driver: multiprocessing.process.BaseProcess) -> psutil.Process | None:
        """The engine's process, if it is not one that was killed before."""
        assert driver.is_alive(), "the driver ended by itself"
        return next((one for one in workers(driver.pid) if one.pid not in self.killed), None)

    def parts(self) -> list[str]:
        """The parts there are; none that was there is ever written again."""
        names = parts.list_parts(str(self.folder))
        inodes = {name: (self.folder / name).stat().st_ino for name in names}
        assert self.inodes.items() <= inodes.items(), "a whole part was removed or written again"
        self.inodes = inodes
        return names


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    found = Killer(tmp_path / "killed", seed=0)
    yield found
    for process in found.seen:  # Ray's dashboard agent outlives a dead driver for minutes
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
@pytest.mark.long
def test_twenty_kills_lose_nothing_and_change_no_byte(
    killer: Killer, undisturbed: Path, model: str, corpus_folder: str
) -> None:
    folder = killer.folder
    processes = multiprocessing.get_context("forkserver")  # imports once, forks drivers that have never run anything
    processes.set_forkserver_preload(["tests.test_faults"])
    for victims in RUNS:
        driver = processes.Process(target=drive, args=(model, corpus_folder, str(folder)))
        driver.start()
        for what in victims:
            killer.kill(what, driver)
        driver.join()
        assert driver.exitcode == (0 if victims[-1] == "actor" else -9)
    assert killer.victims == 20
    killer.parts()
    assert files(folder) == files(undisturbed)
    names = parts.read_manifest(corpus_folder).names
    ids = [one.id for name in names for one in shards.read_scores(str(folder), name)]
    assert len(ids) == len(set(ids)) == DOCUMENTS - 1


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_leaves_no_half_part_and_the_next_run_goes_on(
    small_disk: Path, undisturbed: Path, model: str, corpus_folder: str
) -> None:
    folder = small_disk / "shards"
    actor = in_process(asked(model, TRANSFORMERS), model, corpus_folder, folder)
    errors: list[str] = []
    corpus = parts.read_manifest(corpus_folder)
    for part in corpus.parts:
        errors += actor(one_row(part))["error"]
    whole = parts.list_parts(str(folder))
    assert 0 < len(whole) < len(corpus.parts)
    full = [error for error in errors if error]
    assert len(full) == len(corpus.parts) - len(whole)
    assert all(f"No space left on device: '{folder}'" in error for error in full)
    assert set(os.listdir(folder)) == set(whole)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    for name in parts.missing_parts(str(folder), corpus.names):
        assert actor(one_row(corpus.part(name)))["error"] == [""]
    shards.finish_shards(str(folder), corpus.names, actor.identity)
    assert files(folder) == files(undisturbed)
