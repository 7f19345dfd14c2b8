"""Vocabulary maps, teacher rows and batches of a real size with random contents, for machines without real data."""

from __future__ import annotations

import numpy as np
import torch

from cdm.pieces import cuts
from cdm.records import AlignedBatch, TeacherRows
from cdm.vocab_map import NeighbourGraph, VocabMap

SHARED = 0.8  # ids of the smaller vocabulary with an exact image, as between byte-level tokenizers
NEIGHBOURS = 50  # of the others, as between Llama-2 and GPT-2 below a distance of 0.3
SHAPES = np.array([(1, 1)] * 8 + [(2, 1), (1, 2)])  # the groups' sizes


def vocabulary_map(size_s: int, size_t: int, seed: int = 0) -> VocabMap:
    """A random one-to-one exact map of SHARED of the ids, and a random graph of NEIGHBOURS for each of the rest."""
    rng = np.random.default_rng(seed)
    shared = int(SHARED * min(size_s, size_t))
    ids_s, ids_t = rng.permutation(size_s), rng.permutation(size_t)
    exact, inverse = np.full(size_t, -1, np.int32), np.full(size_s, -1, np.int32)
    exact[ids_t[:shared]], inverse[ids_s[:shared]] = ids_s[:shared], ids_t[:shared]
    free_s, degree = np.sort(ids_s[shared:]), min(NEIGHBOURS, size_s - shared)
    degrees = np.where(exact < 0, degree, 0)
    starts = np.concatenate([[0], np.cumsum(degrees)])
    first = rng.integers(0, len(free_s), int((degrees > 0).sum()))
    columns = (first[:, None] + rng.permutation(len(free_s))[:degree]) % len(free_s)
    columns = np.sort(columns, 1).astype(np.int32).reshape(-1)
    graph = NeighbourGraph(
        starts, free_s[columns].astype(np.int32), rng.random(starts[-1], np.float32) * np.float32(0.3)
    )
    names = ("student", "teacher", "student", "teacher")
    return VocabMap(
        exact, inverse, exact, inverse, graph, graph.transposed(size_s), *names, threshold=0.3, protect=True
    )


def teacher_rows(rows_s: int, size_t: int, k: int, seed: int = 0) -> TeacherRows:
    """Groups over `rows_s` student rows, and the top-k of a Zipf-like row for each teacher token."""
    rng = np.random.default_rng(seed)
    sizes = SHAPES[rng.integers(0, len(SHAPES), rows_s)]
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes[:, 0]), rows_s, side="right"))]
    ends = sizes.cumsum(0)
    rows_t = int(ends[-1, 1])
    logp = -np.log(np.arange(1, k + 1) ** 1.2 * rng.uniform(2.0, 8.0, (rows_t, 1))).astype(np.float32)
    ids = rng.integers(0, size_t, (rows_t, k))
    groups_s, groups_t = (torch.from_numpy(np.stack([(ends - sizes)[:, i], ends[:, i]], 1)) for i in (0, 1))
    top_ids, top_logp = torch.from_numpy(ids), torch.from_numpy(logp)
    return TeacherRows(groups_s, groups_t, top_ids[:, 0].clone(), top_logp[:, 0].clone(), top_ids, top_logp)


def batch(sequences: int, length: int, size_s: int, size_t: int, k: int, seed: int = 0) -> AlignedBatch:
    """Random tokens. Every token but the first of a sequence is a target and belongs to the distilled response."""
    tokens = torch.randint(0, size_s, (sequences, length), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(sequences * length).view(sequences, length)[:, :-1].reshape(-1)
    teacher = teacher_rows(len(rows), size_t, k, seed)
    targets, teachers = tokens.reshape(-1)[rows + 1], (teacher,)
    return AlignedBatch(
        tokens, torch.ones_like(tokens), rows, targets, rows // length, teachers, cuts(len(rows), teachers)
    )
