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
Mapping = dict[str, str | float]
Found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@torch.no_grad()
def mappings_that_fired(
    folder: str, rows: Sequence[Row], *, map_path: str, tokenizer_t: Tokenizer, top_k: int, micro_batch_tokens: int
) -> tuple[Mapping, ...]:
    """The dynamic mappings from the first teacher on these rows that moved the most mass, the largest first.

    `mass` is the teacher's probability that went this way, summed over groups; `groups` how often it was a candidate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocab_map = VocabMap.load(map_path)
    model = StudentModel(load_model(folder, revision=None, dtype="float32").to(device).eval())
    lengths = np.array([len(row.prompt_s) + len(row.ids_s) for row in rows])
    found: Found = []
    for chunk in micro_batches(np.arange(len(rows)), lengths, world=1, micro_batch_tokens=micro_batch_tokens):
        if len(chunk):
            batch = to_device(collate([rows[number] for number in chunk], top_k=top_k), device)
            model.read(batch, partial(_collect, vocab_map=vocab_map, top_k=top_k, found=found))
    return _table(found, len(vocab_map.inverse), load_tokenizer(folder), tokenizer_t)


def _collect(
    rows: StudentRows, piece: Piece, vocab_map: VocabMap, top_k: int, found: Found
) -> tuple[torch.Tensor, Sums]:
    """Appends (teacher id, student id, mass) of a piece's dynamic mappings."""
    teacher, logits = piece.teachers[0], rows.logits
    ids_t, logp_t = (values[teacher.groups_t[:, 0]] for values in (teacher.topk_ids_t, teacher.topk_logp_t))
    top_s = logits[teacher.groups_s[:, 0]].topk(min(top_k, logits.shape[-1])).indices
    images = vocab_map.dynamic(ids_t, top_s)
    fired = (images >= 0) & (vocab_map.images(ids_t) < 0)
    found.append(tuple(values[fired].cpu().numpy() for values in (ids_t, images, logp_t.exp())))  # type: ignore[arg-type]
    return logits.new_zeros(()), {}


def _table(found: Found, size_s: int, tokenizer_s: Tokenizer, tokenizer_t: Tokenizer) -> tuple[Mapping, ...]:
    ids_t, ids_s, mass = (np.concatenate(column) for column in zip(*found, strict=True))
    pairs, place, groups = np.unique(ids_t.astype(np.int64) * size_s + ids_s, return_inverse=True, return_counts=True)
    total = np.bincount(place, weights=mass, minlength=len(pairs))
    return tuple(
        {
            "teacher": _text(tokenizer_t, int(pairs[n] // size_s)),
            "student": _text(tokenizer_s, int(pairs[n] % size_s)),
            "mass": round(float(total[n]), 4),
            "groups": int(groups[n]),
        }
        for n in np.argsort(-total, kind="stable")[:KEPT]
    )


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return (tokenizer.token_bytes(token_id) or b"").decode("utf-8", "replace")
