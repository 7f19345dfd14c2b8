"""What devices do, hold and cost, and which a cluster file has: `rates.yaml`, with a user's entries (layer 2)."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from cdm.config import StudentPool, TeacherPool
from cdm.config_types import Positive, Share, Strict

CPU = "cpu"  # the device that is a core of a processor
SHIPPED = Path(__file__).with_name("rates.yaml")
Amount = Annotated[float, Field(gt=0)]


class Device(Strict):
    """flops: dense bfloat16 operations a second; bandwidth: bytes a second; prices: dollars an hour."""

    flops: Amount
    memory_gib: Amount
    bandwidth: Amount
    prefill_mfu: Share
    training_mfu: Share
    on_demand: Annotated[float, Field(ge=0)]
    spot: Annotated[float, Field(ge=0)]


class Instance(Strict):
    device: str
    count: Positive


class FixedSeconds(Strict):
    """Of a command, of making a model, and of a stage with engines, with workers, of the evaluation."""

    command: Amount
    models: Amount
    engine: Amount
    workers: Amount
    evaluation: Amount


class ShardBytes(Strict):
    token: Amount
    kept: Amount


class Assumed(Strict):
    """Bytes of a document where the corpus cannot be looked at, bytes of a token where a tokenizer cannot."""

    response_bytes: Amount
    prompt_bytes: Amount
    small_vocabulary_bytes_a_token: Amount
    bytes_a_token: Amount


class Rates(Strict):
    devices: dict[str, Device]
    instances: dict[str, Instance]
    fixed_seconds: FixedSeconds
    corpus_documents_a_second: Amount
    aligned_tokens_a_second: Amount
    shard_bytes: ShardBytes
    assumed: Assumed

    def device(self, name: str) -> Device:
        """Raises ValueError with the nearest known name."""
        return self.devices[_known(name, self.devices, "devices")]

    def instance(self, name: str) -> Instance:
        """Raises ValueError with the nearest known name, also where its device is not known."""
        found = self.instances[_known(name, self.instances, "instances")]
        self.device(found.device)
        return found


def _known(name: str, table: dict[str, Any], section: str) -> str:
    if name in table:
        return name
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(table)}"
    raise ValueError(f"{section}: {name} is not in the table of rates{hint} Add it to a file and name it with --prices")


def load_rates(path: str | None = None) -> Rates:
    """The shipped table, with the entries of a user's file over it.

    Raises ValueError naming file and key for unknown keys, missing ones of a new device, and values of a wrong type.
    """
    values = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    if path is not None:
        own = _read(path)
        for section, entries in own.items():
            known = values.get(section)
            values[section] = (
                _over(known, entries) if isinstance(known, dict) and isinstance(entries, dict) else entries
            )
    try:
        return Rates.model_validate(values)  # YAML reads 2.25e15 as a text, pydantic makes a number of it
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path or SHIPPED}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _read(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys at the top level")
    return values


def _over(known: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` entries over the known ones, key by key inside an entry."""
    inner = {k: known[k] | v if isinstance(v, dict) and isinstance(known.get(k), dict) else v for k, v in own.items()}
    return known | inner


# --- pools -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The devices of one side: so many processes with so many devices each, on nodes of `node_devices` devices.

    idle_seconds: a node is paid for so long after its work. most_nodes: what the cluster file allows; None: any number.
    """

    name: str
    device: str
    processes: int
    devices: float
    node_devices: int
    idle_seconds: float = 0.0
    most_nodes: int | None = None

    @property
    def a_worker(self) -> float:
        """Devices that one process of the student uses: no more than one GPU, all of its cores."""
        return self.devices if self.device == CPU else min(1.0, self.devices)

    @property
    def nodes(self) -> int:
        return math.ceil(self.processes * self.devices / self.node_devices)


@dataclass(frozen=True)
class Pools:
    """Where a config runs. cpus: cores that align; head: the device of the node that is always there, and how many."""

    teacher: Pool
    student: Pool
    cpus: int
    head: tuple[str, int] | None = None


def booked(pool: TeacherPool | StudentPool) -> int:
    return (pool.max_actors or pool.actors) if isinstance(pool, TeacherPool) else pool.workers


def pools_of(teacher: TeacherPool, student: StudentPool, devices: tuple[str, str], cpus: int) -> Pools:
    """The config's resources on devices of these kinds (teacher's, student's), without a cluster file."""

    def pool(name: str, section: TeacherPool | StudentPool, device: str) -> Pool:
        return Pool(name, device, booked(section), section.gpus or max(1.0, section.cpus), 1)

    return Pools(pool("teacher", teacher, devices[0]), pool("student", student, devices[1]), cpus)


def cluster_pools(path: str, teacher: TeacherPool, student: StudentPool, rates: Rates) -> Pools:
    """The config's resources on the node types of a Ray cluster file.

    A pool is on the node types with the named resources that it asks for (`resources.teacher.custom`); where it asks
    for none, on those with a resource of its own name, `teacher` or `student`; else on any with GPUs.
    Raises ValueError: no node types in the file, none that fits, an instance that the rates lack.
    """
    values = _read(path)
    types: dict[str, Any] = values.get("available_node_types") or {}
    if not types:
        raise ValueError(f"{path}: no available_node_types: its machines are there already; plan without --cluster")
    head = types.get(values.get("head_node_type", ""), {})
    workers = {name: node for name, node in types.items() if node is not head}
    idle = 60.0 * values.get("idle_timeout_minutes", 5)
    most = values.get("max_workers", 2)
    pool = partial(_pool, path, types=workers, rates=rates, idle=idle, most=most)
    cores = int(head.get("resources", {}).get("CPU", 1))
    on_head = rates.instance(_instance_type(path, head)) if head else None
    always = None if on_head is None else (on_head.device, on_head.count)
    return Pools(pool("teacher", teacher), pool("student", student), cores, always)


def _pool(
    path: str, name: str, asked: TeacherPool | StudentPool, types: dict[str, Any], rates: Rates, idle: float, most: int
) -> Pool:
    needed = set(asked.custom) | ({"GPU"} if asked.gpus else set())
    fitting = {key: node for key, node in types.items() if needed <= set(node.get("resources", {}))}
    own = {key: node for key, node in fitting.items() if name in node["resources"]}
    fitting = fitting if asked.custom else own or fitting
    if not fitting:
        raise ValueError(f"{path}: no node type has {', '.join(sorted(needed)) or 'workers'} for resources.{name}")
    found = {_instance_type(path, node) for node in fitting.values()}
    if len(found) > 1:
        raise ValueError(
            f"{path}: resources.{name} may run on {', '.join(sorted(found))}; choose with resources.{name}.custom"
        )
    instance = rates.instance(found.pop())
    if instance.device != CPU and not asked.gpus:
        raise ValueError(
            f"resources.{name}.gpus is 0, so nothing of {instance.device} in {path} would be used; set it, say "
            f"with --set resources.{name}.gpus=1"
        )
    nodes = min(most, sum(node.get("max_workers", most) for node in fitting.values()))
    devices = asked.gpus or max(1.0, asked.cpus)
    return Pool(name, instance.device, booked(asked), devices, instance.count, idle, nodes)


def _instance_type(path: str, node: dict[str, Any]) -> str:
    config = node.get("node_config", {})
    found = config.get("InstanceType") or config.get("machineType")
    if not found:
        raise ValueError(f"{path}: a node type without node_config.InstanceType (AWS) or machineType (GCP)")
    return str(found)
