"""What a million parts cost beside their work: the manifest, the listing, and the hand-over through the pool."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import manifests
from cdm import parts
from cdm.config import TeacherPool
from cdm.parts import Part
from ray_jobs.pool import PartWorker, make_parts

HANDED_OVER = (500, 2_000)  # parts through the pool, whose difference is free of its start


class NoWork(PartWorker):
    """An engine that takes no time: what is left is Ray's."""

    nothing: ClassVar[Mapping[str, Any]] = {"documents": 0}

    def __init__(self, folder: str, count_attempt: Callable[[str], int]) -> None:
        super().__init__(folder, count_attempt)

    def make(self, part: Part) -> None:
        """Nothing."""

    def summary(self, name: str) -> dict[str, Any]:
        return {"documents": 1}


def handover_seconds(counts: tuple[int, int] = HANDED_OVER) -> float:
    """Seconds a part that the pool needs for parts without work, one engine. Needs Ray running."""
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            missing = [Part(f"train-{n:07d}.parquet", 1, 1, "") for n in range(count)]
            began = time.monotonic()
            assert sum(1 for _ in make_parts(NoWork, {"folder": folder}, missing, TeacherPool(cpus=1))) == count
            took.append(time.monotonic() - began)
    return (took[1] - took[0]) / (counts[1] - counts[0])


def listing_seconds(count: int = manifests.PARTS, missing: int = 1000) -> float:
    """Seconds until a restarted stage knows which of `count` parts are missing, with empty files in a folder."""
    names = [f"train-{n:07d}.parquet" for n in range(count)]
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        for name in names[missing:]:
            os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY))
        began = time.monotonic()
        found = parts.missing_parts(folder, names)
        took = time.monotonic() - began
    assert found == names[:missing]
    return took


def _memory() -> str | None:
    """A file system in memory where there is one: a million files on a disk are the disk's own benchmark."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
