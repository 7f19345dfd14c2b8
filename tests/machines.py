"""Machines inside this one: namespaces joined by a bridge, each with its own address, home, processes and sshd.

Needs root and iproute2, and for machines with sshd OpenSSH's client and server, and rsync. A machine's `/mnt/home` and
`/tmp` are its own, `/mnt/shared` is the same file system on all of them. Nothing of it is seen outside, and it ends
with this process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
HOME, SHARED = "/mnt/home", "/mnt/shared"
PROGRAMS = ("ip", "unshare", "nsenter", "mount")
SSH_PROGRAMS = ("ssh", "sshd", "ssh-keygen", "rsync")
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child")
PATH = f"{sys.base_prefix}/bin:{os.environ['PATH']}:/usr/sbin:/sbin"  # without the virtual environment

# $1: bytes of the shared file system. Ends when its standard input does.
HUB = """
set -e
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/shared /mnt/home
mount -t tmpfs -o size=$1 none /mnt/shared
ip link add bridge type bridge
ip link set bridge up
echo ready
cat
"""

# $1: the machine's folder, $2: its address, $3: what must stay visible under its path. The shell stays as the first
# process and takes the dead off the process table. Programs in the home's bin go before the system's.
MACHINE = """
set -e
mount --bind $1/passwd /etc/passwd
mount --bind $1/hosts /etc/hosts
mount --bind $1/home /mnt/home
mount -t tmpfs none /run
mount -t tmpfs -o size=1g none /dev/shm
for path in $3; do
    case $path in /tmp/*) mkdir -p $1$path; mount --rbind $path $1$path;; esac
done
mkdir -p /run/sshd $1/tmp
mount --rbind $1/tmp /tmp
hostname $(basename $1)
echo born
read
ip link set lo up
ip address add $2/24 dev eth0
ip link set eth0 up
ip route add default dev eth0
test ! -e /mnt/home/sshd_config || $(PATH=$PATH:/usr/sbin command -v sshd) -f /mnt/home/sshd_config
echo ready
while read; do :; done
"""

SSHD = f"""
HostKey {HOME}/.ssh/host
AuthorizedKeysFile {HOME}/.ssh/id_ed25519.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


def why_not(sshd: bool = True) -> str | None:
    """Why there can be no machines here."""
    needed = (*PROGRAMS, *SSH_PROGRAMS) if sshd else PROGRAMS
    missing = [program for program in needed if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    probe = "mount -t tmpfs none /mnt && ip link add veth1 type veth peer name veth2 && ip link add bridge type bridge"
    done = subprocess.run([*UNSHARE, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else None


STAMP = """
import pathlib, runpy, sys
root = pathlib.Path(sys.argv[1])
fingerprint = runpy.run_path(str(root / "scripts" / "setup.py"))["fingerprint"]
(root / ".venv" / "cdm-setup").write_text(fingerprint(root, sys.argv[2]))
"""


class Machine:
    """One of the machines of a `Network`. `pid` is that of its first process, as seen from here."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.name, self.address, self._network = name, address, network
        self.folder = network.folder / name
        self._make_home()
        self.start()
        self._stamp()

    def _make_home(self) -> None:
        home = self.folder / "home"
        venv = home / "cdm" / ".venv"
        venv.mkdir(parents=True)
        profile = f"export PATH={HOME}/bin:{PATH} OMP_NUM_THREADS=1 RAY_worker_niceness=0\n"
        (home / ".bash_profile").write_text(profile, encoding="utf-8")
        if self._network.sshd:
            (home / ".ssh").mkdir(mode=0o700)
            for key in ("id_ed25519", "id_ed25519.pub"):
                shutil.copy(self._network.folder / key, home / ".ssh" / key)
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", home / ".ssh" / "host"], check=True)
            (home / "sshd_config").write_text(SSHD, encoding="utf-8")
        # The packages are there, as they are after a first `make setup`, which takes minutes and needs a network.
        for entry in Path(sys.prefix).iterdir():
            (venv / entry.name).symlink_to(entry)
        (venv / "cdm-setup").unlink()
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, home / "cdm" / name)
        shutil.copy(ROOT / "pyproject.toml", home / "cdm")

    def _stamp(self) -> None:
        """What `make setup` writes last: the packages are those of the pins."""
        choice = Path(sys.prefix, "cdm-setup").read_text(encoding="utf-8").split()[0]
        self.run("python3", "-c", STAMP, f"{HOME}/cdm", choice)

    def start(self) -> None:
        """Power on."""
        command = [*self._network.inside("-m", "-p", "-n"), *UNSHARE, "--uts", "--ipc", "--mount-proc", "bash", "-c"]
        arguments = ["machine", str(self.folder), self.address, f"{ROOT} {Path(sys.prefix).resolve()}"]
        self._process = _Ready([*command, MACHINE, *arguments], "born")
        self.pid = self._process.last_child()
        self._network.plug_in(self)
        self._process.say("ready")

    def command(self, *command: str) -> list[str]:
        """What runs a command here, as the user who logs in."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p"]
        return [
            *enter,
            "env",
            "-i",
            f"HOME={HOME}",
            "USER=root",
            "TERM=dumb",
            "bash",
            "-lc",
            'cd; exec "$@"',
            "-",
            *command,
        ]

    def run(self, *command: str, check: bool = True, timeout: float = 300) -> str:
        """Both outputs of a command on this machine."""
        done = subprocess.run(
            self.command(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def path(self, path: str) -> Path:
        """A path of this machine, as seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    def processes(self) -> list[psutil.Process]:
        """All but the first one and sshd."""
        found = psutil.Process(self.pid).children(recursive=True)
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [p for p in found if p.name() != "sshd" and os.readlink(f"/proc/{p.pid}/ns/pid") == space]

    def kill(self) -> None:
        """Power off: no process sees it coming, and peers get no answer."""
        psutil.Process(self.pid).kill()
        self._process.wait()
        self._network.unplug(self)

    def cut(self, link: str = "down") -> None:
        """The cable is out: what is sent is lost, connections stay open until somebody gives up."""
        self._network.ip("link", "set", f"to-{self.name}", link)


class Network:
    """Machines by name; the n-th has the address 10.77.0.n. Ends with `close`, or with this process."""

    def __init__(self, *names: str, sshd: bool = True, shared_bytes: int = 256 * 2**20) -> None:
        self.sshd, self._shared_bytes = sshd, shared_bytes
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        if sshd:
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", self.folder / "id_ed25519"], check=True)
        self._hub = _Ready([*UNSHARE, "bash", "-c", HUB, "hub", str(shared_bytes)], "ready")
        self._pid = self._hub.last_child()
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        for name in names:
            _write_etc(self.folder / name, addresses)
        self.machines: Mapping[str, Machine] = {name: Machine(self, name, at) for name, at in addresses.items()}

    def inside(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self._pid), *namespaces]

    def ip(self, *arguments: str) -> None:
        subprocess.run([*self.inside("-n"), "ip", *arguments], check=True)

    def plug_in(self, machine: Machine) -> None:
        cable, card = f"to-{machine.name}", f"02:00:00:00:00:{int(machine.address.split('.')[-1]):02x}"
        here = ("address", card, "netns", str(machine.pid))  # the same after a restart: others remember it
        self.ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", *here)
        self.ip("link", "set", cable, "master", "bridge", "up")

    def unplug(self, machine: Machine) -> None:
        """The cable of a dead machine; the kernel may have taken it away already, or is about to."""
        delete = [*self.inside("-n"), "ip", "link", "delete", f"to-{machine.name}"]
        subprocess.run(delete, check=False, stderr=subprocess.DEVNULL)

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte is left on the shared file system while the body runs."""
        remount = [*self.inside("-m"), "mount", "-o"]
        used = os.statvfs(f"/proc/{self._pid}/root{SHARED}")
        kept = (used.f_blocks - used.f_bfree) * used.f_frsize
        subprocess.run([*remount, f"remount,size={kept}", SHARED], check=True)
        try:
            yield
        finally:
            subprocess.run([*remount, f"remount,size={self._shared_bytes}", SHARED], check=True)

    def close(self) -> None:
        psutil.Process(self._pid).kill()
        self._hub.wait()
        self._folder.cleanup()


class _Ready:
    """A process that says a word when it is ready, and ends with this one."""

    def __init__(self, command: list[str], word: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._expect(word)

    def _expect(self, word: str) -> None:
        said = []
        for line in self._process.stdout:
            said.append(line)
            if line.strip() == word:
                return
        pytest.fail("".join(said))

    def say(self, word: str) -> None:
        """Let it go on, until it says the next word."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._expect(word)

    def last_child(self) -> int:
        return psutil.Process(self._process.pid).children(recursive=True)[-1].pid

    def wait(self) -> None:
        self._process.wait(60)
        self._process.stdin.close()
        self._process.stdout.close()


def _write_etc(folder: Path, addresses: Mapping[str, str]) -> None:
    folder.mkdir()
    hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(hosts) + "\n", encoding="utf-8")
    lines = Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
    root = f"root:x:0:0:root:{HOME}:/bin/bash"
    others = [line for line in lines if not line.startswith("root:")]
    (folder / "passwd").write_text("\n".join([root, *others]) + "\n", encoding="utf-8")
