"""What every test needs: one thread each, nothing that calls home, and the real data where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# Before any library is imported; child processes inherit it.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, in this process."""
    import torch.distributed as dist

    if dist.is_initialized():  # an engine of vLLM leaves its own
        dist.destroy_process_group()
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models and texts that CDM_REAL_DATA names; the test is skipped without it."""
    folder = os.environ.get("CDM_REAL_DATA")
    if not folder:
        pytest.skip("CDM_REAL_DATA is not set")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"CDM_REAL_DATA names no folder: {folder}")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Storage, config and output of one undisturbed run of the whole tiny pipeline, with a baseline."""
    from tests import whole

    folder = tmp_path_factory.mktemp("pipeline")
    config = whole.write_config(folder, folder / "storage", baselines=[{"type": "sft"}])
    process = whole.start("pipeline", config)
    output = whole.finish(process)
    assert process.returncode == 0, output
    return folder / "storage", config, output


# Files that share what is slow to make: the finished pipeline, the real tokenizers.
TOGETHER = {
    "tests/test_jobs.py": "tests/test_pipeline.py",
    "tests/test_search_job.py": "tests/test_pipeline.py",
    "tests/test_plan_command.py": "tests/test_pipeline.py",
    "tests/test_compare_job.py": "tests/test_pipeline.py",
    "tests/test_ui.py": "tests/test_pipeline.py",
    "tests/test_exactness.py": "tests/test_golden.py",
    "tests/test_tokenizers.py": "tests/test_golden.py",
}


class Scheduling(LoadFileScheduling):
    """A file's tests run in one process, and so do the files of TOGETHER."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""
    pipeline = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in pipeline, item.path not in slow))
