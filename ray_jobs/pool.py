"""Names of parts -> a pool of engines that make them: what scoring and generation share.

An actor makes a whole part and writes it itself, atomically; only counts come back to the driver. A killed actor is
restarted and its part made again, a killed driver leaves whole parts, and in both cases the folder ends up the same
byte for byte.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from cdm import parts
from cdm.config import TeacherPool
from cdm.parts import Part
from ray_jobs.cluster import beside_me, check_resources

OnProgress = Callable[[int, str], None]
ATTEMPTS = 4  # at one part, by actors that died
PARTS_IN_FLIGHT = 2  # an engine: the one being made and the next


class PartWorker(ABC):
    """What an actor of the pool does, one part a call: `make` it in `folder` unless it is there, then `summary`.

    A summary is a row of counts whose columns, with their zeros, are `nothing`. `count_attempt` is told the part's name
    and says how many attempts at it this one makes, over all actors.
    """

    nothing: ClassVar[Mapping[str, Any]]

    def __init__(self, folder: str, count_attempt: Callable[[str], int]) -> None:
        self.folder = folder
        self.count_attempt = count_attempt

    @abstractmethod
    def make(self, part: Part) -> None:
        """Write the part."""

    @abstractmethod
    def summary(self, name: str) -> dict[str, Any]:
        """What came of a part, read back from it."""

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        part = Part(**batch.to_pylist()[0])
        began = time.monotonic()
        try:
            row = self._made(part) | {"error": ""}
        except (ValueError, OSError) as error:  # Ray Data would keep the traceback's text only: the driver raises it
            row = {**self.nothing, "error": f"{part.name}: {error}"}
        row |= {"name": part.name, "seconds": time.monotonic() - began}
        return {key: [row[key]] for key in sorted(row)}

    def _made(self, part: Part) -> dict[str, Any]:
        if not parts.part_exists(self.folder, part.name):  # else: written, but killed before saying so
            if self.count_attempt(part.name) > ATTEMPTS:
                raise ValueError(f"the engine died {ATTEMPTS} times while at this part; is memory too small?")
            self.make(part)
        return self.summary(part.name)


def make_parts(
    worker: type[PartWorker], arguments: Mapping[str, Any], missing: list[Part], pool: TeacherPool
) -> Iterator[dict[str, Any]]:
    """The rows of a pool of `worker(**arguments)`, a row for each missing part, as it is written. Needs Ray running.

    Raises ValueError with what went wrong in an actor, and where this machine lacks what an engine needs.
    """
    if not missing:
        return
    resources = {name: amount for name, amount in pool.custom.items() if amount}
    check_resources({"CPU": pool.cpus, "GPU": pool.gpus, **resources}, "resources.teacher", "an engine's workers")
    actors = min(pool.actors, len(missing))
    attempts = Attempts.options(**beside_me()).remote()  # type: ignore[attr-defined]
    items = [{"name": p.name, "rows": p.rows, "bytes": p.bytes, "sha256": p.sha256} for p in missing]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker,
        fn_constructor_kwargs={**arguments, "count_attempt": CountAttempt(attempts)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=actors,
            max_size=min(max(actors, pool.max_actors or actors), len(missing)),
            max_tasks_in_flight_per_actor=PARTS_IN_FLIGHT,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        resources=resources,
        # an engine's threads are counted when its process starts, and in several threads of it
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(pool.cpus)))}},
    )
    for row in rows.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        yield row


@ray.remote
class Attempts:
    """How often each part was begun. Ray Data itself retries a part whose actor died without end."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]


class CountAttempt:
    """`count_attempt` of the pool's actors."""

    def __init__(self, attempts: Any) -> None:
        self._attempts = attempts

    def __call__(self, name: str) -> int:
        return int(ray.get(self._attempts.begin.remote(name)))
