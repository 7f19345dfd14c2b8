"""Real text with rows of logits as two models might give them, where there are no two models to ask.

A row is the sum of what a small model knows: how common a token is, what follows the token before (bigrams counted in
the same texts), and a low-rank part `E h` whose token vectors are sums over letter trigrams and whose context vector
belongs to a byte of the text. Both sides read the same bytes, so where their prefixes agree so do their contexts, and
tokens with equal or near spellings get equal or near logits on both sides. The real next token is on top.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cdm.tokenizers import Tokenizer

RANK, BUCKETS = 32, 1 << 16
SPREAD = 3.0  # standard deviation of the low-rank part, in nats
FILES = ("dolly_valid500", "selfinst_eval242", "mbpp", "gsm8k_test", "cot_aqua", "vicuna_eval80")


@dataclass(frozen=True)
class Side:
    """One response as one model reads it: ids, ends [N]; logits [N, V] float32, row r predicting token r."""

    tokenizer: Tokenizer
    ids: np.ndarray
    ends: np.ndarray
    logits: torch.Tensor


def corpus(folder: Path) -> list[str]:
    """Responses of real instruction data, a file after the other in turns, so that any stretch has all kinds."""
    files = []
    for name in FILES:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            files.append([json.loads(line)["response"].strip() for line in file])
    return [text for texts in zip(*(file[:80] for file in files), strict=True) for text in texts if text]


def sides(student: Tokenizer, teacher: Tokenizer, texts: list[str], tokens: int) -> tuple[Side, Side]:
    """One response of `tokens` student tokens (a little fewer where the last would cut a character)."""
    text = "\n\n".join(texts)
    _, ends = student.encode_with_ends(text)
    if len(ends) < tokens:
        raise ValueError(f"the texts have {len(ends)} tokens of {student.name!r}, not {tokens}")
    response = text.encode()[: ends[tokens - 1]].decode(errors="ignore")
    student_side, teacher_side = (_side(tokenizer, response, texts) for tokenizer in (student, teacher))
    return student_side, teacher_side


def _side(tokenizer: Tokenizer, response: str, texts: list[str]) -> Side:
    ids, ends = tokenizer.encode_with_ends(response)
    counted = [tokenizer.encode_with_ends(text)[0] for text in texts]
    common = np.bincount(np.concatenate(counted), minlength=tokenizer.vocab_size)
    logits = _low_rank(tokenizer, np.concatenate([[0], ends[:-1]])) + 0.5 * torch.from_numpy(common + 1.0).log().float()
    successors = _successors(counted)
    for row in range(len(ids)):
        following = successors.get(int(ids[row - 1])) if row else None
        if following is not None:
            unique, counts = np.unique(following, return_counts=True)
            logits[row, unique] += torch.from_numpy(4.0 + np.log(counts)).float()
        logits[row, ids[row]] = logits[row].max() + 1.0
    return Side(tokenizer, ids, ends, logits)


def _successors(counted: list[np.ndarray]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for ids in counted:
        for before, after in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
            out.setdefault(before, []).append(after)
    return out


def _low_rank(tokenizer: Tokenizer, starts: np.ndarray) -> torch.Tensor:
    """[N, V] float32: token vectors by spelling times context vectors by the byte at which a token starts."""
    letters = np.random.default_rng(0).standard_normal((BUCKETS, RANK)).astype(np.float32)
    vectors = np.zeros((tokenizer.vocab_size, RANK), np.float32)
    for token_id, piece in enumerate(tokenizer.all_token_bytes()):
        if piece:
            marked = b"<" + piece + b">"
            trigrams = [
                int.from_bytes(marked[at : at + 3], "big") * 2654435761 % 2**32 >> 16 for at in range(len(piece))
            ]
            vectors[token_id] = letters[trigrams].sum(0)
    vectors *= RANK**0.5 / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)
    contexts = np.stack([np.random.default_rng([1, max(int(at), 0)]).standard_normal(RANK) for at in starts])
    return torch.from_numpy(SPREAD / RANK**0.5 * contexts.astype(np.float32) @ vectors.T)
