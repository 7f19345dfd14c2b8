"""Where a teacher's probability is that no student token can take, by what the teacher's tokens are made of.

`python -m benchmarks.mass ALIGNED SHARDS TEACHER STUDENT [THETA]`: two folders of one storage folder, the teacher's and
the student's model. Over the groups' first rows of the first training documents; no model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from benchmarks import table
from cdm.batches import AlignedData
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import VocabMap, build_vocab_map

DOCUMENTS = 256
KINDS = ("special", "white space", "letters", "digits", "letters and others", "other signs")


def kind(token: bytes | None) -> str:
    """What a token is made of, white space before and after it left out."""
    if not token:
        return "special"
    text = token.decode("utf-8", "replace").strip()
    if not text:
        return "white space"
    letters, digits = any(map(str.isalpha, text)), any(map(str.isdigit, text))
    if text.isalpha():
        return "letters"
    if digits and not letters:
        return "digits"
    return "letters and others" if letters else "other signs"


def mass_by_kind(data: AlignedData, tokenizer_t: Tokenizer, vocab_map: VocabMap) -> dict[str, np.ndarray]:
    """Kind -> probability a group with an exact image, with a near spelling alone, and with neither.

    "beyond the top k" is a kind of its own, which has neither.
    """
    place = np.array([KINDS.index(kind(token)) for token in tokenizer_t.all_token_bytes()])
    near = np.diff(vocab_map.graph.starts) > 0
    fate = np.where(vocab_map.exact >= 0, 0, np.where(near, 1, 2))
    sums, groups = np.zeros((len(KINDS), 3)), 0
    for row in map(data.row, range(min(DOCUMENTS, len(data)))):
        scores = row.scores[0]
        if scores is None:
            continue
        starts = row.alignments[0].bounds_t[:-1]
        groups += len(starts)
        ids, mass = scores.topk_ids_t[starts].ravel(), np.exp(scores.topk_logp_t[starts].astype(np.float64)).ravel()
        known = (ids >= 0) & (ids < len(place))
        np.add.at(sums, (place[ids[known]], fate[ids[known]]), mass[known])
    found = dict(zip(KINDS, sums / groups, strict=True))
    return found | {"beyond the top k": np.array([0.0, 0.0, 1 - sums.sum() / groups])}


def main(arguments: Sequence[str]) -> None:
    aligned, shards, teacher, student, *theta = arguments
    tokenizer_t, tokenizer_s = load_tokenizer(teacher), load_tokenizer(student)
    vocab_map = build_vocab_map(tokenizer_s, tokenizer_t, threshold=float(theta[0]) if theta else 0.3)
    found = mass_by_kind(AlignedData.open(aligned, [shards], "train"), tokenizer_t, vocab_map)
    rows = [(name, *(f"{value:.4f}" for value in (sums.sum(), *sums))) for name, sums in found.items()]
    total = sum(found.values(), np.zeros(3))
    rows.append(("all", *(f"{value:.4f}" for value in (total.sum(), *total))))
    table.show("The teacher's probability a group", ["token", "all", "exact", "near spelling", "neither"], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
