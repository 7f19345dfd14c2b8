"""Scoring and training on 1, 2 and 4 Ray nodes of this machine, and on up to 1,024 that are simulated.

`python -m benchmarks.scaling`: tables, then one JSON object. The nodes are raylets of one machine with one CPU booked
on each, and each has the same work: beyond the machine's cores they share them. The simulation takes the spread of
steps and parts and the hand-over as measured here, and a scenario that it prints (`benchmarks.simulation`).
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.data import DataContext

from benchmarks import manifests, scheduling, simulation, table
from benchmarks.simulation import HOUR, Scenario
from cdm.calibration import WARM_UP, Record, read_records
from cdm.config import parse_config
from cdm.journal import run_folders, run_series
from ray_jobs.pipeline import run_stages

NODES = (1, 2, 4)
SIMULATED = (8, 32, 128, 512, 1024)
DOCUMENTS, PART_DOCUMENTS, STEPS, BATCH_TOKENS = 120, 10, 16, 2048  # documents and tokens a node
STEP, PART = 1.0, 30.0  # seconds that a step and a part are given in the simulation; their spread is measured
WORK = 24 * HOUR
PARTS = 20  # a node
RUNS = 200


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """So many raylets with one CPU each, and RAY_ADDRESS naming them."""
    os.environ.update(RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")
    DataContext.get_current().wait_for_min_actors_s = 300  # else the first engine may make all the parts
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            found.add_node(num_cpus=1)
        os.environ["RAY_ADDRESS"] = found.address
        yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        found.shutdown()


def config(nodes: int, storage: Path) -> dict[str, Any]:
    """The demo's models with random weights; documents and batch grow with the nodes."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "layers": 3, "heads": 4, "kv_heads": 4, "context": 512}
    made = {"type": "pretrain", "training": {"steps": 0}, **shape}
    teacher = {"name": "teacher", "architecture": "qwen2", "tokenizer": {"type": "byte_level_bpe", "vocab_size": 4096}}
    student = {
        "name": "student",
        "architecture": "llama",
        "tokenizer": {"type": "sentencepiece_bpe", "vocab_size": 2048},
    }
    return {
        "name": "scaling",
        "storage": str(storage),
        "corpus": {
            "type": "python_packages", "max_documents": DOCUMENTS * nodes, "max_response_bytes": 1000,
            "part_documents": PART_DOCUMENTS, "validation_share": 0.05, "test_share": 0.05,
        },
        "teachers": [
            {
                "model": {**made, **teacher}, "top_k": 100, "max_length": 512, "max_quarantined_share": 0.1,
                "engine": {"type": "transformers", "dtype": "float32", "batch_tokens": 2048},
            }
        ],
        "student": {
            "model": {**made, **student}, "steps": STEPS, "precision": "float32", "max_length": 512,
            "batch_tokens": BATCH_TOKENS * nodes, "micro_batch_tokens": BATCH_TOKENS, "validate_every": STEPS,
            "checkpoint_every": STEPS, "validation_documents": 4, "min_coverage": 0.5,
        },
        "method": {"type": "cdm"},
        "resources": {"teacher": {"actors": nodes}, "student": {"workers": nodes}},
        "tracking": {"type": "none"},
    }  # fmt: skip


def measured(nodes: int, storage: Path) -> dict[str, Record]:
    """The records of scoring and of training on so many nodes."""
    with cluster(nodes):
        if run_stages(parse_config(config(nodes, storage)), "train"):
            raise RuntimeError(f"the run on {nodes} nodes failed: {storage}/error.log")
    return {record.kind: record for record in read_records([str(storage)], gpus=False).runs}


