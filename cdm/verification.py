"""Whether a folder of parts holds what its manifest says, and whether a teacher still says what is stored (layer 2).

Of every folder: each part's size, checksum and rows. Of shards besides: the identity and counts in each part, what must
be true of probabilities in each row, and a sample of documents scored again by Transformers, whichever engine scored
them. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cdm import codec, parts, shards
from cdm.corpus import read_documents
from cdm.inspection_parts import folder_by_fingerprint, models_beside
from cdm.models import model_identity
from cdm.parts import Manifest, Part
from cdm.records import Document, ScoredDocument

MASS_TOLERANCE = 5e-3  # what float16 log-probabilities cost a sum of probabilities
ENTROPY_TOLERANCE = 0.05  # nats, the same of a sum of p log p
# Largest mean difference (nats) between two engines at one dtype: bfloat16 layers differ by their kernels alone.
RESCORED_TOLERANCE = {"float32": 5e-3, "float16": 0.02, "bfloat16": 0.1}
LEAST_SAME_BEST = 0.9  # share of rows whose best id is the same


@dataclass
class Findings:
    """What is wrong, in the order found, and what was looked at."""

    faults: list[str] = field(default_factory=list)
    checked: dict[str, Any] = field(default_factory=dict)


def verify_folder(folder: str, *, sample: int) -> Findings:
    """Everything that can be checked of a finished folder; of shards, `sample` documents are scored again.

    Raises ValueError where there is no readable manifest.
    """
    manifest = parts.read_manifest(folder)
    found = Findings(checked={"kind": manifest.kind, "parts": len(manifest.parts), "documents": manifest.rows})
    broken = _check_files(folder, manifest, found)
    if manifest.kind == shards.KIND:
        whole = [part for part in manifest.parts if part.name not in broken]
        _check_scores(folder, manifest, whole, found)
        if sample and whole:
            _check_sample(folder, manifest, whole, sample, found)
    return found


def _check_files(folder: str, manifest: Manifest, found: Findings) -> set[str]:
    """Sizes, checksums and rows; the names of the parts that differ."""
    broken = set()
    for part, fault in parts.check_parts(folder, manifest):
        if fault is None:
            with parts.open_part(folder, part.name) as file:
                rows = file.metadata.num_rows
            if rows != part.rows:
                fault = f"{folder}/{part.name}: {rows} rows, the manifest says {part.rows}"
        if fault is not None:
            broken.add(part.name)
            found.faults.append(fault)
    return broken


# --- scores ------------------------------------------------------------------------------------------------------


def _check_scores(folder: str, manifest: Manifest, whole: list[Part], found: Findings) -> None:
    counts = dict.fromkeys(("documents", "tokens", "truncated", "quarantined"), 0)
    identity = {key: value for key, value in manifest.meta.items() if key not in counts}
    worst_mass = 0.0
    for part in whole:
        try:
            footer = shards.read_footer(folder, part.name)
            shards.check_identity(folder, part.name, footer, identity)
            documents = shards.read_scores(folder, part.name)
        except ValueError as error:
            found.faults.append(str(error))
            continue
        for document in documents:
            worst_mass = max(worst_mass, float(np.abs(_mass(document) - 1).max(initial=0)))
            found.faults += [f"{folder}/{part.name}: document {document.id}: {fault}" for fault in row_faults(document)]
        counts["documents"] += len(documents)
        counts["tokens"] += sum(len(document.ids_t) for document in documents)
        counts["truncated"] += sum(document.truncated for document in documents)
        counts["quarantined"] += len(footer.quarantined)
    found.checked |= {"tokens": counts["tokens"], "largest error of a row's mass": round(worst_mass, 6)}
    if len(whole) == len(manifest.parts):
        for key, count in counts.items():
            if count != manifest.meta[key]:
                found.faults.append(f"{folder}: {count} {key} in the parts, the manifest says {manifest.meta[key]}")


def _mass(document: ScoredDocument) -> np.ndarray:
    return np.exp(document.topk_logp_t.astype(np.float64)).sum(1) + document.tail_t


def row_faults(document: ScoredDocument) -> Iterator[str]:
    """What cannot be of probabilities: one line a rule, with the first row that breaks it.

    The entropy of the whole row is at least that of the kept ids and the tail as one outcome, and at most that with the
    tail spread evenly over all other ids.
    """
    logp = document.topk_logp_t.astype(np.float64)
    kept = document.topk_ids_t >= 0
    p = np.where(kept, np.exp(logp), 0.0)
    terms = np.where(p > 0, -p * np.where(p > 0, logp, 0.0), 0.0).sum(1)
    tail = document.tail_t.astype(np.float64)
    least = terms - tail * np.log(np.where(tail > 0, tail, 1.0))
    own = (document.topk_ids_t == document.ids_t[:, None]) & kept
    stored = np.where(own, logp, -np.inf).max(1, initial=-np.inf)
    off = np.abs(np.where(own.any(1), stored - document.logp_t, 0.0))
    room = np.where(own.any(1), np.inf, tail + MASS_TOLERANCE)
    rules = {
        "the kept mass and the tail do not add up to 1": np.abs(p.sum(1) + tail - 1) > MASS_TOLERANCE,
        "the entropy is below what the kept ids have": document.entropy_t < least - ENTROPY_TOLERANCE,
        "the entropy is above what the tail allows": document.entropy_t
        > least + tail * np.log(codec.LIMIT) + ENTROPY_TOLERANCE,
        "the token's own log-probability is not the one among the kept": off > 1e-3 * (1 + np.abs(document.logp_t)),
        "the token's own probability exceeds the tail": np.exp(document.logp_t.astype(np.float64)) > room,
        "byte ends fall": np.diff(document.ends_t, prepend=0) < 0,
    }
    for rule, breaks in rules.items():
        if breaks.any():
            yield f"{rule}, first in row {int(breaks.argmax())}, {int(breaks.sum())} of {len(breaks)} rows"


# --- a sample, scored again --------------------------------------------------------------------------------------


def _check_sample(folder: str, manifest: Manifest, whole: list[Part], sample: int, found: Findings) -> None:
    corpus = folder_by_fingerprint(folder, "corpus", manifest.meta["corpus"])
    model = _teacher(folder, manifest.meta)
    if corpus is None or model is None:
        missing = "its corpus" if corpus is None else f"the teacher {manifest.meta['teacher']}"
        found.checked["scored again"] = f"nothing: {missing} is not here"
        return
    from cdm.teacher import TeacherScorer

    dtype = manifest.meta["dtype"]
    pairs = list(_sampled(folder, corpus, whole, sample))
    scorer = TeacherScorer(
        model[0],
        revision=model[1],
        engine={"type": "transformers", "dtype": dtype, "batch_tokens": manifest.meta["max_length"]},
        top_k=manifest.meta["k"],
        top_mass=manifest.meta["top_mass"],
        max_length=manifest.meta["max_length"],
    )
    again = {document.id: document for document in scorer([document for document, _ in pairs])[0]}
    for document, stored in pairs:
        where = f"{folder}: document {document.id}"
        other = again.get(document.id)
        if other is None or not np.array_equal(other.ids_t, stored.ids_t):
            found.faults.append(f"{where}: scored again it has other tokens")
            continue
        logp = float(np.abs(other.logp_t - stored.logp_t).mean())
        entropy = float(np.abs(other.entropy_t - stored.entropy_t).mean())
        same = float((other.topk_ids_t[:, 0] == stored.topk_ids_t[:, 0]).mean())
        if max(logp, entropy) > RESCORED_TOLERANCE[dtype] or same < LEAST_SAME_BEST:
            found.faults.append(
                f"{where}: scored again its log-probabilities differ by {logp:.4f} nats and its entropies by "
                f"{entropy:.4f} in the mean, {same:.0%} of the best ids are the same; at {dtype} up to "
                f"{RESCORED_TOLERANCE[dtype]} and at least {LEAST_SAME_BEST:.0%} are expected"
            )
    found.checked["scored again"] = f"{len(pairs)} documents"


def _sampled(folder: str, corpus: str, whole: list[Part], sample: int) -> Iterator[tuple[Document, ScoredDocument]]:
    """The first document of parts that are evenly spread, of as few parts as hold enough."""
    filled = [part for part in whole if part.rows]
    for place in np.unique(np.linspace(0, len(filled) - 1, min(sample, len(filled))).astype(int)):
        name = filled[place].name
        stored = shards.read_scores(folder, name, row_groups=[0])[: -(-sample // len(filled))]
        documents = {document.id: document for document in read_documents(corpus, name)}
        yield from ((documents[scores.id], scores) for scores in stored)


def _teacher(folder: str, meta: dict[str, Any]) -> tuple[str, str | None] | None:
    """Where the very model is that scored: a folder with its checksum, or its name and revision on the hub."""
    name, wanted = meta["teacher"], meta["teacher_identity"]
    if wanted.startswith(f"{name}@"):
        return name, wanted.removeprefix(f"{name}@")
    for path in [*models_beside(folder), name]:
        if "://" not in path and Path(path).is_dir() and model_identity(path) == wanted:
            return path, None
    return None
