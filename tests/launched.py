"""A cluster that Ray's launcher starts from cluster-local.yaml on the machines of tests/machines.py."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
from collections.abc import Mapping

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
STORE = f"--object-store-memory={200 * 2**20}"
PYTHON = f"{HOME}/cdm/.venv/bin/python"
JOB_SERVER = ["--address", "http://127.0.0.1:8265"]


class Launched:
    """Commands are those of docs/operations.md, run on the machine `client` in this repository's folder."""

    def __init__(self, quick: bool = True) -> None:
        self.quick = quick
        self.network = Network("client", "head", *RESOURCES)
        self.machines: Mapping[str, Machine] = self.network.machines
        for name, resources in RESOURCES.items():
            self.machines[name].path(f"{HOME}/ray-resources.json").write_text(json.dumps(resources), encoding="utf-8")
        self.machines["client"].path(f"{HOME}/cluster.yaml").write_text(self.config(), encoding="utf-8")
        self.client("ray get-auth-token --generate > ~/token")

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

    def client(self, command: str, check: bool = True) -> str:
        return self.machines["client"].run("bash", "-c", f"cd {ROOT}; {command}", check=check)

    @property
    def token(self) -> str:
        return self.machines["client"].path(f"{HOME}/token").read_text(encoding="utf-8").strip()

    def on_head(self, command: str) -> str:
        return self.client(f"ray exec ~/cluster.yaml 'RAY_AUTH_MODE=token ~/cdm/.venv/bin/{command}'")

    def nodes(self) -> set[str]:
        """Addresses of the nodes that Ray takes for alive."""
        found = self.on_head("ray list nodes --filter state=ALIVE --format json")
        return set(re.findall(r'"node_ip": "([\d.]+)"', found))

    def up(self) -> None:
        """With all machines, which the head starts after `ray up` has ended, and with the tunnel to the job server."""
        self.client("ray up -y ~/cluster.yaml")
        wait_for(lambda: len(self.nodes()) == 1 + len(RESOURCES), every=1)
        command = self.machines["client"].command("bash", "-c", f"cd {ROOT}; exec ray dashboard ~/cluster.yaml")
        self._tunnel = subprocess.Popen(
            command,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        wait_for(self.answers, every=1)

    def answers(self) -> bool:
        listed = self.client(f"RAY_AUTH_MODE=token ray job list {' '.join(JOB_SERVER)} || echo no answer", check=False)
        return "no answer" not in listed

    def down(self) -> None:
        os.killpg(self._tunnel.pid, signal.SIGKILL)
        self._tunnel.wait()
        self.client("ray down -y ~/cluster.yaml")

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """A job; what it prints ends with its state, and its exit code is 0 where it succeeded."""
        name = f"job-{secrets.token_hex(4)}"
        options = [*JOB_SERVER, "--working-dir", str(ROOT), "--submission-id", name]
        full = ["ray", "job", "submit", *options, "--", PYTHON, *command]
        return subprocess.Popen(
            self.machines["client"].command("env", "RAY_AUTH_MODE=token", *full),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finished(self, *command: str) -> str:
        """What a job printed that succeeded."""
        process = self.submit(*command)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        return output
