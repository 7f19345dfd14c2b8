"""Programs that try to get out of the sandbox, and do not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from cdm import sandbox
from cdm.sandbox import Limits, Outcome, SandboxError, run

pytestmark = pytest.mark.skipif(sandbox.problem() is not None, reason=f"no sandbox here: {sandbox.problem()}")
QUICK = Limits(seconds=8)

BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.01)
"""
COUNT_CHILDREN = """
import os, time
children = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except OSError:
    print(children)
"""
COUNT_THREADS = """
import threading, time
threads = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        threads += 1
except RuntimeError:
    print(threads)
"""
DEAF = """
import signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
DETACHED = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1)
        os.close(2)
        time.sleep(999)
    os._exit(0)
print("left")
"""
FILL_THE_FOLDER = """
try:
    for number in range(99):
        open(str(number), "wb").write(b"x" * 4000000)
except OSError as error:
    print(number, error.strerror)
"""


def shown(program: str, limits: Limits = QUICK) -> str:
    """What a program that ends well prints."""
    outcome = run(program, limits)
    assert (outcome.ending, outcome.code) == ("exited", 0), outcome
    return outcome.output.strip()


def refused(attempt: str) -> str:
    """The name of the exception that one line raises inside."""
    return shown(f"import ctypes, os, socket, sys\ntry:\n    {attempt}\n    print('done')\nexcept Exception as error:\n"
                 "    print(type(error).__name__)")  # fmt: skip


def left_behind() -> list[psutil.Process]:
    """Processes of any sandbox that this process asked for."""
    commands = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [p for p, line in commands if str(sandbox.INSIDE) in line and str(os.getpid()) in line]


def test_a_program_runs_with_the_standard_library() -> None:
    program = "import collections, ctypes, decimal, hashlib, json, math, re, threading\nprint(math.gcd(12, 18), 'é')"
    assert shown(program) == "6 é"
    assert run("raise SystemExit(7)") == Outcome("exited", 7, "", pytest.approx(0, abs=60))


def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert refused(f"socket.create_connection(('127.0.0.1', {port}), timeout=3)") == "OSError"
    assert refused("socket.create_connection(('192.0.2.1', 80), timeout=3)") == "OSError"
    assert shown("import socket\nprint([name for _, name in socket.if_nameindex()])") in ("['lo']", "[]")


