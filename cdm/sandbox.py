"""Code that a model wrote, run where it can harm nobody: `run` a Python program (layer 2).

The program is a process of its own in new namespaces (`cdm.sandbox_init`): no network, no process but its own, no file
of this machine but the interpreter and the C libraries, an empty environment, no privileges, and limits on time,
memory, processes, files and output. It works for root and for users without rights, wherever the kernel lets them make
user namespaces. Where one part of it is missing nothing is run.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

MIB = 1 << 20
INSIDE = Path(__file__).with_name("sandbox_init.py")
STATUS_BYTES = 4096
Ending = Literal["exited", "killed", "time", "output"]


class SandboxError(ValueError):
    """This machine cannot shut a program in."""


@dataclass(frozen=True)
class Limits:
    """memory_mib: address space of each process; together they have at most `processes` times that."""

    seconds: float = 10.0
    memory_mib: int = 512
    processes: int = 8
    file_mib: int = 8
    folder_mib: int = 16
    open_files: int = 32
    output_bytes: int = 64 * 1024

    def inside(self) -> dict[str, int]:
        return {
            "cpu_seconds": int(self.seconds) + 1,
            "memory": self.memory_mib * MIB,
            "processes": self.processes,
            "file_size": self.file_mib * MIB,
            "folder_size": self.folder_mib * MIB,
            "open_files": self.open_files,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended. exited: by itself, with `code`; killed: by signal `code`; time, output: it went beyond.

    output: what it wrote to both its outputs, the first `output_bytes` of it.
    """

    ending: Ending
    code: int
    output: str
    seconds: float


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program and wait for it, `limits.seconds` at most; whatever it started has ended then too.

    Raises SandboxError where this machine cannot shut it in: it was not run.
    """
    began = time.monotonic()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as status:
        try:
            process = _start(program, writing, limits)
        finally:
            os.close(writing)
        with _ended(process) as output:
            written, ending = _follow(process, output, began + limits.seconds, limits.output_bytes)
        said = status.read(STATUS_BYTES).decode()
    code = _wait_status(said, ending)
    text = written.decode("utf-8", "replace")
    seconds = time.monotonic() - began
    if ending is not None or code is None:
        return Outcome(ending or "killed", signal.SIGKILL, text, seconds)
    if os.WIFSIGNALED(code):
        return Outcome("killed", os.WTERMSIG(code), text, seconds)
    return Outcome("exited", os.WEXITSTATUS(code), text, seconds)


@cache
def problem() -> str | None:
    """Why nothing can be run here; None: it can."""
    try:
        outcome = run("pass")
    except SandboxError as error:
        return str(error)
    return None if outcome.code == 0 else f"an empty program fails in the sandbox: {outcome.output or outcome.ending}"


def _start(program: str, status: int, limits: Limits) -> subprocess.Popen[bytes]:
    python = os.path.realpath(sys.executable)
    arguments = [str(os.getpid()), sys.base_prefix, python, str(status), json.dumps(limits.inside())]
    process = subprocess.Popen(
        [python, "-I", "-S", "-B", str(INSIDE), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}, cwd="/", pass_fds=(status,), start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stdin:  # it ended before it read: its status says why
        stdin.write(program.encode("utf-8", "replace"))
    return process


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[Any]:
    """Its output; at the end the outer process ends all that is inside and waits for it."""
    assert process.stdout is not None
    with process.stdout as output:
        try:
            yield output
        finally:
            process.terminate()
            process.wait()


def _follow(process: subprocess.Popen[bytes], output: Any, deadline: float, most: int) -> tuple[bytes, Ending | None]:
    """What the program writes until it ends or must be ended."""
    written = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return written, "time"
            some = os.read(output.fileno(), 65536)
            if not some:  # all who could write have ended, or closed it
                return written, _until_the_end(process, deadline)
            written += some
            if len(written) > most:
                return written[:most], "output"


def _until_the_end(process: subprocess.Popen[bytes], deadline: float) -> Ending | None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "time"
    return None


def _wait_status(said: str, ending: Ending | None) -> int | None:
    """The program's wait status; None where it was ended. Raises SandboxError where it never began."""
    lines = said.splitlines()
    if "ready" in lines:
        return int(lines[-1]) if lines[-1].isdigit() else None
    if ending == "time" and not lines:
        return None
    reason = lines[0] if lines else "it ended before it began"
    raise SandboxError(
        f"code that a model wrote cannot be shut in here ({reason}), so none is run: it needs Linux 5.12 or newer and "
        "user namespaces; Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: "
        "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    )
