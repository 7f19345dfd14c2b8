"""cluster.yaml against Ray's own schema and default-filling code; no credentials, no node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")))


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    validate_config(cluster)
    nodes = AutoscalingConfig(cluster, skip_content_hash=True).get_node_type_configs()
    assert {name: node.max_worker_nodes for name, node in nodes.items()} == {
        "head": 1, "teacher_spot": 8, "teacher_on_demand": 8, "student_spot": 4, "student_on_demand": 4,
    }  # fmt: skip


def test_on_demand_nodes_stand_in_for_spot_nodes_of_the_same_pool(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    for pool in ("teacher", "student"):
        spot, on_demand = types[f"{pool}_spot"], types[f"{pool}_on_demand"]
        assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot.pop("priority") == 1
        assert spot == on_demand and spot["resources"][pool] == spot["resources"]["GPU"]


def test_only_ssh_is_open_and_tokens_are_on(cluster: dict[str, Any]) -> None:
    (rule,) = cluster["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "0.0.0.0" not in commands[-1]
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "RAY_AUTH_TOKEN=" not in text, "the token is a file, in no command line"
