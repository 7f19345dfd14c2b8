"""The output head fused with the loss: hidden states -> a loss and its gradients, a piece of the rows at a time.

Legend: R response rows, H hidden size, V vocabulary. The logits of a piece exist once and are turned into their own
gradient; from it both gradients of the head are formed at once, in the forward pass. Nothing of [R, V] is kept for the
backward pass and nothing is computed twice. Source of gradients in the forward pass: Liger Kernel, 2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdm.rows import StudentRows, flat, pick

PIECE_CELLS = 1 << 26  # logits that exist at once, about

Sums = dict[str, Tensor]
Read = Callable[[StudentRows, int], tuple[Tensor, Sums]]


def read_rows(
    hidden: Tensor, head: torch.nn.Linear, softcap: float | None, bounds: Sequence[int], read: Read
) -> tuple[Tensor, Sums]:
    """The sum of `read(rows, i)` over the pieces i: logits of hidden[bounds[i] : bounds[i + 1]], hidden [R, H].

    `read` gives a loss [] and what else is added up, detached. Where gradients are on, the loss carries them to
    `hidden` and to the head's parameters; `backward` can be called once.
    """
    sums: Sums = {}

    def collect(rows: StudentRows, i: int) -> Tensor:
        loss, more = read(rows, i)
        for name, value in more.items():
            sums[name] = sums[name] + value if name in sums else value
        return loss

    if torch.is_grad_enabled():
        return _FusedLoss.apply(hidden, head.weight, head.bias, softcap, bounds, collect), sums
    total = torch.zeros((), device=hidden.device)
    for i, (start, end) in enumerate(pairwise(bounds)):
        total = total + collect(StudentRows(_logits(hidden[start:end], head.weight, head.bias, softcap)), i)
    return total, sums


class _PieceRows(StudentRows):
    """Rows whose reads are leaves: the loss is a function of a few small tensors, its gradient is spread by hand."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self._softmax = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        self.lse = (logits.amax(-1) - self._softmax.amax(-1).log()).requires_grad_()
        self._picks: list[tuple[Tensor, Tensor]] = []

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        z = pick(self.logits, rows, ids).to(self._softmax.dtype).requires_grad_()
        self._picks.append((flat(self.logits, rows, ids).reshape(-1), z))
        return z

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d logits [R, V], at least float32. To be called once: it is written over the softmax."""
        on_lse, *on_picks = torch.autograd.grad(
            loss, [self.lse, *(z for _, z in self._picks)], allow_unused=True, materialize_grads=True
        )
        out = self._softmax.mul_(on_lse[:, None])
        for (at, _), grad in zip(self._picks, on_picks, strict=True):
            out.view(-1).index_add_(0, at, grad.reshape(-1))
        return out


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        bounds: Sequence[int],
        collect: Callable[[StudentRows, int], Tensor],
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), device=hidden.device, dtype=wide)
        on_hidden = torch.empty_like(hidden)
        # The sum over the pieces is kept in float32: half precision would round it once a piece.
        on_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        on_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for i, (start, end) in enumerate(pairwise(bounds)):
            h = hidden[start:end]
            loss, grad = _piece(h, weight, bias, softcap, collect, i)
            total += loss
            torch.mm(grad, weight, out=on_hidden[start:end])
            if on_weight is not None:
                _add_product(on_weight, grad.T, h)
            if on_bias is not None:
                on_bias += grad.sum(0, dtype=wide)
            del grad  # before the next piece's logits
        ctx.grads = (
            on_hidden,
            None if on_weight is None else on_weight.to(weight.dtype),
            None if bias is None or on_bias is None else on_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, scaled in place: there is one set of them."""
        assert ctx.grads is not None, "the gradients of a fused loss can be taken once"
        scaled = [None if grad is None else grad.mul_(grads[0]) for grad in ctx.grads]
        ctx.grads = None
        return (*scaled, None, None, None)


def _piece(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    collect: Callable[[StudentRows, int], Tensor],
    i: int,
) -> tuple[Tensor, Tensor]:
    """Piece i's loss [] and its gradient by the head's output before the soft cap, in the type of `hidden`."""
    logits = _logits(hidden, weight, bias, softcap)
    rows = _PieceRows(logits)
    with torch.enable_grad():
        loss = collect(rows, i)
    grad = rows.gradient(loss)
    if softcap is not None:
        grad *= 1 - (logits / softcap).square()
    return loss.detach(), grad.to(hidden.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else torch.tanh(logits / softcap).mul_(softcap)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a tensor for the product where the types allow."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
