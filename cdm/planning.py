"""What a config takes before anything of it runs: seconds, device-hours, bytes, memory, dollars (layer 2).

    seconds of a stage = operations / (processes x operations a second of one) + what it takes to start and end

Operations come from the models' shapes (`model_size`), operations a second from earlier runs of the storage folder
(`calibration`) and, where there are none, from the table of devices (`rates`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cdm.calibration import Records
from cdm.config import Config
from cdm.config_methods import AnyMethod, label
from cdm.config_models import Optimisation, Pretrain, Student, Teacher
from cdm.corpus_size import Side
from cdm.model_size import ModelSize, Work, model_config, training_flops
from cdm.preflight import GIB, Memory, training_memory
from cdm.rates import CPU, Pool, Pools, Rates
from cdm.speeds import Speeds

DECODED_AT_ONCE = 64  # sequences that an engine writes together
DECODE_SHARE = 0.6  # of the memory's bandwidth, while they are written
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """documents and their shares by split; the models and the tokens of each side; a scored token's bytes.

    generator: who writes responses, where that is not the first teacher. passes: how often the steps of the config are
    made, 1 but for another size of the corpus.
    """

    documents: float
    shares: dict[str, float]
    student: ModelSize
    teachers: tuple[ModelSize, ...]
    side_s: Side
    sides_t: tuple[Side, ...]
    shard_bytes: tuple[float, ...]
    generator: ModelSize | None = None
    passes: float = 1.0

    def scaled(self, tokens: float) -> Sizes:
        """The corpus with so many tokens of the first teacher's, and as many more steps: the same passes over it."""
        times = tokens / (self.documents * self.sides_t[0].tokens)
        return replace(self, documents=self.documents * times, passes=self.passes * times)


@dataclass(frozen=True)
class Stage:
    """pool: whose devices work, teacher's or student's; none: processors of the head. work, fixed: seconds."""

    title: str
    pool: Pool | None
    processes: int
    flops: float
    work: float
    fixed: float
    source: str = ""

    @property
    def seconds(self) -> float:
        return self.work + self.fixed


@dataclass(frozen=True)
class Plan:
    stages: tuple[Stage, ...]
    pools: Pools
    rates: Rates

    @cached_property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def hours(self, pool: Pool) -> float:
        """Device-hours of a pool while its stages run."""
        return self._pool_seconds(pool) / 3600 * pool.processes * pool.devices

    def _pool_seconds(self, pool: Pool) -> float:
        return sum(stage.seconds for stage in self.stages if stage.pool is pool)

    def dollars(self, price: str) -> float:
        """`on_demand` or `spot`: whole nodes while their pool's stages run and until they are given back, and the head
        (on demand) all the time.
        """
        total = 0.0
        for pool in (self.pools.teacher, self.pools.student):
            paid = self._pool_seconds(pool) + pool.idle_seconds
            devices = pool.nodes * pool.node_devices
            total += paid / 3600 * devices * getattr(self.rates.device(pool.device), price)
        if self.pools.head is not None:
            device, count = self.pools.head
            total += self.seconds / 3600 * count * self.rates.device(device).on_demand
        return total


def make_plan(config: Config, sizes: Sizes, pools: Pools, rates: Rates, records: Records) -> Plan:
    """Every stage of a config in order. Raises ValueError for a device that the rates lack."""
    planner = _Planner(config, sizes, pools, rates, Speeds(config, records, rates, sizes.side_s, sizes.sides_t))
    return Plan(tuple(planner.stages()), pools, rates)


