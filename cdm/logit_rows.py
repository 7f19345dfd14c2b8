"""Rows of a teacher's logits -> what is kept of each: its best ids, entropy and tail (layer 2).

Legend: N wanted tokens of a sequence, R rows of a block, D hidden size, K top-k, V vocabulary. Row r predicts token r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from cdm.top_k import best_columns

LOWEST_LOGP = -65504.0  # the lowest finite float16; -inf (masked vocabulary rows) is stored as this, exp() of it is 0
BLOCK_ROWS = 256  # fewer make the head's product slow, more leave the processor's caches
LEAST_ROWS = 16  # where these do not fit it is the batch that is too large
BLOCK_ELEMENTS = 2**25  # float32 logits held at once: rows are fewer where the vocabulary is large
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator")


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Statistics of rows: logp, entropy, tail [N] float32, topk_ids [N, K] int32, topk_logp [N, K] float32."""

    logp: np.ndarray
    entropy: np.ndarray
    tail: np.ndarray
    topk_ids: np.ndarray
    topk_logp: np.ndarray

    @classmethod
    def empty(cls, n: int, k: int) -> TokenRows:
        logp, entropy, tail = (np.empty(n, np.float32) for _ in range(3))
        return cls(logp, entropy, tail, np.empty((n, k), np.int32), np.empty((n, k), np.float32))

    def put(self, start: int, rows: TokenRows, begin: int, end: int) -> None:
        """Copy rows begin:end of `rows` to start onwards."""
        for column in fields(self):
            source = getattr(rows, column.name)[begin:end]
            getattr(self, column.name)[start : start + len(source)] = source


def row_statistics(logits: torch.Tensor, targets: torch.Tensor, top_k: int) -> TokenRows:
    """Statistics of logits [R, V] whose rows predict targets [R], in float32; entropy over the whole vocabulary."""
    below = logits.to(torch.float32, copy=True)
    below.sub_(below.amax(-1, keepdim=True)).clamp_(min=LOWEST_LOGP)  # the best is 0; -inf * 0 would be NaN
    p = below.softmax(-1)
    log_sum = -p.amax(-1).log()  # the peak's exp() is 1, so its probability is 1 / sum
    topk_ids = best_columns(below, top_k)
    topk_logp = (below.gather(-1, topk_ids) - log_sum[:, None]).clamp_(min=LOWEST_LOGP)
    own = (below.gather(-1, targets[:, None])[:, 0] - log_sum).clamp_(min=LOWEST_LOGP)
    tail = (1 - topk_logp.exp().sum(-1)).clamp_(min=0)
    entropy = log_sum - p.mul_(below).sum(-1)
    columns = (own, entropy, tail, topk_ids.to(torch.int32), topk_logp)
    return TokenRows(*(column.cpu().numpy() for column in columns))


Head = Callable[[torch.Tensor], torch.Tensor]


class RowBlocks:
    """`row_statistics` of head(hidden [R, D]) without ever holding [R, V].

    `rows` are done at once, half as many from when memory runs out; LEAST_ROWS that do not fit raise the error.
    Several ranks compute a block together: theirs is never halved, because one rank alone would not tell the others.
    """

    def __init__(self, vocab_size: int, ranks: int = 1) -> None:
        self.rows = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // vocab_size))
        self.ranks = ranks
        self.backoffs = 0

    def __call__(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor, top_k: int) -> TokenRows:
        out = TokenRows.empty(len(targets), top_k)
        start = 0
        while start < len(targets):
            part = slice(start, start + self.rows)
            work = partial(_head_statistics, head, hidden[part], targets[part], top_k)
            rows = unless_out_of_memory(work, less_is_possible=self.rows > LEAST_ROWS and self.ranks == 1)
            if rows is None:
                self.rows //= 2
                self.backoffs += 1
            else:
                out.put(start, rows, 0, self.rows)
                start += self.rows
        return out


def _head_statistics(head: Head, hidden: torch.Tensor, targets: torch.Tensor, top_k: int) -> TokenRows:
    return row_statistics(head(hidden), targets, top_k)


Result = TypeVar("Result")


def unless_out_of_memory(work: Callable[[], Result], less_is_possible: bool) -> Result | None:
    """What `work` gives; None where it ran out of memory and less can be tried. Every other error travels."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not (less_is_possible and is_out_of_memory(error)):
            raise
    if torch.cuda.is_available():  # here, where the error no longer holds what was allocated
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU, and from vLLM's own processes, it is a RuntimeError that only its text tells apart."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
