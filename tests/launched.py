"""A cluster that Ray's launcher starts from cluster-local.yaml on the machines of tests/machines.py."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import yaml

from tests.machines import HOME, ROOT, SHARED, Machine, Network

# What each machine is for. `box` is on both workers: with one a process, two processes are on two machines.
RESOURCES = {"one": {"teacher": 1, "box": 1}, "two": {"student": 2, "box": 1}}
PYTHON = f"{HOME}/cdm/.venv/bin/python"
WORKING_DIR = ["--address", "http://127.0.0.1:8265", "--working-dir", str(ROOT)]


class Launched:
    """Commands are those of docs/operations.md, run on the machine `client` in this repository's folder."""

    def __init__(self) -> None:
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

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """`ray dashboard` while the body runs: the job server at port 8265 of the client's loopback."""
        command = self.machines["client"].command("bash", "-c", f"cd {ROOT}; exec ray dashboard ~/cluster.yaml")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(60):
                with suppress(AssertionError):
                    self.client("RAY_AUTH_MODE=token ray job list --address http://127.0.0.1:8265")
                    break
            yield
        finally:
            process.kill()
            process.wait()

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """A job; what it prints ends with its state, and its exit code is 0 where it succeeded."""
        name = f"job-{secrets.token_hex(4)}"
        full = ["ray", "job", "submit", *WORKING_DIR, "--submission-id", name, "--", PYTHON, *command]
        return subprocess.Popen(
            self.machines["client"].command("env", "RAY_AUTH_MODE=token", *full),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finished(self, *command: str) -> str:
        """What a job printed that succeeded."""
        process = self.submit(*command)
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        return output
