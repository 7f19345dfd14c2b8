"""Install the pinned set and this project into .venv: `python3 scripts/setup.py`, called by every make target.

Nothing to do takes a fraction of a second: a stamp, written last, says what is installed. A set-up that was stopped
half way is finished by the next one, and two at once wait for each other. Standard library only, and no newer syntax
than Python 3.6 has, so that an old Python gets a sentence and not a traceback. Exit codes: 1 an install failed, 2 this
machine or Python is not supported, 130 interrupted.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
# The newest Python that every pinned package has a wheel for: cuda-python ends at 3.12.
NEWEST_PYTHON = {"cpu": (3, 14), "gpu": (3, 12)}
OLDEST_GLIBC = (2, 31)  # llguidance's wheel
OLDEST_DRIVER = 580  # CUDA 13
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# On all cores, which pip does not, and now: with PYTHONDONTWRITEBYTECODE, as containers set it, every process would
# compile for itself what it imports, half a minute each. A quarter of the files is never imported, or one in hundreds.
# Files that are no Python 3 stay as they are.
COMPILE = """
import compileall, re, sysconfig
rarely = re.compile(r"/tests?/|/transformers/models/(?!auto/)|/ray/rllib/")
compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0, rx=rarely)
"""


class Unsupported(Exception):
    """This machine or this Python cannot run the pinned set."""


def usable_gpu(driver_versions: str) -> bool:
    """Whether `nvidia-smi --query-gpu=driver_version --format=csv,noheader` names a driver that is new enough."""
    found = re.match(r"(\d+)\.\d+", driver_versions)
    return found is not None and int(found.group(1)) >= OLDEST_DRIVER


def choose_requirements(nvidia_smi) -> str:
    """`gpu` or `cpu`; asks the program `nvidia_smi` (None: not installed) and says why a GPU is left aside."""
    if nvidia_smi is None:
        return "cpu"
    query = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if answer.returncode == 0 and usable_gpu(answer.stdout):
        return "gpu"
    said = answer.stdout.strip().split("\n")[0]
    say("nvidia-smi answers '{}', and CUDA 13 needs driver {}: using the CPU".format(said, OLDEST_DRIVER))
    return "cpu"


def check_python(version, implementation: str, choice: str) -> None:
    """Raises Unsupported for a Python without wheels for the set `choice`."""
    newest = NEWEST_PYTHON[choice]
    if implementation != "cpython" or not OLDEST_PYTHON <= tuple(version[:2]) <= newest:
        text = (
            "Python 3.{} to 3.{} (CPython) is needed for the {} set, this is {} {}.{}: try `make PYTHON=python3.11 ...`"
        )
        raise Unsupported(text.format(OLDEST_PYTHON[1], newest[1], choice.upper(), implementation, *version[:2]))


def check_machine(system: str, machine: str, libc, cpuinfo: str, choice: str) -> None:
    """Raises Unsupported where the wheels would not run. libc as platform.libc_ver(), cpuinfo as /proc/cpuinfo."""
    if (system, machine) != ("linux", "x86_64"):
        raise Unsupported("Linux on x86-64 is needed, this is {} on {}".format(system, machine))
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        found = "{} {}".format(name, version).strip() or "another C library"
        raise Unsupported("glibc {}.{} or newer is needed, this is {}".format(*OLDEST_GLIBC, found))
    if choice == "cpu" and "avx2" not in cpuinfo.split():
        raise Unsupported("a processor with AVX2 is needed to run the models without a GPU, and this one has none")


def check_venv_module() -> None:
    """Raises Unsupported where a Linux distribution ships Python without its own venv."""
    if importlib.util.find_spec("ensurepip") is None:
        package = "python3.{}-venv".format(sys.version_info[1])
        raise Unsupported(
            "Python's venv is incomplete: install your system's package for it (Debian: {})".format(package)
        )


def fingerprint(root: Path, choice: str) -> str:
    """What an up-to-date .venv was made of: the pins, the project's metadata, the Python and the place."""
    digest = hashlib.sha256()
    for name in ("requirements/{}.txt".format(choice), "requirements/base.in", "pyproject.toml"):
        digest.update((root / name).read_bytes() + b"\0")
    digest.update("{} {}.{}".format(root, *sys.version_info[:2]).encode())
    return "{} {}\n".format(choice, digest.hexdigest())


def is_current(root: Path) -> bool:
    """Whether .venv is finished and nothing it depends on has changed."""
    stamp, python = root / ".venv" / "cdm-setup", root / ".venv" / "bin" / "python"
    if not (stamp.exists() and python.exists()):
        return False
    written = stamp.read_text()
    choice = "gpu" if written.startswith("gpu ") else "cpu"
    nvidia_smi = shutil.which("nvidia-smi")
    if choice == "gpu":  # asking nvidia-smi can take seconds: it only needs to be there still
        return nvidia_smi is not None and written == fingerprint(root, choice)
    return choose_requirements(nvidia_smi) == choice and written == fingerprint(root, choice)


