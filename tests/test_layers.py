"""The direction of imports, read off the files: lazy imports cannot hide and nothing needs to be installed.

`cdm/` has one order: a module may import those before it and no other. A file that is not in the order fails: say
where it belongs. Layer 1 takes values and keyword arguments, so it may not import the configuration.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOUNS = (
    *("records", "config_errors", "config_types", "config_corpus", "config_models", "config_methods"),
    *("config_search", "config_compare", "config_tasks", "config"),
)
CORE = (
    *("parts", "top_k", "codec", "alignment", "spelling", "neighbours", "images", "vocab_map"),
    *("losses", "rows", "head", "pairs", "baselines", "methods", "pieces", "speed", "step", "intervals"),
)
STAGES = (
    *("progress", "tokenizers", "python_functions", "sources", "documents"),
    *("corpus", "models", "logit_rows", "engines", "teacher", "shards"),
    *("checks", "generators", "generation"),
    *("sandbox_init", "sandbox", "tasks", "answers"),
    *("grouping", "batches", "adapters", "preflight", "evaluation", "scores", "harness"),
    *("checkpoints", "validation", "export", "student"),
    *("journal", "tracking", "report", "search", "trials", "comparison", "lineage"),
    *("text_view", "mappings", "figures", "page", "score_view", "overview"),
    *("inspection_parts", "inspection", "verification"),
    *("rates", "model_size", "corpus_size", "calibration", "speeds", "planning", "plan_view"),
)
ORDER = ("__init__", *NOUNS, *CORE, *STAGES, "cli")
# In ray_jobs the module-level imports follow this order; `python -m ray_jobs.X` may hand over to the pipeline.
ENGINE_JOBS = ("pool", "generate", "score")
FIRST_JOBS = ("__init__", "cluster", *ENGINE_JOBS, "align", "train", "evaluate", "runs", "stages")
JOBS = (*FIRST_JOBS, "tasks", "search", "compare", "pipeline", "measure")

LIBRARY = sorted((ROOT / "cdm").glob("**/*.py"))
JOB_FILES = sorted((ROOT / "ray_jobs").glob("**/*.py"))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full dotted names that any import in `tree` may load; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) else f"<computed: {ast.unparse(name)}>"


def is_block(node: ast.stmt, name: str) -> bool:
    """Whether `node` is an `if` that asks for `name`: TYPE_CHECKING or __name__."""
    return isinstance(node, ast.If) and name in ast.unparse(node.test)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module without its `if TYPE_CHECKING:` blocks, which no interpreter runs."""
    return ast.Module(body=[node for node in tree.body if not is_block(node, "TYPE_CHECKING")], type_ignores=[])


def module_level(tree: ast.Module) -> ast.Module:
    """What importing the module runs: no bodies of functions and classes, no `if __name__ == "__main__":`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = [node for node in tree.body if not isinstance(node, kinds) and not is_block(node, "__name__")]
    return ast.Module(body=body, type_ignores=[])


def submodules(names: Iterator[str], package: str, known: tuple[str, ...]) -> set[str]:
    """Which modules of `package` are meant; the package itself and names that its modules define do not count."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == package and len(part) > 1 and (len(part) > 2 or part[1] in known)}


def faults(source: str, module: str) -> list[str]:
    """What is wrong with the imports of cdm/<module>.py."""
    tree = ast.parse(source)
    names = list(imported(tree, "cdm"))
    if module not in ORDER:
        return [f"cdm/{module}.py has no place in the order"]
    ours = submodules(iter(names), "cdm", ORDER)
    wrong = [f"{module} imports cdm.{name}, which comes later" for name in ours if name not in allowed(module)]
    tops = {name.split(".")[0] for name in names}
    wrong += [f"{module} imports {name}" for name in sorted(tops) if name == "ray" or name.startswith("<computed")]
    at_import = {name.split(".")[0] for name in imported(without_type_checking(tree), "cdm")}
    eager = {name.split(".")[0] for name in imported(module_level(tree), "cdm")}
    if "ray_jobs" in tops and (module != "cli" or "ray_jobs" in eager):
        wrong.append(f"{module} imports ray_jobs: only cli may, and only inside a function")
    if module in NOUNS and "torch" in at_import:
        wrong.append(f"{module} imports torch")
    return wrong