@dataclass(frozen=True)
class _Planner:
    config: Config
    sizes: Sizes
    pools: Pools
    rates: Rates
    speeds: Speeds

    def stages(self) -> list[Stage]:
        config, sizes, fixed = self.config, self.sizes, self.rates.fixed_seconds
        asked: list[Teacher | Student] = [*config.teachers, config.student]
        made = {s.model.name: s.model for s in asked if isinstance(s.model, Pretrain)}
        found = [
            self._processors("command", fixed=fixed.command),
            self._processors("corpus", sizes.documents / self.rates.corpus_documents_a_second),
        ]
        for model in made.values():
            found.append(self._processors(f"initialise {model.name}", fixed=fixed.models))
            if model.training.steps:
                found.append(self._pretrained(model))
        documents = sizes.documents
        if config.generation is not None:
            stage, documents = self._generated()
            found.append(stage)
        for k, teacher in enumerate(config.teachers):
            found.append(self._scored(teacher, sizes.teachers[k], sizes.sides_t[k], documents))
        found.append(self._processors("align", self._align_seconds(documents, made)))
        found += [self._trained(method) for method in [*config.baselines, config.method]]
        return [*found, self._evaluated()]

    def _processors(self, title: str, work: float = 0.0, fixed: float = 0.0) -> Stage:
        return Stage(title, None, 1, 0.0, work, fixed)

    def _align_seconds(self, documents: float, made: dict[str, Pretrain]) -> float:
        """The student's alignment, and the tokenisation for each model that is pretrained; parts bound the cores."""
        cores = min(self.pools.cpus, max(1, math.ceil(documents / self.config.corpus.part_documents)))
        tokens = documents * self.sizes.side_s.tokens
        tokens += sum(self.sizes.documents * self._side(name).tokens for name, m in made.items() if m.training.steps)
        return tokens / (self.rates.aligned_tokens_a_second * cores)

    def _side(self, name: str) -> Side:
        names = [teacher.model.name for teacher in self.config.teachers]
        return self.sizes.sides_t[names.index(name)] if name in names else self.sizes.side_s

    # --- engines

    def _scored(self, teacher: Teacher, size: ModelSize, side: Side, documents: float) -> Stage:
        """The busiest engine's documents: an engine makes whole parts."""
        pool, part = self.pools.teacher, self.config.corpus.part_documents
        engines = min(pool.processes, max(1, math.ceil(documents / part)))
        busiest = max(documents / engines, min(documents, part))
        title = f"score {teacher.model.name}"
        rate, source = self.speeds.scoring(teacher.model.name, pool)
        work = busiest * size.scoring(side.documents(1)) / rate
        fixed = self.speeds.fixed("scoring", title, self.rates.fixed_seconds.engine)
        return Stage(title, pool, engines, size.scoring(side.documents(documents)), work, fixed, source)

    def _generated(self) -> tuple[Stage, float]:
        """Writing is bound by reading the weights, once for DECODED_AT_ONCE tokens. And the documents afterwards.

        How many responses are missing is not known before: all of the training split's are taken to be written.
        """
        asked, section = self.config.generation, self.config.generator
        assert asked is not None
        pool, device = self.pools.teacher, self.rates.device(self.pools.teacher.device)
        size, side = self.sizes.generator or self.sizes.teachers[0], self.sizes.sides_t[0]
        written = self.sizes.documents * self.sizes.shares["train"] * asked.samples
        tokens = written * min(side.response, asked.max_tokens)
        rate, source = self.speeds.scoring(section.model.name, pool)
        prefill = size.scoring(Work(written * side.prompt, 0.0, 0.0)) / rate
        read = size.weights * BYTES[section.engine.dtype] / (device.bandwidth * DECODE_SHARE * pool.devices)
        work = (prefill + tokens / DECODED_AT_ONCE * read) / pool.processes
        title, flops = f"generate {section.model.name}", size.scoring(Work(written * side.tokens, 0.0, tokens))
        fixed = self.speeds.fixed("scoring", title, self.rates.fixed_seconds.engine)
        kept = self.sizes.documents * (1 - self.sizes.shares["train"]) + written
        return Stage(title, pool, pool.processes, flops, work, fixed, source), kept

    # --- workers

    def _pretrained(self, model: Pretrain) -> Stage:
        size, side = ModelSize.of(model_config(model)), self._side(model.name)
        work = side.a_token(every_row=True) * model.training.batch_tokens
        recomputed = model.training.activation_checkpointing
        flops = size.training(work, recomputed=recomputed)
        title = f"pretrain {model.name}"
        return self._steps(title, model.training, size, side, flops, (model.name, "pretrain"), passes=1.0)

    def _trained(self, method: AnyMethod) -> Stage:
        section, size, side = self.config.student, self.sizes.student, self.sizes.side_s
        flops = training_flops(size, side.a_token() * section.batch_tokens, section)
        key = (section.model.name, method.type)
        return self._steps(f"train {label(method)}", section, size, side, flops, key, passes=self.sizes.passes)

    def _steps(
        self,
        title: str,
        how: Optimisation,
        size: ModelSize,
        side: Side,
        step: float,
        key: tuple[str, str],
        passes: float,
    ) -> Stage:
        """Steps, and a validation every so many, at the last one and at the export."""
        pool = self.pools.student
        rate, source = self.speeds.training(*key, pool)
        steps = how.steps * passes
        documents = min(how.validation_documents, self.sizes.documents * self.sizes.shares["validation"])
        validated = (steps // how.validate_every + (1 if steps % how.validate_every else 0) + 1) if steps else 0
        flops = steps * step + validated * size.scoring(side.documents(documents))
        fixed = self.speeds.fixed("training", title, self.rates.fixed_seconds.workers)
        return Stage(title, pool, pool.processes, flops, flops / (rate * pool.processes), fixed, source)

    def _evaluated(self) -> Stage:
        """The student before and after every method: a forward pass and some completions, a model a worker."""
        config, sizes, pool = self.config, self.sizes, self.pools.student
        asked, models = config.evaluation, 2 + len(config.baselines)
        documents = min(asked.documents, sizes.documents * sizes.shares["test"])
        flops = sizes.student.scoring(sizes.side_s.documents(documents))
        rate, source = self.speeds.training(config.student.model.name, config.method.type, pool)
        fixed = self.speeds.fixed("evaluation", "evaluate", self.rates.fixed_seconds.evaluation)
        read = sizes.student.weights * BYTES["float32"] / (self.rates.device(pool.device).bandwidth * DECODE_SHARE)
        one = flops / rate + asked.samples * asked.sample_tokens * read
        work = one * math.ceil(models / pool.processes)
        return Stage("evaluate", pool, pool.processes, models * flops, work, fixed, source)


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What a worker needs while it trains, on a device of so many bytes. smallest: workers that suffice, 0: none do."""

    memory: Memory
    device: int
    smallest: int

    @property
    def need(self) -> int:
        return self.memory.least + self.memory.activations

    @property
    def fits(self) -> bool:
        return self.need <= self.device


def student_fit(hf: Any, section: Student, pool: Pool, rates: Rates) -> Fit:
    """Weights, gradients and moments are shared by the workers; the rest every one of them needs."""
    device = int(rates.device(pool.device).memory_gib * pool.a_worker * GIB)
    alone = training_memory(hf, section, 1)
    left = device - (alone.gathered + alone.logits + alone.activations)
    smallest = math.ceil(alone.state / left) if left > 0 else 0
    return Fit(training_memory(hf, section, pool.processes), device, smallest)


def teacher_devices(size: ModelSize, teacher: Teacher, device_gib: float) -> int:
    """Devices that an engine needs for its weights: a power of two, for tensor parallelism."""
    engine: Any = teacher.engine
    share = engine.gpu_memory_utilization if engine.type == "vllm" else 0.9
    count = size.weights * BYTES[engine.dtype] / (share * device_gib * GIB)
    return 1 << max(0, math.ceil(math.log2(count)))


def fit_problems(config: Config, sizes: Sizes, pools: Pools, rates: Rates, fit: Fit) -> list[str]:
    """A line for each thing that cannot be held by the devices, or by the nodes that a cluster file allows."""
    found = []
    if pools.student.device != CPU and not fit.fits:
        way = (
            f"the smallest pool that does is {fit.smallest} workers (resources.student.workers, now "
            f"{pools.student.processes})"
            if fit.smallest
            else "no number of workers does: lower student.micro_batch_tokens, or set student.activation_checkpointing"
        )
        found.append(
            f"student {config.student.model.name}: a worker needs about {fit.need / GIB:,.1f} GiB, "
            f"{pools.student.device} has {fit.device / GIB:,.0f}; {way}"
        )
    for teacher, size in zip(config.teachers, sizes.teachers, strict=True):
        if pools.teacher.device == CPU:
            continue
        needed = teacher_devices(size, teacher, rates.device(pools.teacher.device).memory_gib)
        if needed > pools.teacher.devices:
            found.append(
                f"teacher {teacher.model.name}: its weights need {needed} {pools.teacher.device} an engine, "
                f"resources.teacher.gpus is {pools.teacher.devices:g}; raise it and engine.tensor_parallel_size"
            )
    for pool in (pools.teacher, pools.student):
        if pool.most_nodes is not None and pool.nodes > pool.most_nodes:
            found.append(f"resources.{pool.name} needs {pool.nodes} nodes, the cluster file allows {pool.most_nodes}")
    return found
