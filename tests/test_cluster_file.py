"""The cluster files against Ray's own schema, default-filling and autoscaler code; no credentials, no node."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

ROOT = Path(__file__).resolve().parent.parent
CLOUDS = ["cluster.yaml", "docs/cluster-gcp.yaml"]
LAUNCHED = [*CLOUDS, "cluster-local.yaml"]
POOLS = {"teacher_spot": 8, "teacher_on_demand": 8, "student_spot": 4, "student_on_demand": 4}
SPOT = {
    "cluster.yaml": {"InstanceMarketOptions": {"MarketType": "spot"}},
    "docs/cluster-gcp.yaml": {
        "scheduling": {"provisioningModel": "SPOT", "onHostMaintenance": "TERMINATE", "automaticRestart": False}
    },
}


def read(file: str) -> dict[str, Any]:
    return prepare_config(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", LAUNCHED)
def test_ray_takes_it(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").touch()
    cluster = read(file)
    validate_config(cluster)
    nodes = AutoscalingConfig(cluster, skip_content_hash=True).get_node_type_configs()
    most = {name: node.max_worker_nodes for name, node in nodes.items()}
    assert most == ({"head": 1, **POOLS} if file in CLOUDS else {"local.cluster.node": 3})


@pytest.mark.parametrize("file", CLOUDS)
def test_on_demand_nodes_stand_in_for_spot_nodes_of_the_same_pool(file: str) -> None:
    types = read(file)["available_node_types"]
    for pool in ("teacher", "student"):
        spot, on_demand = types[f"{pool}_spot"], types[f"{pool}_on_demand"]
        assert SPOT[file].items() <= spot["node_config"].items()
        for node in (spot, on_demand):
            for key in SPOT[file]:
                node["node_config"].pop(key, None)
        assert spot.pop("priority") == 1
        assert spot == on_demand and spot["resources"][pool] == spot["resources"]["GPU"]


def test_only_ssh_is_open_on_aws() -> None:
    (rule,) = read("cluster.yaml")["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)


@pytest.mark.parametrize("file", LAUNCHED)
def test_tokens_are_on_and_in_no_command_line(file: str) -> None:
    cluster = read(file)
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1] and "0.0.0.0" not in commands[-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert "RAY_AUTH_TOKEN=" not in (ROOT / file).read_text(encoding="utf-8"), "the token is a file, in no command line"


@pytest.mark.parametrize("file", LAUNCHED)
def test_what_its_commands_name_is_there(file: str) -> None:
    cluster = read(file)
    mounts = {remote.replace("/home/ubuntu", "~"): local for remote, local in cluster["file_mounts"].items()}
    assert mounts == {"~/cdm": ".", "~/.ray/auth_token": "~/.ray/auth_token"}
    lists = [f"{when}_commands" for when in ("setup", "head_setup", "head_start_ray", "worker_start_ray")]
    for command in [command for name in lists for command in cluster[name]]:
        shlex.split(command)
        for path in re.findall(r"~/cdm/(\S+)", command):
            assert path.startswith(".venv/bin/") and path.removeprefix(".venv/bin/") in ("ray", "pip")
        for target in re.findall(r"\b&& make (\w+)", command):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert (ROOT / ".gitignore").exists() and cluster["rsync_filter"] == [".gitignore"]


# --- Kubernetes --------------------------------------------------------------------------------------------------


def test_the_kuberay_cluster_has_the_same_pools(kuberay: list[dict[str, Any]]) -> None:
    """As Ray's autoscaler reads it inside Kubernetes."""
    _, cluster = kuberay
    found = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert found.pop("headgroup")["max_workers"] == 0
    assert {name.replace("-", "_"): node["max_workers"] for name, node in found.items()} == POOLS
    for pool in ("teacher", "student"):
        spot, on_demand = found[f"{pool}-spot"], found[f"{pool}-on-demand"]
        assert (spot.pop("priority"), spot.pop("labels"), on_demand.pop("labels")) == (1, {}, {})
        assert spot == on_demand and spot["resources"][pool] == spot["resources"]["GPU"]


def test_the_kuberay_cluster_has_tokens_one_image_and_the_shared_volume(kuberay: list[dict[str, Any]]) -> None:
    volume, cluster = kuberay
    spec = cluster["spec"]
    assert (spec["authOptions"], spec["headGroupSpec"]["serviceType"]) == ({"mode": "token"}, "ClusterIP")
    pins = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^ray(?:\[.*\])?==(\S+)", pins, re.M)
    assert spec["rayVersion"] == version
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [volume["metadata"]["name"]] and container["image"] == "REGISTRY/cdm:TAG"
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    text = (ROOT / "docs" / "kuberay.yaml").read_text(encoding="utf-8")
    for file in re.findall(r"docs/[\w.-]*\w", text):
        assert (ROOT / file).exists()


def test_the_image_copies_what_there_is() -> None:
    lines = (ROOT / "docs" / "kuberay.Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY")]
    read = [word for line in lines for word in line.split() if word.startswith("requirements/")]
    assert copied == ["requirements", "."] and all((ROOT / path).exists() for path in [*copied, *read])
