"""A cluster that Ray's launcher starts from cluster-local.yaml on the machines of tests/machines.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from tests.machines import HOME, ROOT, SHARED, Machine, Network
from tests.scoring import wait_for

# What each worker is for. With a `box` a process, two processes are on two machines and the third is spare.
RESOURCES = {"one": {"teacher": 1, "box": 1}, "two": {"student": 2, "box": 1}, "three": {"box": 1}}
# A lost machine is noticed in seconds where Ray takes a minute, and the object store is small enough to be filled.
HEAD_ENVIRONMENT = (
    "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3 "
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S=10"
)
WORKER_ENVIRONMENT = "RAY_gcs_rpc_server_reconnect_timeout_s=10"
PIPE: dict[str, Any] = {
    "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True
}  # fmt: skip
STORE = f"--object-store-memory={200 * 2**20}"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ENVIRONMENT, START, TUNNEL, JOB, WATCH, RESIZE, UPGRADE, RESUME, STOP = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
CONFIG = "configs/phi3-qwen2.yaml"  # of the page


class Launched:
    """Commands are those of docs/operations.md, run on the machine `client` in this repository's folder."""

    def __init__(self, quick: bool = True) -> None:
        self.quick = quick
        self.network = Network("client", "head", *RESOURCES)
        self.machines: Mapping[str, Machine] = self.network.machines
        for name, resources in RESOURCES.items():
            self.machines[name].path(f"{HOME}/ray-resources.json").write_text(json.dumps(resources), encoding="utf-8")
        self.machines["client"].path(f"{HOME}/cluster.yaml").write_text(self.config(), encoding="utf-8")

    def config(self) -> str:
        text = (ROOT / "cluster-local.yaml").read_text(encoding="utf-8").replace("/shared", SHARED)
        config = yaml.safe_load(text)
        workers = [self.machines[name].address for name in RESOURCES]
        config["provider"] |= {"head_ip": self.machines["head"].address, "worker_ips": workers}
        config["auth"]["ssh_user"] = "root"
        for role, environment in (("head", HEAD_ENVIRONMENT), ("worker", WORKER_ENVIRONMENT)):
            commands = config[f"{role}_start_ray_commands"]
            commands[-1] = f"{f'export {environment};' if self.quick else ''} {commands[-1]} {STORE}"
        return yaml.safe_dump(config)

    def command(self, command: str) -> list[str]:
        """What runs a command of the page on the client."""
        changed = command.replace("cluster-local.yaml", "~/cluster.yaml").replace("/shared/", f"{SHARED}/")
        return self.machines["client"].command("bash", "-ec", f"cd {ROOT}\n{ENVIRONMENT}\n{changed}")

    def client(self, command: str, check: bool = True) -> str:
        done = subprocess.run(self.command(command), **PIPE, timeout=300)
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    @property
    def token(self) -> str:
        return self.machines["client"].path(f"{HOME}/.ray/auth_token").read_text(encoding="utf-8").strip()

    def nodes(self) -> set[str]:
        """Addresses of the nodes that Ray takes for alive."""
        ask = "ray exec cluster-local.yaml 'ray list nodes --filter state=ALIVE --format json'"
        found = self.client(ask, check=False)  # it may not answer yet
        return set(re.findall(r'"node_ip": "([\d.]+)"', found))

    def up(self) -> None:
        """With all machines, which the head starts after `ray up` has ended, and with the tunnel to the job server."""
        self.client(START)
        wait_for(lambda: len(self.nodes()) == 1 + len(RESOURCES), every=1)
        self._tunnel = subprocess.Popen(self.command(TUNNEL), start_new_session=True, **PIPE | {"stdout": None})
        wait_for(lambda: "no answer" not in self.client("ray job list || echo no answer"), every=1)

    def down(self) -> None:
        self.client(STOP)
        os.killpg(self._tunnel.pid, signal.SIGKILL)
        self._tunnel.wait()

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """A job; what it prints ends with its state, and its exit code is 0 where it succeeded."""
        return subprocess.Popen(self.command(f"ray job submit --working-dir . -- python {' '.join(command)}"), **PIPE)

    def finished(self, *command: str) -> str:
        """What a job printed that succeeded."""
        process = self.submit(*command)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        return output