def test_no_file_of_the_users_and_nothing_to_write_to(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    paths = [secret, Path.home(), Path(__file__), "/etc/passwd", "/proc/self", "/sys", "/root", "/var"]
    assert shown(f"import os\nprint([p for p in {list(map(str, paths))} if os.path.exists(p)])") == "[]"
    for path in (secret, "/x", "/python/x", "/python/lib/x", "/usr/lib/x", "/lib/x", "/etc/ld.so.cache", "/dev/x"):
        assert refused(f"open({str(path)!r}, 'w')") in ("OSError", "PermissionError", "FileNotFoundError"), path
    assert shown("open('/tmp/x', 'w').write('here')\nprint(open('/box/x').read())") == "here"
    assert refused("open('/box/x')") == "FileNotFoundError", "the next program sees nothing of the last one"


def test_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    names = set(eval(shown("import os\nprint(sorted(os.environ))")))
    assert names == {"HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONHASHSEED"}
    walk = "import os\nprint(any(b'hunter2' in open(f'/proc/{p}/environ', 'rb').read() for p in (1, 2)))"
    assert "FileNotFoundError" in run(walk).output


def test_a_fork_bomb_stays_small_and_ends() -> None:
    outcome = run(BOMB, Limits(seconds=2, processes=8))
    assert outcome.ending == "time"
    assert not left_behind()
    assert 1 <= int(shown(COUNT_CHILDREN, Limits(seconds=8, processes=8))) < 8


def test_threads_count_too() -> None:
    assert int(shown(COUNT_THREADS)) < QUICK.processes


def test_an_endless_loop_and_an_endless_sleep_are_ended() -> None:
    for program in ("while True: pass", "import time\ntime.sleep(999)"):
        outcome = run(program, Limits(seconds=1.0))
        assert outcome.ending in ("time", "killed") and not left_behind()


def test_processor_time_is_limited_for_who_ignores_signals() -> None:
    assert run(DEAF, Limits(seconds=1.0)).ending in ("time", "killed")
    assert shown(DETACHED) == "left" and not left_behind(), "what it leaves behind ends with it"


def test_memory_files_and_descriptors_are_limited() -> None:
    assert refused("b'x' * (2 << 30)") == "MemoryError"
    signalled = run("f = open('x', 'wb')\nwhile True: f.write(b'x' * 1000000); f.flush()", QUICK)
    assert "File too large" in signalled.output or signalled.code == signal.SIGXFSZ
    written, reason = shown(FILL_THE_FOLDER).split(" ", 1)
    assert int(written) <= 4 and reason == "No space left on device"
    assert refused("[os.dup(1) for _ in range(99)]") == "OSError"
    assert refused("os.memfd_create('x')") == "PermissionError", "memory that only the size of a file limits"
    shared = "import ctypes\nprint(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600))"
    assert shown(shared) == "-1", "memory of System V that no limit counts"


def test_a_flood_of_output_is_cut() -> None:
    outcome = run("while True: print('x' * 1000)", Limits(seconds=8, output_bytes=10_000))
    assert outcome.ending == "output" and outcome.output.startswith("xxx") and len(outcome.output) == 10_000


def test_signals_stay_inside() -> None:
    """To everybody, to its own group, to the first process, to every id there may be."""
    mine = os.getpid()
    program = f"""
import os, signal
for target in (-1, 1, os.getppid(), {mine}, {os.getppid()}):
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(target, number)
        except OSError: pass
print("still here", flush=True)
os.kill(0, signal.SIGKILL)
"""
    outcome = run(program, QUICK)
    assert outcome.ending == "killed" and outcome.code == signal.SIGKILL and "still here" in outcome.output
    assert psutil.Process(mine).status() != psutil.STATUS_STOPPED


def test_no_way_to_more_rights() -> None:
    libc = "ctypes.CDLL(None, use_errno=True)"
    calls = (
        f"{libc}.unshare(0x10000000)",  # another user namespace
        f"{libc}.unshare(0x20000)",
        f"{libc}.mount(b'none', b'/box', b'tmpfs', 0, None)",
        f"{libc}.ptrace(16, 1, 0, 0)",  # PTRACE_ATTACH
        f"{libc}.sethostname(b'x', 1)",
    )
    assert eval(shown(f"import ctypes\nprint([{', '.join(calls)}])")) == [-1] * len(calls)
    for attempt in ("os.chroot('/box')", "os.setuid(0)", "os.setgroups([0])", "os.mknod('d', 0o60600, 0x800)"):
        assert refused(attempt) in ("PermissionError", "OSError"), attempt  # OSError: there is no such user inside
    assert shown("import os\nprint(os.getuid(), os.geteuid(), os.getgid(), os.getppid())") == "65534 65534 65534 1"


def test_nothing_is_inherited() -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        program = "import os\nfor fd in range(3, 64):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass"
        assert shown(program) == ""
    finally:
        os.close(reading)
        os.close(writing)


def test_the_inside_ends_with_the_process_that_asked() -> None:
    script = "from cdm.sandbox import Limits, run\nrun('import time; time.sleep(999)', Limits(seconds=99))"
    asking = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    inside: list[psutil.Process] = []
    while len(inside) < 2:
        assert asking.poll() is None
        inside = psutil.Process(asking.pid).children(recursive=True)
        threading.Event().wait(0.01)
    asking.kill()
    asking.wait()
    assert not psutil.wait_procs(inside, timeout=20)[1]


def test_where_it_cannot_be_shut_in_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = sandbox.INSIDE.read_text(encoding="utf-8").replace('call("unshare"', 'call("setns", -1')
    (tmp_path / "init.py").write_text(broken, encoding="utf-8")
    monkeypatch.setattr(sandbox, "INSIDE", tmp_path / "init.py")
    with pytest.raises(SandboxError, match=r"so none is run: it needs Linux 5.12 or newer and user namespaces"):
        run("print(1)")
