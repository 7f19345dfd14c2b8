"""Ids of one vocabulary for ids of another, by their bytes alone: exact twins, and the longest tokens that begin them.

Legend: V ids of one vocabulary; sides `_s` student and `_t` teacher; -1 is none. The rules: docs/method.md, section 3.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np


class Vocabulary(Protocol):
    """What a map reads of a `cdm.tokenizers.Tokenizer`, which lies a layer above."""

    name: str
    vocab_size: int

    @property
    def fingerprint(self) -> str: ...
    @property
    def special_roles(self) -> dict[str, int]: ...
    @property
    def byte_pieces(self) -> frozenset[int]: ...
    def all_token_bytes(self) -> list[bytes | None]: ...


Twins = Literal["lowest", "emitted"]
ROLES = ("end_of_turn", "eos", "bos", "pad")


def exact_map(tokenizer_s: Vocabulary, tokenizer_t: Vocabulary, twins: Twins = "lowest") -> np.ndarray:
    """The student id with the same bytes for each teacher id, else -1. int32 [V_t]. Special tokens map by role.

    twins: which of several ids with the same bytes. "lowest", or "emitted": a byte of byte fallback only where no
    other token is spelled so, because the student's texts never hold that id.
    """
    first = _ids_by_bytes(tokenizer_s, twins)
    pieces = tokenizer_t.all_token_bytes()
    exact = np.array([-1 if piece is None else first.get(piece, -1) for piece in pieces], dtype=np.int32)
    for role in reversed(ROLES):  # the first role of a token that has several decides
        if role in tokenizer_s.special_roles and role in tokenizer_t.special_roles:
            token_t = tokenizer_t.special_roles[role]
            if pieces[token_t] is None:
                exact[token_t] = tokenizer_s.special_roles[role]
    return exact


def prefix_map(tokenizer_s: Vocabulary, tokenizer_t: Vocabulary, twins: Twins = "lowest") -> np.ndarray:
    """The student id with the longest bytes that each teacher id begins with, else -1. int32 [V_t].

    Where both models have read the same bytes, it is the student's next token if the teacher's token is what follows
    (but for merges that look further).
    """
    ids = _ids_by_bytes(tokenizer_s, twins)

    def begins_with(piece: bytes | None) -> int:
        sizes = range(0 if piece is None else len(piece), 0, -1)
        return next((ids[piece[:size]] for size in sizes if piece[:size] in ids), -1)  # type: ignore[index]

    return np.array([begins_with(piece) for piece in tokenizer_t.all_token_bytes()], dtype=np.int32)


def _ids_by_bytes(tokenizer: Vocabulary, twins: Twins) -> dict[bytes, int]:
    last = tokenizer.byte_pieces if twins == "emitted" else frozenset[int]()
    pieces = tokenizer.all_token_bytes()
    ids: dict[bytes, int] = {}
    for token_id in sorted(range(len(pieces)), key=lambda i: (i in last, i)):
        piece = pieces[token_id]
        if piece is not None:
            ids.setdefault(piece, token_id)
    return ids
