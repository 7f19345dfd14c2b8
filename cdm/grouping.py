"""The tokens of one response on both sides -> groups: by equal bytes, or warped by spelling (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cdm.alignment import align, exact_bounds
from cdm.records import Alignment, ScoredDocument
from cdm.tokenizers import Tokenizer

AlignmentMethod = Literal["exact", "dtw", "dtw_unweighted"]
NO_GROUPS = Alignment(np.zeros(1, np.int32), np.zeros(1, np.int32))


@dataclass(frozen=True)
class Grouping:
    """How tokens become groups (docs/method.md, section 2).

    tokenizers_t: the teachers', for warping. entropies: the student's own [N] by document id, for the weights of `dtw`;
    a document that has none is not warped and has no groups.
    """

    method: AlignmentMethod
    tokenizer_s: Tokenizer
    tokenizers_t: Sequence[Tokenizer] = ()
    entropies: Mapping[str, np.ndarray] | None = None

    def groups(self, k: int, document: ScoredDocument, ids_s: np.ndarray, ends_s: np.ndarray, room: int) -> Alignment:
        """The groups with teacher k's `document` that lie in the student's first `room` tokens.

        ids_s, ends_s [N]: the whole response and its end of turn.
        """
        n_s, n_t = len(ends_s), len(document.ends_t)
        entropy_s = None if self.entropies is None else self.entropies.get(document.id, np.zeros(0))
        if document.truncated or (entropy_s is not None and len(entropy_s) < n_s):
            known = n_s - 1 if entropy_s is None else min(n_s - 1, len(entropy_s))
            n_s, n_t = _common_prefix(ends_s[:known], document.ends_t)
        if n_s == 0:
            return NO_GROUPS
        if self.method == "exact":
            groups = exact_bounds(ends_s[:n_s], document.ends_t[:n_t])
        else:
            groups = align(
                method="dtw",
                ends_s=ends_s[:n_s],
                ends_t=document.ends_t[:n_t],
                texts_s=self.tokenizer_s.texts(ids_s[:n_s]),
                texts_t=self.tokenizers_t[k].texts(document.ids_t[:n_t]),
                entropy_s=None if entropy_s is None else entropy_s[:n_s],
                entropy_t=None if entropy_s is None else document.entropy_t[:n_t],
            )
        kept = int(np.searchsorted(groups.bounds_s, room, side="right"))
        return Alignment(groups.bounds_s[:kept], groups.bounds_t[:kept])


def _common_prefix(ends_s: np.ndarray, ends_t: np.ndarray) -> tuple[int, int]:
    """How many tokens of each side lie before the last byte on which both end."""
    shared = np.intersect1d(ends_s, ends_t)
    if not len(shared):
        return 0, 0
    n_s, n_t = (int(np.searchsorted(ends, shared[-1], side="right")) for ends in (ends_s, ends_t))
    return n_s, n_t