def spread(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.mean(values)


def spreads(storage: Path) -> tuple[float, float]:
    """Coefficients of variation of a step's seconds a token, and of the seconds between parts of one engine."""
    (run,) = [folder for folder in run_folders(str(storage)) if Path(folder).name.startswith("train-")]
    rates = [rate for _, rate in run_series(run)["tokens_a_second"]][WARM_UP:]
    (shards,) = Path(storage, "shards").iterdir()
    written = sorted(file.stat().st_mtime for file in shards.glob("train-*.parquet"))
    between = [end - start for start, end in pairwise(written)]
    return spread([1 / rate for rate in rates]), spread(between[:-1])  # the last part is shorter


def measure_nodes(root: Path) -> tuple[dict[str, float], tuple[float, float]]:
    cores, rows = len(os.sched_getaffinity(0)), []
    figures: dict[str, float] = {}
    found = {nodes: measured(nodes, root / str(nodes)) for nodes in NODES}
    for kind in ("scoring", "training"):
        alone = found[1][kind].tokens_a_second
        assert alone is not None
        for nodes in NODES:
            record = found[nodes][kind]
            assert record.tokens_a_second is not None
            share = record.tokens_a_second / alone
            of_cores = share * nodes / min(nodes, cores)
            figures |= {f"{kind}_{nodes}_nodes_tokens_a_second": record.tokens_a_second * nodes}
            figures |= {f"{kind}_{nodes}_nodes_efficiency_of_cores": of_cores}
            cells = (
                f"{record.tokens_a_second * nodes:,.0f}",
                f"{share:.0%}",
                f"{of_cores:.0%}",
                f"{record.fixed or 0:.1f}",
            )
            rows.append((f"{kind}, {nodes}{'' if nodes <= cores else ' (oversubscribed)'}", *cells))
    columns = ("nodes", "tokens/s", "a node, of one", "of the cores", "start and end, s")
    table.show(f"The same work a node; {cores} cores, one CPU booked on each node", columns, rows)
    return figures, spreads(root / "1")


def simulate(steps: float, parts: float, handover: float) -> dict[str, float]:
    scenario = Scenario(step=STEP, part=PART, spread=steps, handover=handover)
    print("Scenario:", ", ".join(f"{k} {v:.4g}" for k, v in dataclasses.asdict(scenario).items()), "\n")
    return simulate_training(scenario) | simulate_scoring(dataclasses.replace(scenario, spread=parts))


def simulate_training(scenario: Scenario) -> dict[str, float]:
    figures: dict[str, float] = {}
    rows = []
    for nodes in SIMULATED:
        cost, mean = scenario.checkpoint_seconds(nodes), scenario.node_failure / nodes
        best, rng = simulation.best_interval(scenario, nodes, seed=nodes), np.random.default_rng(nodes)
        pace = simulation.pace(scenario, nodes, rng)
        runs = [simulation.train(scenario, nodes, best, WORK, rng, pace) for _ in range(RUNS)]
        useful, waiting, saved, failures = np.mean(
            [(run.useful, run.stragglers, run.checkpoints, run.failures) for run in runs], axis=0
        )
        young, daly = simulation.young(cost, mean), simulation.daly(cost, mean)
        figures |= {f"train_{nodes}_efficiency": useful, f"train_{nodes}_lost_to_failures": failures}
        figures |= {f"train_{nodes}_best_interval_s": best, f"train_{nodes}_daly_s": daly}
        seconds = (f"{mean / HOUR:,.1f}", f"{cost:.1f}", f"{best:,.0f}", f"{young:,.0f}", f"{daly:,.0f}")
        rows.append((f"{nodes:,}", *seconds, f"{useful:.1%}", f"{waiting:.1%}", f"{saved:.2%}", f"{failures:.2%}"))
    columns = ("nodes", "failure every, h", "checkpoint, s", "best interval, s", "Young", "Daly")
    shares = ("useful", "waiting", "checkpoints", "failures")
    table.show(f"Training, simulated: {WORK / HOUR:.0f} h of steps, mean of {RUNS} runs", (*columns, *shares), rows)
    return figures


def simulate_scoring(scenario: Scenario) -> dict[str, float]:
    figures: dict[str, float] = {}
    rows = []
    for nodes in SIMULATED:
        run = simulation.score(scenario, nodes, PARTS * nodes, np.random.default_rng(nodes))
        figures |= {f"score_{nodes}_efficiency": run.efficiency, f"score_{nodes}_driver_busy": run.driver}
        moved = scenario.part_seconds(nodes) - PART
        cells = (f"{run.efficiency:.1%}", f"{run.lost:.2%}", f"{run.driver:.0%}", f"{moved:.2f}")
        rows.append((f"{nodes:,}", *cells, f"{run.seconds / 60:,.1f}"))
    columns = ("nodes", "efficiency", "lost to failures", "driver busy", "bytes of a part, s", "minutes")
    table.show(f"Scoring, simulated: {PARTS} parts of {PART:.0f} s a node", columns, rows)
    return figures


def main() -> None:
    print(f"Machine: {table.machine()}.\n")
    with tempfile.TemporaryDirectory() as folder:
        figures, (steps, parts) = measure_nodes(Path(folder))
    with cluster(1):
        ray.init(log_to_driver=False)
        handover = scheduling.handover_seconds()
    million = manifests.measure()
    listing = scheduling.listing_seconds()
    rows = [
        ("manifest and table of parts, written", f"{million['table_write_s']:.1f} s"),
        ("the same, read", f"{million['table_read_s']:.1f} s"),
        ("listing: which parts are missing", f"{listing:.1f} s"),
        ("hand-over of a part, measured on 1,500", f"{handover * 1e3:.1f} ms"),
        ("hand-over of all, reckoned from it", f"{handover * manifests.PARTS / HOUR:.1f} h"),
    ]
    print()
    table.show(f"{manifests.PARTS:,} parts", ("", "takes"), rows)
    figures |= {"handover_ms": handover * 1e3, "listing_s": listing, **million}
    figures |= {"step_spread": steps, "part_spread": parts}
    table.finish(figures | simulate(steps, parts, handover))


if __name__ == "__main__":
    main()