def allowed(module: str) -> set[str]:
    """The modules of cdm that `module` may import."""
    before = set(ORDER[: ORDER.index(module)])
    return before - {"config", "config_errors"} if module in CORE else before


def test_there_is_something_to_check() -> None:
    assert {"records.py", "config.py"} <= {path.name for path in LIBRARY} and JOB_FILES


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    assert path.parent == ROOT / "cdm", "cdm is flat"
    assert faults(path.read_text(), path.stem) == []


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_jobs_import_the_library_and_earlier_jobs(path: Path) -> None:
    assert path.parent == ROOT / "ray_jobs" and path.stem in JOBS, f"{path} has no place in the order"
    tree = ast.parse(path.read_text())
    assert "cli" not in submodules(imported(tree, "ray_jobs"), "cdm", ORDER)
    eager = submodules(imported(module_level(tree), "ray_jobs"), "ray_jobs", JOBS)
    assert eager <= set(JOBS[: JOBS.index(path.stem)])
    assert not [name for name in imported(tree, "ray_jobs") if name.startswith("<computed")]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "from cdm.student import train"),
        ("losses", "from . import student"),
        ("losses", "from .tokenizers import Tokenizer"),
        ("losses", "from cdm.config import Config"),
        ("losses", "import cdm.methods as m"),
        ("corpus", "def f():\n    import cdm.teacher"),
        ("corpus", "from importlib import import_module\nimport_module('cdm.teacher')"),
        ("corpus", "import importlib\nimportlib.import_module('cdm.' + name)"),
        ("teacher", "def f():\n    from ray import data"),
        ("student", "class A:\n    import ray.train"),
        ("student", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"),
        ("student", "def f():\n    from ray_jobs.train import run"),
        ("cli", "from ray_jobs import pipeline"),
        ("cli", "import ray"),
        ("records", "def f():\n    import torch"),
        ("novelty", "import os"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods", "from cdm.losses import topk_kl\nfrom cdm.records import LossOutput\nfrom . import vocab_map"),
        ("records", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("student", "from cdm import __version__, config\nimport rayon, array"),
        ("cli", "def train():\n    from ray_jobs.pipeline import run\n    from cdm.report import table"),
    ],
)
def test_the_check_passes(module: str, source: str) -> None:
    assert faults(source, module) == []


def existing(*modules: str) -> list[str]:
    return [f"cdm.{module}" for module in modules if (ROOT / "cdm" / f"{module}.py").exists()]


def in_a_fresh_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NO_CLUSTER = ("ray", "vllm", "mlflow", "datasets", "pandas")


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        (existing(*NOUNS, *CORE), NO_CLUSTER),
        (existing("student"), NO_CLUSTER),
        (existing("alignment", "vocab_map", "step"), (*NO_CLUSTER, "pyarrow", "pydantic", "yaml", "typer", "rich")),
    ],
    ids=["core", "student", "step"],
)
def test_the_core_needs_no_cluster_and_no_tracker(modules: list[str], blocked: tuple[str, ...]) -> None:
    """Layers 0 and 1 and the training loop run without a cluster, the step with the numeric libraries alone."""
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({blocked}))", *(f"import {name}" for name in modules)]
    in_a_fresh_python("\n".join(lines))


@pytest.mark.parametrize("module", existing("config", "cli"))
def test_the_doorway_is_light(module: str) -> None:
    """Parsing a config or a command line must not wait for the heavy libraries."""
    heavy = ("torch", "ray", "vllm", "mlflow", "transformers")
    loaded = in_a_fresh_python(f"import sys, {module}\nprint(*(name for name in {heavy} if name in sys.modules))")
    assert loaded == ""
