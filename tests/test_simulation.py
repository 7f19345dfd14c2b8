"""The simulated cluster against closed forms and a simulation that goes chunk by chunk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.scaling import config
from benchmarks.scheduling import NoWork, listing_seconds
from benchmarks.simulation import (
    HOUR,
    Scenario,
    best_interval,
    daly,
    expected_seconds,
    lognormal,
    pace,
    score,
    train,
    young,
)
from cdm.config import parse_config

SCENARIO = Scenario(step=1.0, part=30.0, spread=0.2, handover=0.01)


def slow_train(
    cost: float, mean: float, restart: float, interval: float, work: float, rng: np.random.Generator
) -> float:
    """Seconds, one chunk at a time; a failure may come at any moment, in a restart too."""
    clock, left, failure = 0.0, work, rng.exponential(mean)
    while left > 0:
        chunk = min(interval, left)
        took = chunk + (cost if chunk < left else 0.0)
        if clock + took <= failure:
            clock, left = clock + took, left - chunk
            continue
        clock = failure
        while True:
            failure = clock + rng.exponential(mean)
            if failure > clock + restart:
                break
            clock = failure
        clock += restart
    return clock


@pytest.mark.parametrize(("nodes", "interval"), [(8, 600.0), (512, 160.0), (1024, 20.0), (1024, 2000.0)])
def test_training_is_that_of_the_slow_twin_and_of_daly(nodes: int, interval: float) -> None:
    cost, mean, work = SCENARIO.checkpoint_seconds(nodes), SCENARIO.node_failure / nodes, 24 * HOUR
    rng = np.random.default_rng(0)
    fast = np.mean([train(SCENARIO, nodes, interval, work, rng).seconds for _ in range(400)])
    slow = np.mean([slow_train(cost, mean, SCENARIO.restart, interval, work, rng) for _ in range(400)])
    assert fast == pytest.approx(slow, rel=0.02)
    assert fast == pytest.approx(expected_seconds(work, cost, mean, SCENARIO.restart, interval), rel=0.02)


@pytest.mark.parametrize(("cost", "mean"), [(1.0, 7000.0), (20.0, 5000.0), (60.0, 3600.0)])
def test_daly_is_where_the_expected_time_is_least(cost: float, mean: float) -> None:
    intervals = np.geomspace(10, mean, 4000)
    least = intervals[np.argmin([expected_seconds(1.0, cost, mean, 60.0, t) for t in intervals])]
    assert daly(cost, mean) == pytest.approx(least, rel=0.01)
    assert young(cost, mean) == pytest.approx(least, rel=0.15)


@pytest.mark.parametrize("nodes", [128, 1024])
def test_the_best_simulated_interval_is_near_the_formula(nodes: int) -> None:
    best = best_interval(SCENARIO, nodes, seed=0, failures=500)
    formula = daly(SCENARIO.checkpoint_seconds(nodes), SCENARIO.node_failure / nodes)
    assert 1 / 1.5 < best / formula < 1.5


def test_shares_of_the_wall_time_add_up() -> None:
    run = train(SCENARIO, 512, 300.0, 24 * HOUR, np.random.default_rng(1), pace=1.3)
    assert run.useful + run.stragglers + run.checkpoints + run.failures == pytest.approx(1.0)
    assert run.failed > 0 and run.failures > 0


def test_without_disturbance_nothing_is_lost() -> None:
    calm = replace(SCENARIO, spread=1e-6, slow_share=0.0, node_failure=1e15, handover=0.0, part_bytes=0.0)
    assert pace(calm, 64, np.random.default_rng(0), samples=10) == pytest.approx(1.0, abs=1e-4)
    assert score(calm, 8, 80, np.random.default_rng(0)).efficiency == pytest.approx(1.0, abs=1e-4)
    assert train(calm, 8, 24 * HOUR, 24 * HOUR, np.random.default_rng(0)).useful == pytest.approx(1.0)


def test_factors_have_mean_1_and_their_spread() -> None:
    drawn = lognormal(np.random.default_rng(0), 0.3, 100_000)
    assert drawn.mean() == pytest.approx(1.0, rel=0.01) and drawn.std() == pytest.approx(0.3, rel=0.02)


def test_one_driver_hands_over_no_faster_than_it_can() -> None:
    busy = replace(SCENARIO, handover=1.0)
    run = score(busy, 128, 1280, np.random.default_rng(0))
    assert run.seconds >= 1280.0 and run.driver == pytest.approx(1.0, abs=0.05)


def test_a_failed_node_loses_its_part_and_no_part_is_lost() -> None:
    fragile = replace(SCENARIO, node_failure=300.0)
    run = score(fragile, 16, 160, np.random.default_rng(0))
    assert run.failed > 0 and run.lost > 0
    assert run.seconds > score(SCENARIO, 16, 160, np.random.default_rng(0)).seconds


def test_the_store_bounds_all_nodes_together() -> None:
    assert SCENARIO.checkpoint_seconds(8) == pytest.approx(18e9 / 8e9)
    assert SCENARIO.checkpoint_seconds(1024) == SCENARIO.checkpoint_seconds(20) == pytest.approx(0.9)
    assert SCENARIO.part_seconds(1024) > SCENARIO.part_seconds(8) > SCENARIO.part


# --- the measured side, at a tiny size ---------------------------------------------------------------------------


def test_the_work_of_a_node_is_the_same_on_more_of_them(tmp_path: Path) -> None:
    one, four = (parse_config(config(nodes, tmp_path)) for nodes in (1, 4))
    assert four.student.batch_tokens == 4 * one.student.batch_tokens
    assert four.corpus.max_documents == 4 * (one.corpus.max_documents or 0)
    assert (four.resources.teacher.actors, four.resources.student.workers) == (4, 4)


def test_parts_without_work_and_a_listing(tmp_path: Path) -> None:
    row = pa.Table.from_pylist([{"name": "train-0000000.parquet", "rows": 1, "bytes": 1, "sha256": ""}])
    done = NoWork(str(tmp_path), count_attempt=lambda name: 1)(row)
    assert done["documents"] == [1] and done["error"] == [""]
    assert listing_seconds(2000, missing=10) > 0
