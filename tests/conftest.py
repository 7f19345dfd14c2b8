"""What every test needs: one thread each, nothing that calls home, and the real data where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.hookimpl(wrapper=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """For `pytest -n 2 --dist loadgroup`: a file's tests share their fixtures in one process, and so do all files that
    read the finished pipeline. What takes long begins first.
    """
    pipeline = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("pipeline" if item.path in pipeline else item.path.stem))
    items.sort(key=lambda item: (item.path not in pipeline, item.path not in slow))
    yield
