"""Rewrite requirements/gpu.txt and requirements/cpu.txt: exact pins of everything, without a host or a path.

The GPU set is resolved first and constrains the CPU set, so that what both have is the same version in both. Wheels
only, for the oldest supported Python and glibc. Uses uv in a throw-away environment; `make lock` calls this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTORCH_CPU_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
HEADER = "# Written by `make lock`; edit the .in files. Every dependency is listed: install with --no-deps.\n"


def compile_command(uv: str, source: str, output: str, *extra: str) -> list[str]:
    """The uv command that resolves `source` (in the project) into the file `output`."""
    return [
        *(uv, "pip", "compile", "--quiet", "--upgrade"),
        *("--no-emit-index-url", "--no-emit-find-links", "--no-header", "--no-annotate"),
        *("--only-binary", ":all:", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31"),
        *extra,
        *("--output-file", output, source),
    ]


def main() -> None:
    wheels = os.environ.get("PIP_FIND_LINKS", PYTORCH_CPU_WHEELS).split()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        subprocess.run([f"{folder}/bin/pip", "install", "--quiet", "uv"], check=True)
        uv, gpu, cpu = f"{folder}/bin/uv", f"{folder}/gpu.txt", f"{folder}/cpu.txt"
        # No find-links for the GPU: uv would prefer 2.13.0+cpu to 2.13.0.
        subprocess.run(compile_command(uv, "requirements/gpu.in", gpu), cwd=ROOT, check=True)
        only_cpu = [
            *("--constraints", gpu, "--overrides", "requirements/cpu-overrides.txt"),
            *(part for place in wheels for part in ("--find-links", place)),
        ]
        subprocess.run(compile_command(uv, "requirements/cpu.in", cpu, *only_cpu), cwd=ROOT, check=True)
        for path in (gpu, cpu):  # only when both resolved
            pins = Path(path).read_text()
            target = ROOT / "requirements" / Path(path).name
            target.write_text(HEADER + pins)
            print(f"{target.relative_to(ROOT)}: {len(pins.splitlines())} pins")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"lock: {' '.join(error.cmd[:3])} failed; the pins are as they were")
