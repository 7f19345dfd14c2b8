"""How a student in training does on the validation split, and which step was the best so far (layer 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cdm.batches import AlignedData, Row, micro_batches, token_bytes
from cdm.checkpoints import Metrics, Progress
from cdm.config_models import Best
from cdm.evaluation import LN2, read_sums, response_sums
from cdm.head import Sums
from cdm.pieces import Piece
from cdm.records import AlignedBatch
from cdm.rows import StudentRows
from cdm.step import Objective, StudentModel, global_sums, to_device
from cdm.vocab_map import VocabMap

VALIDATION_METRICS = ("validation_bits_per_byte", "validation_kd", "validation_agreement")
HIGHER_IS_BETTER = ("validation_agreement",)


class Validation:
    """The first documents of the validation split, measured as `cdm.evaluation` does, and the method's own loss there.

    shards, maps: as a TrainingJob has them. collated: rows to a batch, as in training.
    """

    def __init__(
        self,
        aligned: str,
        shards: Sequence[str],
        maps: Sequence[str | None],
        *,
        objective: Objective,
        documents: int,
        micro_batch_tokens: int,
        collated: Callable[[Sequence[Row]], AlignedBatch],
    ) -> None:
        # Cross-entropy alone reads the first teacher's scores for the agreement, and no others.
        self._data = AlignedData.open(aligned, shards if objective.terms else shards[:1], "validation")
        self._rows = np.arange(min(len(self._data), documents))
        first = maps[0] if maps else None
        self._exact = None if first is None else torch.from_numpy(VocabMap.load(first).exact).long()
        self._objective, self._tokens, self._collated = objective, micro_batch_tokens, collated

    @torch.no_grad()
    def measure(self, model: StudentModel) -> Metrics:
        """validation_bits_per_byte; validation_kd, the teachers' weighted terms, where the method has some;
        validation_agreement where there is a teacher. Collective.
        """
        device = model.model.device
        images = self._images(model)
        sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("nats", "bytes")}
        model.eval()
        for chunk in self._chunks():
            documents = [self._data.row(number) for number in chunk]
            sizes = torch.from_numpy(token_bytes(documents)).to(device)
            batch = to_device(self._collated(documents), device)
            found = read_sums(model, batch, partial(self._piece_sums, sizes=sizes, images=images))
            for name, value in (found | {"bytes": sizes.sum()}).items():
                sums[name] = sums.get(name, 0.0) + value
        model.train()
        return self._metrics(global_sums(sums, device))

    def _chunks(self) -> list[np.ndarray]:
        """This worker's, as many as every other's."""
        world = dist.get_world_size()
        chunks = micro_batches(self._rows, self._data.sizes["tokens_s"], world=world, micro_batch_tokens=self._tokens)
        return chunks[dist.get_rank() :: world]

    def _images(self, model: StudentModel) -> Tensor:
        """The student's id of each of the first teacher's; the same id where the tokenizer is the student's own."""
        device, size = model.model.device, model.model.get_output_embeddings().out_features
        return torch.arange(size, device=device) if self._exact is None else self._exact.to(device)

    def _piece_sums(self, rows: StudentRows, piece: Piece, *, sizes: Tensor, images: Tensor) -> Sums:
        sums = response_sums(rows, piece, sizes=sizes, images=images if piece.teachers else None)
        kd = torch.zeros((), dtype=torch.float64, device=sizes.device)
        for k, (term, weight) in enumerate(zip(self._objective.terms, self._objective.weights, strict=True)):
            groups = int(self._data.sizes[f"groups{k}"][self._rows].sum())
            if groups:
                kd += weight * term(rows, piece.teachers[k], piece).total / groups
        return sums | {"kd": kd}

    def _metrics(self, totals: dict[str, float]) -> Metrics:
        found = {"bits_per_byte": totals["nats"] / totals["bytes"] / LN2}
        if self._objective.terms:
            found["kd"] = totals["kd"]
        if totals.get("shared"):
            found["agreement"] = totals["agreed"] / totals["shared"]
        return {f"validation_{name}": value for name, value in found.items()}


def judged(progress: Progress, metrics: Metrics, best: Best | None) -> Progress:
    """The progress after a validation at its step; equal to the best so far is not better.

    Raises ValueError where the metric is not among those that were measured.
    """
    if best is None:
        return progress
    if best.metric not in metrics:
        raise ValueError(f"student.best.metric: {best.metric} could not be measured on the validation split")
    value = metrics[best.metric]
    sign = 1 if best.metric in HIGHER_IS_BETTER else -1
    if math.isfinite(value) and (progress.best is None or sign * value > sign * progress.best):
        return replace(progress, best=value, best_step=progress.step, stale=0)
    return replace(progress, stale=progress.stale + 1)


def has_ended(progress: Progress, steps: int, best: Best | None) -> bool:
    """Whether all steps are done, or no validation was better for too long."""
    return progress.step >= steps or (
        best is not None and best.patience is not None and progress.stale >= best.patience
    )
