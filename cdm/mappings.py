"""Which dynamic mappings a student makes: teacher tokens without a twin, the near spellings that took their mass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from cdm.batches import Row, collate, micro_batches
from cdm.head import Sums
from cdm.models import load_model
from cdm.pieces import Piece
from cdm.rows import StudentRows
from cdm.step import StudentModel, to_device
from cdm.tokenizers import Tokenizer, load_tokenizer
from cdm.vocab_map import VocabMap

KEPT = 40
BEFORE, AFTER = 32, 12  # characters of an example
PLACE = "▌"
Mapping = dict[str, str | float]


@torch.no_grad()
def mappings_that_fired(
    folder: str, rows: Sequence[Row], *, map_path: str, tokenizer_t: Tokenizer, top_k: int, micro_batch_tokens: int
) -> tuple[Mapping, ...]:
    """The dynamic mappings from the first teacher on these rows that moved the most mass, the largest first.

    `mass` is the teacher's probability that went this way, summed over groups; `groups` how often it was a candidate;
    `example` the text around the place where it had most mass.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_map = VocabMap.load(map_path)
    model = StudentModel(load_model(folder, revision=None, dtype="float32").to(device).eval())
    lengths = np.array([len(row.prompt_s) + len(row.ids_s) for row in rows])
    found: list[np.ndarray] = []
    places: list[tuple[int, int]] = []  # row and token of every response row that is read
    for chunk in micro_batches(np.arange(len(rows)), lengths, world=1, micro_batch_tokens=micro_batch_tokens):
        if len(chunk):
            batch = to_device(collate([rows[number] for number in chunk], top_k=top_k), device)
            model.read(batch, partial(_collect, vocab_map=vocab_map, top_k=top_k, first=len(places), found=found))
            places += [(number, token) for number in chunk.tolist() for token in range(len(rows[number].ids_s))]
    tokenizer_s = load_tokenizer(folder)
    table = _largest(found, len(vocab_map.inverse))
    examples = [_example(rows[places[at][0]], places[at][1], tokenizer_s) for *_, at in table]
    return tuple(
        {
            "teacher": _text(tokenizer_t, id_t),
            "student": _text(tokenizer_s, id_s),
            "mass": round(mass, 4),
            "groups": groups,
            "example": example,
        }
        for (id_t, id_s, mass, groups, _), example in zip(table, examples, strict=True)
    )


def _collect(
    rows: StudentRows, piece: Piece, vocab_map: VocabMap, top_k: int, first: int, found: list[np.ndarray]
) -> tuple[torch.Tensor, Sums]:
    """Appends a piece's dynamic mappings, [n, 4] float64: teacher id, student id, mass, response row."""
    teacher, logits = piece.teachers[0], rows.logits
    ids_t, logp_t = (values[teacher.groups_t[:, 0]] for values in (teacher.topk_ids_t, teacher.topk_logp_t))
    top_s = logits[teacher.groups_s[:, 0]].topk(min(top_k, logits.shape[-1])).indices
    images = vocab_map.dynamic(ids_t, top_s)
    fired = (images >= 0) & (vocab_map.images(ids_t) < 0)
    at = (first + piece.start + teacher.groups_s[:, :1]).expand_as(ids_t)
    columns = [values[fired].double() for values in (ids_t, images, logp_t.exp(), at)]
    found.append(torch.stack(columns, 1).cpu().numpy())
    return logits.new_zeros(()), {}


def _largest(found: list[np.ndarray], size_s: int) -> list[tuple[int, int, float, int, int]]:
    """Teacher id, student id, mass, groups and the response row of the most mass, of the mappings of the most mass."""
    ids_t, ids_s, mass, at = np.concatenate(found).T
    order = np.argsort(-mass, kind="stable")
    numbers = (ids_t * size_s + ids_s).astype(np.int64)[order]
    pairs, best, place, groups = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
    total = np.bincount(place, weights=mass[order], minlength=len(pairs))
    return [
        (int(pairs[n] // size_s), int(pairs[n] % size_s), float(total[n]), int(groups[n]), int(at[order[best[n]]]))
        for n in np.argsort(-total, kind="stable")[:KEPT]
    ]


def _example(row: Row, token: int, tokenizer_s: Tokenizer) -> str:
    """The response around one of the student's tokens."""
    spelled = tokenizer_s.spell_response(row.ids_s[:-1].tolist())
    start = int(row.ends_s[token - 1]) if token else 0
    before, after = (side.decode("utf-8", "replace") for side in (spelled[:start], spelled[start:]))
    return f"{before[-BEFORE:]}{PLACE}{after[:AFTER]}"


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return (tokenizer.token_bytes(token_id) or b"").decode("utf-8", "replace")
