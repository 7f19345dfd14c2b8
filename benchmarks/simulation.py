"""A cluster that is not there: training and scoring on N nodes with stragglers, failures and one object store.

Discrete simulations with a fixed seed. The spread of steps and parts and the seconds of a hand-over are measured, the
rest of a scenario is assumed. Young (1974) and Daly (2006, doi 10.1016/j.future.2004.11.016) give the best checkpoint
interval in closed form; the simulation is compared with them.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

HOUR = 3600.0


@dataclass(frozen=True)
class Scenario:
    """What is assumed. All times in seconds, all sizes in bytes.

    step, part: of one node without any disturbance. spread: of a step or a part, the coefficient of variation.
    slow_share, slowdown: so many nodes need so many times as long. node_failure: mean time between one node's failures.
    restart: from a failure until work goes on. checkpoint: bytes of one. part_bytes: read and written for a part.
    store: bytes a second of the object store over all nodes, node: of one node. handover: the driver's time for a part.
    """

    step: float
    part: float
    spread: float
    handover: float
    slow_share: float = 0.01
    slowdown: float = 1.5
    node_failure: float = 2000 * HOUR
    restart: float = 180.0
    checkpoint: float = 18e9
    part_bytes: float = 20e6
    store: float = 20e9
    node: float = 1e9

    def checkpoint_seconds(self, nodes: int) -> float:
        """Every node writes its share; the store bounds them all."""
        return self.checkpoint / min(self.store, nodes * self.node)

    def paces(self, nodes: int) -> np.ndarray:
        """[nodes]: how many times as long as the others each needs."""
        return np.where(np.arange(nodes) < int(nodes * self.slow_share), self.slowdown, 1.0)

    def part_seconds(self, nodes: int) -> float:
        """A part without disturbance: the work, and its bytes at the node's share of the store."""
        return self.part + self.part_bytes / min(self.node, self.store / nodes)


def lognormal(rng: np.random.Generator, spread: float, size: int | tuple[int, ...]) -> np.ndarray:
    """Factors with mean 1 and this coefficient of variation."""
    sigma = math.sqrt(math.log1p(spread**2))
    return rng.lognormal(-(sigma**2) / 2, sigma, size)


# --- training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """Shares of the wall time: steps at a lone node's pace; waiting for the slowest; checkpoints; failures."""

    useful: float
    stragglers: float
    checkpoints: float
    failures: float
    failed: int
    seconds: float


def pace(scenario: Scenario, nodes: int, rng: np.random.Generator, samples: int = 2000) -> float:
    """The mean step of `nodes` that wait for the slowest of them, in steps of a lone node."""
    paces = scenario.paces(nodes)
    return float(np.mean([(paces * lognormal(rng, scenario.spread, nodes)).max() for _ in range(samples)]))


def train(
    scenario: Scenario, nodes: int, interval: float, work: float, rng: np.random.Generator, pace: float = 1.0
) -> Trained:
    """Steps worth `work` seconds at a lone node's pace, a checkpoint after every `interval` seconds of stepping.

    A failure, in a step, a checkpoint or a restart, throws the run back to its last whole checkpoint. From one failure
    to the next the whole rounds of stepping and saving are counted at once.
    """
    cost, mean = scenario.checkpoint_seconds(nodes), scenario.node_failure / nodes
    left, clock, saved, failed = work * pace, 0.0, 0.0, 0
    while True:
        until = rng.exponential(mean)
        rounds = min(int(until / (interval + cost)), math.ceil(left / interval) - 1)  # the last one is not saved
        clock, saved, left = clock + rounds * (interval + cost), saved + rounds * cost, left - rounds * interval
        rest = until - rounds * (interval + cost)
        if left <= interval and rest >= left:
            clock += left
            break
        clock += rest
        failed += 1
        while (again := rng.exponential(mean)) < scenario.restart:  # another node fails while all start again
            clock, failed = clock + again, failed + 1
        clock += scenario.restart
    lost = clock - work * pace - saved
    return Trained(work / clock, work * (pace - 1) / clock, saved / clock, lost / clock, failed, clock)


def young(cost: float, mean: float) -> float:
    """The interval between checkpoints of `cost` seconds where a failure comes every `mean` seconds: sqrt(2 C M)."""
    return math.sqrt(2 * cost * mean)


def daly(cost: float, mean: float) -> float:
    """Daly's higher-order estimate; `mean` where a checkpoint costs more than twice the time between failures."""
    if cost >= 2 * mean:
        return mean
    ratio = cost / (2 * mean)
    return young(cost, mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def expected_seconds(work: float, cost: float, mean: float, restart: float, interval: float) -> float:
    """Daly's expected wall time of `work` seconds of stepping, failures at any time (his complete model)."""
    segment = math.expm1((interval + cost) / mean)
    return mean * math.exp(restart / mean) * segment * work / interval


def best_interval(scenario: Scenario, nodes: int, seed: int, failures: int = 2000) -> float:
    """Of intervals around Young's that with the least simulated time, over about so many failures."""
    mean = scenario.node_failure / nodes
    candidates = young(scenario.checkpoint_seconds(nodes), mean) * np.geomspace(1 / 4, 4, 17)

    def seconds(interval: float) -> float:
        return train(scenario, nodes, interval, failures * mean, np.random.default_rng(seed)).seconds

    return float(min(candidates, key=seconds))


# --- scoring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """efficiency: of the nodes' time, the share that made parts which count. driver: share that the driver is busy."""

    efficiency: float
    lost: float
    failed: int
    driver: float
    seconds: float


def score(scenario: Scenario, nodes: int, parts: int, rng: np.random.Generator) -> Scored:
    """Parts handed out one by one by one driver; a node that fails loses its part, which is handed out again."""
    slow, one = scenario.paces(nodes), scenario.part_seconds(nodes)
    free = [(0.0, node) for node in range(nodes)]  # when each node is free
    heapq.heapify(free)
    left, driver, lost, failed, end = parts, 0.0, 0.0, 0, 0.0
    while left:
        at, node = heapq.heappop(free)
        start = max(at, driver)  # the driver hands over one part at a time
        driver = start + scenario.handover
        took = one * slow[node] * float(lognormal(rng, scenario.spread, 1)[0])
        failure = rng.exponential(scenario.node_failure)
        if failure < took:
            failed += 1
            lost += failure + scenario.restart
            heapq.heappush(free, (driver + failure + scenario.restart, node))
            continue
        left -= 1
        end = max(end, driver + took)
        heapq.heappush(free, (driver + took, node))
    return Scored(
        parts * scenario.part / (nodes * end), lost / (nodes * end), failed, parts * scenario.handover / end, end
    )
