"""Checkpoints in memory: which one a run goes on from, and what becomes of the last one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job import storage
from job.checkpoints import commits, store
from job.checkpoints.commits import Commits, Progress, bring_to_disk, forget_progress, progress, rescue
from job.checkpoints.resume import Checkpoints, identity
from job.checkpoints.store import BackgroundWriter, Store
from job.config import Config, load_config
from job.distributed.comm import Comm
from job.errors import CheckpointError

DIGESTS = dict.fromkeys(("train_images", "train_labels", "test_images", "test_labels"), "a")


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def written(folder: Path, step: int, config: Config) -> None:
    state = {"config": identity(config, 1, DIGESTS), "parts": {"at": step}}
    Store(folder, 9).write(step, {"network/a": np.full(3, step, np.float32)}, state)


def chosen(tmp_path: Path, memory: Path, config: Config) -> int:
    """The step that a run goes on after."""
    of_memory = Commits(memory, 10, writes=True)
    writer = BackgroundWriter(Store(tmp_path / "run" / "checkpoints", 9))
    found = Checkpoints(writer, of_memory, Comm(), config, identity(config, 1, DIGESTS))._choose()
    writer.close()
    of_memory.close()
    return found.step if found else -1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(overrides=[f"run.dir={tmp_path}/run", "run.resume=auto"])


@pytest.mark.parametrize(("on_disk", "in_memory", "newest"), [(20, 24, 24), (30, 24, 30), (24, 24, 24), (20, None, 20)])
def test_a_run_goes_on_from_the_newest_of_disk_and_memory(
    tmp_path: Path, memory: Path, config: Config, on_disk: int, in_memory: int, newest: int
) -> None:
    written(tmp_path / "run" / "checkpoints", on_disk, config)
    if in_memory:
        written(memory, in_memory, config)
    assert chosen(tmp_path, memory, config) == newest


def test_a_commit_without_a_checkpoint_on_the_disk_is_of_another_run(
    tmp_path: Path, memory: Path, config: Config
) -> None:
    written(memory, 24, config)
    assert chosen(tmp_path, memory, config) == -1


@pytest.mark.parametrize("file", ["arrays.params", "state.json", "manifest.json"])
def test_a_damaged_commit_is_told_and_the_disk_used(
    tmp_path: Path, memory: Path, config: Config, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "run" / "checkpoints", 20, config)
    written(memory, 24, config)
    damaged = memory / "step-00000024" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert chosen(tmp_path, memory, config) == 20
    assert f"warning: {damaged}: damaged" in capsys.readouterr().err


def test_of_commits_one_is_kept_and_half_of_one_is_none(memory: Path, config: Config) -> None:
    (memory / "step-00000007.partial").mkdir()  # whose writer was killed
    of_memory = Commits(memory, 10, writes=True)
    assert of_memory.newest(print) is None
    for step in (10, 20):
        assert of_memory.due(step) and not of_memory.due(step + 1)
        of_memory.write(step, {"network/a": np.zeros(3, np.float32)}, {})
    of_memory.close()
    assert sorted(path.name for path in memory.iterdir()) == ["progress", "step-00000020"]


def test_full_memory_is_told_once_and_ends_nothing(
    memory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_write", full)
    of_memory = Commits(memory, 1, writes=True)
    for step in range(5):
        of_memory.write(step, {}, {})
        of_memory._writer.wait()  # type: ignore[union-attr]
    of_memory.close()
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_only_one_rank_of_a_host_writes(memory: Path) -> None:
    of_memory = Commits(memory, 1, writes=False)
    of_memory.write(1, {}, {})
    of_memory.tell(1)
    of_memory.close()
    assert list(memory.iterdir()) == []


def test_what_a_killed_writer_has_left_is_removed_on_every_host(memory: Path) -> None:
    for name in ("step-00000007", "step-00000009.partial"):
        (memory / name).mkdir()
    Commits(memory, 1, writes=True).close()
    assert not (memory / "step-00000009.partial").exists()
    assert (memory / "step-00000007").exists()


def test_nobody_commits_where_nobody_supervises(monkeypatch: pytest.MonkeyPatch, memory: Path) -> None:
    monkeypatch.delenv(commits.FOLDER, raising=False)
    assert commits.open_commits(1, True) is None
    monkeypatch.setenv(commits.FOLDER, str(memory))
    assert commits.open_commits(1, False) is not None


def test_the_supervisor_learns_how_far_the_run_is(memory: Path) -> None:
    assert progress(memory) is None
    of_memory = Commits(memory, 10, writes=True)
    assert progress(memory) is None
    for step in (99_999, 100_000, 100_001):
        of_memory.tell(step)
    assert progress(memory) == Progress(99_999, 100_001)
    of_memory.close()
    forget_progress(memory)
    assert progress(memory) is None


def test_the_last_commit_becomes_a_checkpoint_that_is_read_as_any_other(
    tmp_path: Path, memory: Path, config: Config
) -> None:
    written(tmp_path / "run" / "checkpoints", 20, config)
    written(memory, 24, config)
    bring_to_disk(memory, tmp_path / "run")
    assert store.read(tmp_path / "run" / "checkpoints" / "step-00000024") == store.read(memory / "step-00000024")


@pytest.mark.parametrize("on_disk", [24, 30])
def test_one_that_the_disk_is_ahead_of_does_not(tmp_path: Path, memory: Path, config: Config, on_disk: int) -> None:
    written(tmp_path / "run" / "checkpoints", on_disk, config)
    written(memory, 24, config)
    bring_to_disk(memory, tmp_path / "run")
    assert [path.name for path in Store(tmp_path / "run" / "checkpoints", 1).paths()] == [f"step-{on_disk:08d}"]


def test_nor_one_that_is_damaged(tmp_path: Path, memory: Path, config: Config) -> None:
    written(memory, 24, config)
    (memory / "step-00000024" / "state.json").write_bytes(b"{}")
    bring_to_disk(memory, tmp_path / "run")
    assert Store(tmp_path / "run" / "checkpoints", 1).paths() == []


def test_a_disk_that_is_full_then_is_told(
    tmp_path: Path, memory: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(memory, 24, config)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(CheckpointError, match="cannot write the last commit: No space left on device"):
        bring_to_disk(memory, tmp_path / "run")


def test_a_commit_is_saved_from_a_host_of_many_unless_the_folder_is_in_use(
    tmp_path: Path, memory: Path, config: Config
) -> None:
    checkpoints = Store(tmp_path / "run" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="the last commit was not saved"):
        rescue(memory, tmp_path / "run", 0.0)  # no run has claimed the folder
    written(tmp_path / "run" / "checkpoints", 20, config)
    written(memory, 24, config)
    with open(tmp_path / "run" / "lock", "w") as lock:
        storage.lock(lock)
        with pytest.raises(CheckpointError, match="the last commit was not saved"):
            rescue(memory, tmp_path / "run", 0.0)
        assert [path.name for path in checkpoints.paths()] == ["step-00000020"]
    rescue(memory, tmp_path / "run", 0.0)
    assert checkpoints.paths()[0].name == "step-00000024"
