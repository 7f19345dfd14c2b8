"""The whole pipeline at tiny size: its config, and how tests start it as people do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from cdm.records import Message

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "name": "tiny",
    "corpus": {
        "type": "python_packages",
        "packages": ["json", "email", "argparse", "logging"],
        "max_documents": 120,
        "max_response_bytes": 600,
        "validation_share": 0.1,
        "test_share": 0.1,
        "part_documents": 40,
    },
    "teachers": [
        {
            "model": {
                "type": "pretrain", "name": "teacher", "architecture": "qwen2", "context": 512,
                "tokenizer": {"type": "byte_level_bpe", "vocab_size": 600},
                "hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2, "kv_heads": 1,
                "training": {"steps": 4, "batch_tokens": 1500, "checkpoint_every": 2, "max_length": 512},
            },
            "engine": {"type": "vllm", "kv_cache_gib": 0.1},
            "top_k": 20,
            "max_length": 512,
        }
    ],
    "student": {
        "model": {
            "type": "pretrain", "name": "student", "architecture": "llama", "context": 512,
            "tokenizer": {"type": "sentencepiece_bpe", "vocab_size": 500},
            "hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 2,
            "training": {"steps": 0},
        },
        "steps": 8, "batch_tokens": 1500, "max_length": 512, "checkpoint_every": 2, "validate_every": 4,
        "min_coverage": 0.5, "precision": "float32", "best": {"metric": "validation_agreement"},
    },
    "method": {"type": "cdm", "top_k": 20},
    "evaluation": {"documents": 8, "samples": 1, "sample_tokens": 8},
    "resources": {"student": {"workers": 2}},
}  # fmt: skip


def write_config(folder: Path, storage: Path, **changes: object) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"storage": str(storage)} | changes), encoding="utf-8")
    return str(file)


def brief(prompt: tuple[Message, ...], response: str, metadata: dict[str, str]) -> bool:
    """A check of generated responses, as a user would write one."""
    return bool(prompt[-1].content) and bool(metadata["module"]) and len(response) < 12


def start(stage: str, config: str, *options: str) -> subprocess.Popen[str]:
    """`cdm STAGE CONFIG` in a process group of its own, what it prints on one pipe."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "cdm.cli", stage, config, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=500)
    return output


def students(storage: Path) -> list[Path]:
    return sorted((storage / "students").iterdir())


def runs(storage: Path) -> dict[str, Any]:
    """MLflow's runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("cdm")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def without_the_student(storage: Path, copy: Path) -> None:
    """A copy of a finished storage folder in which training with `cdm` and what follows are still to do."""
    shutil.copytree(
        storage, copy, ignore=shutil.ignore_patterns("cdm-*", "*-cdm-*", "reports", "mlflow.db", "tracking")
    )
