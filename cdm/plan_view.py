"""`cdm plan`: sizes gathered, the plan made and printed (layer 2)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cdm import parts
from cdm.calibration import Records, read_records
from cdm.config import Config, storage_path
from cdm.config_models import Teacher
from cdm.corpus_size import MEASURED, CorpusSize, corpus_size, side
from cdm.model_size import ModelSize, model_config
from cdm.planning import Fit, Plan, Sizes, Stage, fit_problems, make_plan, student_fit
from cdm.preflight import GIB
from cdm.rates import CPU, Pools, Rates, cluster_pools, load_rates, pools_of
from cdm.speeds import Speeds

ORDERS = range(6, 13)  # powers of ten of the corpus's tokens


def print_plan(config: Config, cluster: str | None, prices: str | None, console: Console) -> list[str]:
    """Prints what a config takes; returns a line for each thing that cannot be held. Nothing is written or started.

    Raises ValueError: a device or instance that the rates lack, a model or corpus that cannot be read.
    """
    rates = load_rates(prices)
    corpus, sizes = sizes_of(config, rates)
    _print_sizes(config, corpus, sizes, console)
    teacher, student = config.resources.teacher, config.resources.student
    if cluster is not None:
        pools = cluster_pools(cluster, teacher, student, rates)
    elif teacher.gpus or student.gpus:
        return _print_devices(config, sizes, rates, console)
    else:
        pools = pools_of(teacher, student, (CPU, CPU), os.cpu_count() or 1)
    storages = [storage_path(config), storage_path(config, MEASURED)]
    records = read_records(storages, gpus=bool(teacher.gpus or student.gpus))
    plan = make_plan(config, sizes, pools, rates, records)
    fit = student_fit(model_config(config.student.model), config.student, pools.student, rates)
    _print_stages(config, plan, records, console)
    _print_memory(fit, pools, console)
    _print_orders(lambda scaled: make_plan(config, scaled, pools, rates, records), sizes, console)
    _print_error(Speeds(config, records, rates, sizes.side_s, sizes.sides_t), console)
    return fit_problems(config, sizes, pools, rates, fit)


def sizes_of(config: Config, rates: Rates) -> tuple[CorpusSize, Sizes]:
    """What the models and the corpus are."""
    corpus, storage = corpus_size(config), storage_path(config)
    sides_t = tuple(side(t.model, t.max_length, corpus, storage, rates) for t in config.teachers)
    side_s = side(config.student.model, config.student.max_length, corpus, storage, rates)
    teachers = tuple(ModelSize.of(model_config(teacher.model)) for teacher in config.teachers)
    student = ModelSize.of(model_config(config.student.model))
    shard_bytes = tuple(_shard_bytes(teacher, storage, rates) for teacher in config.teachers)
    generator = None if config.generation is None else ModelSize.of(model_config(config.generator.model))
    return corpus, Sizes(corpus.documents, corpus.shares, student, teachers, side_s, sides_t, shard_bytes, generator)


def _shard_bytes(teacher: Teacher, storage: str, rates: Rates) -> float:
    """Of a scored token: in finished shards of this teacher and k, else by the table."""
    for folder in sorted(Path(storage, "shards").glob("*/")):
        if parts.is_finished(str(folder)):
            manifest = parts.read_manifest(str(folder))
            wanted = {"teacher": teacher.model.name, "k": teacher.top_k, "top_mass": teacher.top_mass}
            if wanted.items() <= manifest.meta.items() and manifest.meta["tokens"]:
                return manifest.bytes / manifest.meta["tokens"]
    return rates.shard_bytes.token + rates.shard_bytes.kept * teacher.top_k


# --- tables ------------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _print_sizes(config: Config, corpus: CorpusSize, sizes: Sizes, console: Console) -> None:
    table = _table(
        f"{corpus.documents:,} documents ({corpus.source})", "", "weights", "prompt", "response", "tokens", ""
    )
    names = [section.model.name for section in (*config.teachers, config.student)]
    sides = zip(names, [*sizes.teachers, sizes.student], [*sizes.sides_t, sizes.side_s], strict=True)
    for name, size, one in sides:
        tokens = f"{sizes.documents * one.tokens:,.0f}"
        table.add_row(name, f"{size.weights:,}", f"{one.prompt:,.0f}", f"{one.response:,.0f}", tokens, one.source)
    console.print(table)
    for teacher, each, total in zip(config.teachers, sizes.shard_bytes, _shards(sizes), strict=True):
        console.print(f"shards of {teacher.model.name}: {total / GIB:,.2f} GiB, {each:,.0f} bytes a scored token")


def _shards(sizes: Sizes) -> list[float]:
    sides = zip(sizes.sides_t, sizes.shard_bytes, strict=True)
    return [sizes.documents * one.response * each for one, each in sides]


def _print_stages(config: Config, plan: Plan, records: Records, console: Console) -> None:
    took = {stage.title: records.took(config, stage.title) for stage in plan.stages}
    known = ("took",) if any(took.values()) else ()
    table = _table("Stages", "stage", "on", "Pflop", "speed", "work", "start, end", "takes", *known)
    for stage in plan.stages:
        ran = took[stage.title]
        cells = [_seconds(stage.work), _seconds(stage.fixed), _seconds(stage.seconds)]
        cells += ["" if ran is None else _seconds(ran)] if known else []
        flops = f"{stage.flops / 1e15:,.3g}" if stage.flops else ""
        table.add_row(stage.title, _where(stage), flops, stage.source, *cells)
    console.print(table)
    teacher, student = (plan.hours(pool) for pool in (plan.pools.teacher, plan.pools.student))
    console.print(f"wall time {_seconds(plan.seconds)}; device-hours: teacher {teacher:,.3g}, student {student:,.3g}")
    if {plan.pools.teacher.device, plan.pools.student.device} != {CPU}:
        console.print(f"cost at the table's prices: {_cost(plan)}")


def _where(stage: Stage) -> str:
    if stage.pool is None:
        return ""
    return f"{stage.processes * stage.pool.devices:g} {stage.pool.device}"


def _cost(plan: Plan) -> str:
    return f"${plan.dollars('on_demand'):,.2f} on demand, ${plan.dollars('spot'):,.2f} on spot nodes"


def _print_memory(fit: Fit, pools: Pools, console: Console) -> None:
    memory = fit.memory
    table = _table(f"Memory of one of {pools.student.processes} student workers while it trains", "", "GiB")
    parts_of = {
        "weights, gradients, optimiser": memory.state,
        "gathered layers": memory.gathered,
        "logits": memory.logits,
        "activations, about": memory.activations,
        "all": fit.need,
    }
    for name, size in parts_of.items():
        table.add_row(name, f"{size / GIB:,.2f}")
    console.print(table)
    if pools.student.device == CPU:
        console.print("on processors memory is not compared: workers share the machine's")
        return
    smallest = f"smallest pool that does: {fit.smallest}" if fit.smallest else "no number of workers does"
    verdict = "fits" if fit.fits else "does not fit"
    console.print(f"{pools.student.device} has {fit.device / GIB:,.0f} GiB: {verdict}; {smallest}")


def _print_orders(plan_for: Callable[[Sizes], Plan], sizes: Sizes, console: Console) -> None:
    table = _table(
        "By size of the corpus, with as many passes over it",
        "teacher's tokens", "shards, GiB", "teacher h", "student h", "wall time", "on demand", "spot",
    )  # fmt: skip
    for order in ORDERS:
        scaled = sizes.scaled(10.0**order)
        plan = plan_for(scaled)
        hours = [f"{plan.hours(pool):,.3g}" for pool in (plan.pools.teacher, plan.pools.student)]
        dollars = [f"${plan.dollars(price):,.0f}" for price in ("on_demand", "spot")]
        table.add_row(f"1e{order}", f"{sum(_shards(scaled)) / GIB:,.3g}", *hours, _seconds(plan.seconds), *dollars)
    console.print(table)


def _print_devices(config: Config, sizes: Sizes, rates: Rates, console: Console) -> list[str]:
    """A row a device: the config's resources on nothing but that. Problems only where no device will do."""
    table = _table(
        "The config's pools on each device of the table (name a cluster file for its own: --cluster)",
        "device", "GiB a worker", "of", "least workers", "teacher h", "student h", "wall time", "on demand", "spot",
    )  # fmt: skip
    problems: dict[str, list[str]] = {}
    resources, hf = config.resources, model_config(config.student.model)
    for name in [name for name in rates.devices if name != CPU]:
        pools = pools_of(resources.teacher, resources.student, (name, name), os.cpu_count() or 1)
        fit = student_fit(hf, config.student, pools.student, rates)
        plan = make_plan(config, sizes, pools, rates, Records((), ()))
        problems[name] = fit_problems(config, sizes, pools, rates, fit)
        smallest = f"{fit.smallest}" if fit.smallest else "none"
        hours = [f"{plan.hours(pool):,.3g}" for pool in (pools.teacher, pools.student)]
        dollars = [f"${plan.dollars(price):,.2f}" for price in ("on_demand", "spot")]
        memory = (f"{fit.need / GIB:,.1f}", f"{fit.device / GIB:,.0f}", smallest)
        style = "dim" if problems[name] else None
        table.add_row(name, *memory, *hours, _seconds(plan.seconds), *dollars, style=style)
    console.print(table)
    console.print("speeds are the table's assumptions; prices are examples")
    return problems[next(iter(problems))] if all(problems.values()) else []


def _print_error(speeds: Speeds, console: Console) -> None:
    errors, count = speeds.errors, len(speeds.observed)
    if not count:
        console.print("not calibrated: no finished runs in the storage folder; `cdm plan --measure` makes small ones")
        return
    off = f", predicted from one another they are off by {statistics.mean(map(abs, errors)):.0%}" if errors else ""
    worst = f" ({max(map(abs, errors)):.0%} at worst)" if errors else ""
    console.print(f"calibrated on {count} run{'s' if count > 1 else ''} of this storage folder{off}{worst}")


def _seconds(seconds: float) -> str:
    for unit, size, most in (("s", 1, 600), ("min", 60, 3 * 3600), ("h", 3600, 72 * 3600)):
        if seconds < most:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds / 86400:,.1f} days"
