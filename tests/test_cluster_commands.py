"""Every command of cluster.yaml, run on two machines inside this one: a head, and a worker that joins it.

They are run as Ray's launcher runs them, in the order in which it does. What needs the Internet has a stand-in that
notes how it was called: apt-get, pip and the mount of the file system.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from tests.machines import HOME, ROOT, Machine, Network, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(why_not(sshd=False) is not None, reason=f"no machines of our own: {why_not(sshd=False)}"),
]
SHARED = "/mnt/efs"
STAND_INS = {
    "sudo": '#!/bin/sh\nexec "$@"\n',
    "apt-get": '#!/bin/sh\necho apt-get "$@" >> ~/noted\n',
    "pip": '#!/bin/sh\necho pip "$@" >> ~/noted\n',
    "mount": '#!/bin/bash\necho mount "$@" >> ~/noted\nexec /bin/mount -t tmpfs none "${@: -1}"\n',
}


def read(file: str) -> dict[str, Any]:
    """For root in place of ubuntu, and a shared folder that is not the real root's."""
    text = (ROOT / file).read_text(encoding="utf-8").replace("/home/ubuntu", HOME).replace("/shared", SHARED)
    return prepare_config(yaml.safe_load(text.replace("chown ubuntu", "chown root")))


def write(file: Path, text: str, mode: int = 0o755) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)


def prepare(machine: Machine, cluster: dict[str, Any], token: str) -> None:
    """What the launcher has copied before the first command runs, and the stand-ins."""
    home = machine.folder / "home"
    left_out = shutil.ignore_patterns(*cluster["rsync_exclude"], "__pycache__", "outputs", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, home / "cdm", ignore=left_out, dirs_exist_ok=True)
    (home / ".ray").mkdir()
    write(home / ".ray" / "auth_token", token, 0o644)
    write(home / "ray_bootstrap_config.yaml", yaml.safe_dump(cluster), 0o600)
    programs = home / "cdm" / ".venv" / "bin"
    real = programs.readlink()
    programs.unlink()
    for folder in (programs, home / "bin"):
        folder.mkdir()
    for program in real.iterdir():
        (programs / program.name).symlink_to(program)
    for name, text in STAND_INS.items():
        write((programs if name == "pip" else home / "bin") / name, text)


def run(machine: Machine, commands: list[str], head: Machine) -> list[str]:
    return [machine.run("bash", "-lic", f"export RAY_HEAD_IP={head.address}; {command}") for command in commands]


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    network = Network("head", "worker", sshd=False)
    yield list(network.machines.values())
    network.close()


@pytest.mark.parametrize("file", ["cluster.yaml"])
def test_every_command_runs(file: str, machines: list[Machine]) -> None:
    head, worker = machines
    cluster = read(file)
    for machine in machines:
        prepare(machine, cluster, "0123456789abcdef" * 4)
    run(head, cluster["head_setup_commands"], head)
    run(worker, cluster["worker_setup_commands"], head)
    run(head, cluster["head_start_ray_commands"], head)
    run(worker, cluster["worker_start_ray_commands"], head)

    ask = ["env", "RAY_AUTH_MODE=token", f"{HOME}/cdm/.venv/bin/ray", "list", "nodes", "--format", "json"]
    nodes = json.loads(head.run(*ask).partition("[")[2].join(["[", ""]))
    assert {node["node_ip"] for node in nodes if node["state"] == "ALIVE"} == {head.address, worker.address}
    noted = (head.folder / "home" / "noted").read_text(encoding="utf-8")
    for called in ("apt-get install -y", "mount -t nfs4", "pip install --quiet boto3>=1.40"):
        assert called in noted
    assert (head.folder / "home" / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert head.run("stat", "-fc", "%T", SHARED).strip() == "tmpfs"