def torch_pin(requirements: str) -> str:
    """The line of a requirements file that pins torch."""
    return next(line for line in requirements.splitlines() if line.startswith("torch=="))


def install_commands(python: str, choice: str, requirements: str) -> list:
    """(what is said, command) of each step. The CPU build of torch goes first, as it may need a place of its own."""
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    wheels = [*pip, "--no-compile", "--only-binary", ":all:"]
    pins = sum("==" in line for line in requirements.splitlines())
    path = "requirements/{}.txt".format(choice)
    steps = [
        ("Installing the {} packages of {} (minutes, the first time)".format(pins, path), [*wheels, "-r", path]),
        ("Compiling them on all cores", [python, "-c", COMPILE]),
        ("Installing this project", [*pip, "--no-build-isolation", "--editable", "."]),
    ]
    if choice == "cpu":
        pin = torch_pin(requirements)
        steps.insert(0, ("Installing {}".format(pin), [*wheels, pin]))
    return steps


def fallback_command(command: list, output: str) -> list:
    """The same command with PyTorch's own index where pip found no CPU build of torch; else nothing."""
    if command[-1].startswith("torch==") and "No matching distribution found for torch==" in output:
        return [*command, "--extra-index-url", PYTORCH_CPU_INDEX]
    return []


def remove_half_installed(site_packages: Path) -> list:
    """Drop what pip would take for installed and is not; returns the names.

    pip writes INSTALLER after a package's files, so metadata without it is a package that was stopped half way.
    Folders named ~... are what pip set aside while it replaced a package.
    """
    half = [path for path in site_packages.glob("*.dist-info") if not (path / "INSTALLER").exists()]
    half += site_packages.glob("~*")
    for path in half:
        shutil.rmtree(str(path)) if path.is_dir() else path.unlink()
    return sorted(path.name for path in half)


def say(text: str) -> None:
    print("setup: {}".format(text), flush=True)


def run(command: list, cwd: Path, lock: int) -> str:
    """Run quietly, with a clock on a terminal; returns what it printed if it failed, else an empty string.

    The child keeps the lock open: if this process is killed, the next set-up waits for the orphan.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, cwd=str(cwd), stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,))
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)
                break
            if sys.stdout.isatty():
                print("\r  {:.0f} s ".format(time.monotonic() - start), end="\r", flush=True)
        log.seek(0)
        return (log.read() or "exit code {}".format(child.returncode)) if child.returncode else ""


def make_venv(root: Path, lock: int) -> None:
    """A .venv of this Python that can run pip; kept where it is one already."""
    venv = root / ".venv"
    same = "import pip, sys; sys.exit(sys.version_info[:2] != {})".format(tuple(sys.version_info[:2]))
    if (venv / "bin" / "python").exists() and not run([str(venv / "bin" / "python"), "-c", same], root, lock):
        for site_packages in venv.glob("lib/python3.*/site-packages"):
            for name in remove_half_installed(site_packages):
                say("Removed the unfinished {}".format(name))
        return
    say("Creating .venv with Python {}".format(platform.python_version()))
    failed = run([sys.executable, "-m", "venv", "--clear", str(venv)], root, lock)
    if failed:
        raise SystemExit("{}\nsetup: creating .venv failed; the message is above".format(failed))


def set_up(root: Path, choice: str, lock: int) -> None:
    """All steps; the stamp goes first and comes back last."""
    stamp = root / ".venv" / "cdm-setup"
    if stamp.exists():
        stamp.unlink()
    make_venv(root, lock)
    requirements = (root / "requirements" / "{}.txt".format(choice)).read_text()
    made_of = fingerprint(root, choice)
    for title, command in install_commands(str(root / ".venv" / "bin" / "python"), choice, requirements):
        say(title)
        start = time.monotonic()
        failed = run(command, root, lock)
        fallback = fallback_command(command, failed)
        if fallback:
            say("pip's own places have no such build: asking {}".format(PYTORCH_CPU_INDEX))
            failed = run(fallback, root, lock)
        if failed:
            raise SystemExit("{}\nsetup: '{}' failed; the message is above".format(failed, title))
        say("  took {:.0f} s".format(time.monotonic() - start))
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(made_of)
    os.replace(str(unfinished), str(stamp))


def main(root: Path = ROOT) -> None:
    if is_current(root):
        return
    choice = choose_requirements(shutil.which("nvidia-smi"))
    check_python(sys.version_info, sys.implementation.name, choice)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    check_machine(sys.platform, platform.machine(), platform.libc_ver(), flags, choice)
    check_venv_module()
    import fcntl  # not on every platform that the checks above turn away

    with open(str(root / ".venv.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is running: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_current(root):
            set_up(root, choice, lock.fileno())
            say("Ready: .venv holds the {} set".format(choice.upper()))


if __name__ == "__main__":
    try:
        main()
    except Unsupported as problem:
        print("setup: {}".format(problem), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("setup: interrupted; the next run goes on from here", file=sys.stderr)
        sys.exit(130)
