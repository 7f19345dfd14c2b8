"""Ray tasks around `cdm.batches.align_part`: one a part, each writing its own output."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray

from cdm import parts
from cdm.batches import align_part
from cdm.grouping import AlignmentMethod, Grouping
from cdm.shards import ROW_GROUP_DOCUMENTS, read_scores
from cdm.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sides:
    """Whose tokens are aligned, and how. Each model by name and revision.

    entropies: a shards folder with the student's own, which `dtw` weighs its tokens by.
    """

    student: tuple[str, str | None]
    teachers: tuple[tuple[str, str | None], ...]
    method: AlignmentMethod = "exact"
    entropies: str | None = None


def align(
    corpus_folder: str,
    shards_folders: Sequence[str],
    sides: Sides,
    folder: str,
    *,
    max_length: int,
    meta: dict[str, Any],
    on_progress: Callable[[int], None],
) -> parts.Manifest:
    """Aligns every part of the corpus that `folder` lacks; the manifest, with the counts, comes last.

    Raises ValueError where no document is left to train on.
    """
    names = parts.read_manifest(corpus_folder).names
    task = ray.remote(num_cpus=1)(_align_one)
    missing = parts.missing_parts(folder, names)
    pending = [task.remote(corpus_folder, tuple(shards_folders), name, sides, max_length, folder) for name in missing]
    while pending:
        done, pending = ray.wait(pending)
        ray.get(done)
        on_progress(len(names) - len(pending))
    counts: Counter[str] = Counter()
    for name in names:
        with parts.open_part(folder, name) as file:
            counts.update(json.loads(file.schema_arrow.metadata[b"counts"]))
    if not counts["documents"]:
        raise ValueError(f"{folder}: no document is left after alignment: {dict(counts)}")
    return parts.finish(folder, meta | {"counts": dict(counts)}, kind="aligned", names=names)


def _align_one(
    corpus_folder: str,
    shards_folders: tuple[str, ...],
    name: str,
    sides: Sides,
    max_length: int,
    folder: str,
) -> None:
    entropies = None
    if sides.entropies is not None:
        entropies = {document.id: document.entropy_t for document in read_scores(sides.entropies, name)}
    tokenizers_t = () if sides.method == "exact" else tuple(_tokenizer(*teacher) for teacher in sides.teachers)
    grouping = Grouping(sides.method, _tokenizer(*sides.student), tokenizers_t, entropies)
    table, counts = align_part(corpus_folder, shards_folders, name, grouping, max_length=max_length)
    table = table.replace_schema_metadata({"counts": json.dumps(counts)})
    parts.write_part(folder, name, table, row_group_size=ROW_GROUP_DOCUMENTS)


@lru_cache(maxsize=8)
def _tokenizer(name: str, revision: str | None) -> Tokenizer:
    """One a worker process: parsing a large tokenizer.json takes a second."""
    return load_tokenizer(name, revision=revision)
