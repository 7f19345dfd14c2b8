"""The published procedure, step by step: loops over tokens and groups, and strings compared anew for every group.

The order of work is that of what was published with arXiv 2502.11104: entropies of the full rows, a DTW table filled
cell by cell, rows merged into groups, the merged rows' top k decoded token by token, and for every token without an
exact twin the edit distance to each candidate of its group. The code is this project's own. So are the rules where that
code is wrong (docs/method.md, section 8), so that its groups and maps can be compared with ours: weights are not
truncated, groups cover each side once, -1 is unmapped. `protect` is off, as it is there. Edit distances are
RapidFuzz's, one call a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from cdm.tokenizers import Tokenizer

Group = tuple[tuple[int, int], tuple[int, int]]


def weights(logits: torch.Tensor) -> list[float]:
    """A weight a token, from the entropies of the full rows."""
    probabilities = torch.softmax(logits, -1) + 1e-10
    entropy = -(probabilities * torch.log(probabilities)).sum(-1)
    low, high = entropy.min(), entropy.max()
    return (3 * torch.sigmoid((entropy - low) / (high - low) * 4 - 2) + 3).tolist()


def dtw(
    texts_s: Sequence[str], texts_t: Sequence[str], weights_s: Sequence[float], weights_t: Sequence[float]
) -> list[Group]:
    """The whole table, then the walk back: diagonal first, then the teacher, then the student."""
    best = np.full((len(texts_t) + 1, len(texts_s) + 1), np.inf)
    best[0, 0] = 0.0
    for i, t in enumerate(texts_t):
        for j, s in enumerate(texts_s):
            edits = Levenshtein.distance(t.replace(" ", ""), s.replace(" ", ""))
            cost = edits * weights_t[i] * weights_s[j]
            best[i + 1, j + 1] = cost + min(best[i, j], best[i, j + 1], best[i + 1, j])
    i, j = len(texts_t), len(texts_s)
    groups, end_s, end_t = [], j, i
    while (i, j) != (1, 1):
        diagonal, teacher, student = best[i - 1, j - 1], best[i - 1, j], best[i, j - 1]
        if diagonal <= teacher and diagonal <= student:
            i, j = i - 1, j - 1
            groups.append(((j, end_s), (i, end_t)))
            end_s, end_t = j, i
        elif teacher <= student:
            i -= 1
        else:
            j -= 1
    return [((0, end_s), (0, end_t)), *reversed(groups)]


def merge(logits: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The mean row of each group."""
    return torch.stack([logits[list(range(*one))].mean(0) for one in ranges])


def top_strings(tokenizer: Tokenizer, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, list[list[str]]]:
    """The best k ids of each row, and what each decodes to."""
    ids = torch.topk(logits, k).indices
    return ids, [[tokenizer.hf.decode(token_id) for token_id in row] for row in ids]


def dynamic_map(
    ids: torch.Tensor,
    strings: list[list[str]],
    other_ids: torch.Tensor,
    other_strings: list[list[str]],
    exact: torch.Tensor,
    images: set[int],
    threshold: float,
) -> torch.Tensor:
    """All groups, one direction: the exact twin, else the nearest candidate of the group, else -1. [G, K] -> [G, K]."""
    mapped = exact[ids]
    for place in torch.nonzero(mapped < 0):
        group, rank = place[0], place[1]
        candidates = dict(zip(other_ids[group].tolist(), other_strings[group], strict=True))
        nearest, chosen = threshold, -1
        for other_id, other in candidates.items():
            if other_id in images:
                continue
            distance = _distance(strings[group][rank], other)
            if distance < nearest:
                nearest, chosen = distance, other_id
        mapped[group, rank] = chosen
    return mapped


def _distance(x: str, y: str) -> float:
    x, y = x.replace(" ", ""), y.replace(" ", "")
    if not x or not y:
        return 1.0
    return Levenshtein.distance(x, y) / (len(x) + len(y))
