"""What checkpoints are kept, whose they are, and what happens while one is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils._pytree import tree_flatten_with_path

from cdm.checkpoints import Checkpoints, FolderCheckpoints, Progress, TrainingState


@pytest.fixture(autouse=True, scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(identity: dict[str, object] | None = None, seed: int = 0) -> TrainingState:
    """A model after one update, so that its optimiser has a state too."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return TrainingState(model, optimizer, identity or {"seed": 3})


def save(one: TrainingState, checkpoints: Checkpoints, step: int, best_step: int = 0) -> None:
    one.save(checkpoints, Progress(step, 2.5, best_step=best_step), {})


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_all_of_a_state_comes_back(tmp_path: Path) -> None:
    one, other = state(seed=1), state(seed=2)
    checkpoints = FolderCheckpoints(str(tmp_path))
    save(one, checkpoints, 7)
    checkpoints.wait()
    assert other.restore(FolderCheckpoints(str(tmp_path))) == Progress(7, 2.5)
    assert plain(other) == plain(one)


def plain(one: TrainingState) -> list[tuple]:
    leaves, _ = tree_flatten_with_path(one.state_dict())
    return [(path, leaf.tolist() if torch.is_tensor(leaf) else leaf) for path, leaf in leaves]


def test_without_a_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    assert state().restore(FolderCheckpoints(str(tmp_path / "none"))) == Progress()


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing waits until the weights have changed."""
    changed, write = Future[None](), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *args: (changed.result(), write(*args))[1])
    one, checkpoints = state(), FolderCheckpoints(str(tmp_path))
    before = one.model.weight.detach().clone()
    save(one, checkpoints, 1)
    with torch.no_grad():
        one.model.weight.zero_()
    changed.set_result(None)
    checkpoints.wait()
    one.restore(checkpoints)
    assert torch.equal(one.model.weight, before)


@pytest.mark.parametrize(
    ("keep", "bests", "expected"),
    [
        (1, [], [5]),
        (2, [], [4, 5]),
        (9, [], [1, 2, 3, 4, 5]),
        (1, [1, 2], [2, 5]),
        (2, [1, 2], [2, 4, 5]),
        (2, [1, 4], [4, 5]),
    ],
)
def test_the_newest_are_kept_and_the_best(tmp_path: Path, keep: int, bests: list[int], expected: list[int]) -> None:
    """bests: the steps that were better than all before."""
    one, checkpoints = state(), FolderCheckpoints(str(tmp_path), keep=keep)
    for step in range(1, 6):
        save(one, checkpoints, step, best_step=max((best for best in bests if best <= step), default=0))
    checkpoints.wait()
    assert kept(tmp_path) == expected and len(list(tmp_path.iterdir())) == len(expected)
    assert one.restore(FolderCheckpoints(str(tmp_path))).step == 5
    with checkpoints.at(expected[0]) as folder:
        assert folder == str(tmp_path / f"step_{expected[0]:08d}")


def test_a_checkpoint_of_another_run_is_refused_naming_both(tmp_path: Path) -> None:
    checkpoints = FolderCheckpoints(str(tmp_path))
    save(state({"seed": 3, "weights": (1.0, 0.5)}), checkpoints, 1)
    checkpoints.wait()
    state({"seed": 3, "weights": (1.0, 0.5)}).restore(checkpoints)
    with pytest.raises(ValueError, match=r"step_00000001 is a checkpoint of another run: seed is 3 there and 4 here"):
        state({"seed": 4, "weights": (1.0, 0.5)}).restore(checkpoints)


def test_a_failed_save_is_raised_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, checkpoints = state(), FolderCheckpoints(str(tmp_path))
    save(one, checkpoints, 1)
    checkpoints.wait()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        save(one, checkpoints, 2)
        with pytest.raises(OSError, match=r"process 0 could not write its part .*No space left on device"):
            save(one, checkpoints, 3)
    again = FolderCheckpoints(str(tmp_path))
    assert kept(tmp_path) == [1]
    save(one, again, 2)  # what was half written is written whole
    again.wait()
    assert kept(tmp_path) == [1, 2]


def test_one_save_at_a_time(tmp_path: Path) -> None:
    running: list[str] = []

    def write(folder: str, done: Future[None]) -> Future[None]:
        Path(folder).mkdir(parents=True)
        running.append(folder[-1])
        return done

    checkpoints = FolderCheckpoints(str(tmp_path))
    first, second = Future[None](), Future[None]()
    checkpoints.save(1, lambda folder: write(folder, first), {})
    assert running == ["1"] and kept(tmp_path) == []
    first.set_result(None)
    checkpoints.save(2, lambda folder: write(folder, second), {})
    assert running == ["1", "2"] and kept(tmp_path) == [1]
    second.set_result(None)
    checkpoints.wait()
    assert kept(tmp_path) == [1, 2]
