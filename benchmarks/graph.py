"""The graph of near spellings of two large vocabularies: what it costs to build, to keep and to load.

Every figure is from a fresh process, `python -m benchmarks.graph build|load TEACHER STUDENT FOLDER`: wall seconds, and
the peak memory of the whole process, tokenizers and libraries included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import table
from cdm.tokenizers import load_tokenizer
from cdm.vocab_map import VocabMap, vocab_map_file

LARGE_PAIR = ("llama3", "gemma")  # teacher, student: 128,256 and 256,000 ids
LOADS = 5


def measure() -> dict[str, float]:
    folder = table.real_data() / "tokenizers"
    return of_pair(*(str(folder / name) for name in LARGE_PAIR))


def of_pair(teacher: str, student: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        built = _fresh("build", teacher, student, folder)
        loads = [_fresh("load", teacher, student, folder) for _ in range(LOADS)]
        (path,) = Path(folder).iterdir()
        file_mb = path.stat().st_size / 2**20
    load, load_cpu = (statistics.median(each[name] for each in loads) for name in ("seconds", "cpu_seconds"))
    figures = {"graph_build_s": built["seconds"], "graph_mb": built["peak_mb"], "graph_load_s": load}
    more = {"build, CPU s": built["cpu_seconds"], "load, CPU s": load_cpu, "file, MB": file_mb, "edges": built["edges"]}
    more["peak before the first text was compared, MB"] = built["before_mb"]
    lines = [(name, f"{value:,.2f}") for name, value in {**figures, **more}.items()]
    table.show(f"Graph of {Path(teacher).name} x {Path(student).name}", ("", "figure"), lines)
    return figures


def _fresh(task: str, teacher: str, student: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.graph", task, teacher, student, folder]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_mb() -> float:
    """Of this process alone; `ru_maxrss` begins at the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _main(task: str, teacher: str, student: str, folder: str) -> None:
    pair = (load_tokenizer(student), load_tokenizer(teacher)) if task == "build" else None
    before, start, start_cpu = _peak_mb(), time.perf_counter(), time.process_time()
    path = vocab_map_file(*pair, 0.3, True, folder) if pair else next(Path(folder).iterdir())
    edges = len(VocabMap.load(path).graph.ids)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    print(json.dumps({**seconds, "peak_mb": _peak_mb(), "before_mb": before, "edges": edges}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
