"""Operations a second of a process: of the same model and method, else of its kind of work, else the table's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from cdm.calibration import Record, Records
from cdm.config import Config
from cdm.config_models import Pretrain, Student, Teacher
from cdm.corpus_size import Side
from cdm.model_size import ModelSize, model_config, training_flops
from cdm.rates import Pool, Rates


@dataclass(frozen=True)
class Observed:
    """What a record says in operations. own: model and method, which tell its speed from that of its kind."""

    kind: str
    own: tuple[str, str]
    flops_a_second: float


@dataclass(frozen=True)
class Speeds:
    """Records count in tokens: their operations are those of this config's documents (side_s, sides_t)."""

    config: Config
    records: Records
    rates: Rates
    side_s: Side
    sides_t: tuple[Side, ...]

    def scoring(self, model: str, pool: Pool) -> tuple[float, str]:
        """Operations a second of an engine, and where that is from."""
        device = self.rates.device(pool.device)
        table = device.flops * device.prefill_mfu * pool.devices
        return _chosen(self.observed, "scoring", (model, ""), table)

    def training(self, model: str, method: str, pool: Pool) -> tuple[float, str]:
        """Operations a second of a worker, and where that is from."""
        device = self.rates.device(pool.device)
        table = device.flops * device.training_mfu * pool.a_worker
        return _chosen(self.observed, "training", (model, method), table)

    def fixed(self, kind: str, title: str, table: float) -> float:
        """Seconds of a stage beside its work: of this stage, else of its kind, else the table's."""
        known = [r for r in self.records.runs if r.kind == kind and r.fixed is not None]
        same = [r.fixed for r in known if r.title == title] or [r.fixed for r in known]
        return statistics.mean(value for value in same if value is not None) if same else table

    @cached_property
    def observed(self) -> tuple[Observed, ...]:
        return tuple(_all_observed(self.records, self.side_s, self.sides_t[0]))

    @cached_property
    def errors(self) -> tuple[float, ...]:
        """For each observed run, how far the others predict its seconds: 0.2 is a fifth too long or too short.

        Runs that nothing else of their kind speaks for have none: the table would be judged, not the model.
        """
        found = []
        for i, one in enumerate(self.observed):
            others = self.observed[:i] + self.observed[i + 1 :]
            if any(other.kind == one.kind for other in others):
                predicted, _ = _chosen(others, one.kind, one.own, 0.0)
                found.append(one.flops_a_second / predicted - 1)
        return tuple(found)


def _chosen(observed: tuple[Observed, ...], kind: str, own: tuple[str, str], table: float) -> tuple[float, str]:
    of_kind = [one for one in observed if one.kind == kind]
    same = [one.flops_a_second for one in of_kind if one.own == own]
    if same:
        return statistics.geometric_mean(same), "measured"
    if of_kind:
        return statistics.geometric_mean(one.flops_a_second for one in of_kind), f"other {kind} runs"
    return table, "table"


def _all_observed(records: Records, side_s: Side, side_t: Side) -> Iterator[Observed]:
    for record in records.runs:
        counted = _OPERATIONS.get(record.kind)
        if counted is not None and record.tokens_a_second:
            yield Observed(
                record.kind, (record.model, record.method), record.tokens_a_second * counted(record, side_s, side_t)
            )


def _scored_token(record: Record, side_s: Side, side_t: Side) -> float:
    """Operations a scored token, its share of the prompt included."""
    teacher = next((t for t in record.config.teachers if t.model.name == record.model), None)
    section: Teacher | Student = teacher or record.config.student
    return ModelSize.of(model_config(section.model)).scoring(side_t.documents(1)) / side_t.response


def _trained_token(record: Record, side_s: Side, side_t: Side) -> float:
    if record.method != "pretrain":
        student = record.config.student
        return training_flops(ModelSize.of(model_config(student.model)), side_s.a_token(), student)
    sections: list[Teacher | Student] = [*record.config.teachers, record.config.student]
    section = next(s for s in sections if s.model.name == record.model)
    assert isinstance(section.model, Pretrain)
    side = side_s if isinstance(section, Student) else side_t
    recomputed = section.model.training.activation_checkpointing
    return ModelSize.of(model_config(section.model)).training(side.a_token(every_row=True), recomputed=recomputed)


_OPERATIONS: dict[str, Callable[[Record, Side, Side], float]] = {"scoring": _scored_token, "training": _trained_token}
