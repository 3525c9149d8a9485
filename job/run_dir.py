"""The folder of a run, ``run.dir``: claimed by rank 0 before anything is computed, so that no run is ever lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any

from job.config import Config
from job.errors import CheckpointError, JobError, UsageError

CONFIG, METRICS, TENSORBOARD, SUMMARY, CHECKPOINTS, PROFILE = (
    "config.yaml", "metrics.jsonl", "tensorboard", "summary.json", "checkpoints", "profile",
)  # fmt: skip
CONTENTS = (CONFIG, METRICS, TENSORBOARD, SUMMARY, CHECKPOINTS, PROFILE)
LOCK = "lock"


def check(config: Config) -> None:
    """Refuse a folder that holds a run, unless the configuration says to go on with it or to replace it.

    Raises:
        UsageError: the folder holds a run, or another process is using it, or it is no folder.
        CheckpointError: it is to be gone on with, and there is nothing to go on from.
    """
    folder = config.run.dir
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run.dir={folder} is a file, not a folder")
    if (folder / LOCK).exists():
        with open(folder / LOCK, encoding="utf-8") as lock:
            _acquire(lock, folder)
    held = [name for name in CONTENTS if (folder / name).exists()]
    if not held or config.run.overwrite:
        return
    if config.run.resume == "auto":
        _require_checkpoints(folder)
    elif config.run.resume == "never" or Path(config.run.resume).resolve().parent != (folder / CHECKPOINTS).resolve():
        raise UsageError(
            f"run.dir={folder} already holds a run ({', '.join(held)}); give another run.dir, run.resume=auto to go on"
            " with it, or run.overwrite=true to replace it"
        )


def claim(config: Config) -> IO[str]:
    """Check the folder, lock it, empty it unless its run is to be gone on with, and write the resolved config.

    Only files of an earlier run are removed, and nothing else. Returns the lock, which is held until it is closed or
    the process ends, however it ends.
    """
    check(config)
    folder = config.run.dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (held for as long as the process lives)
        _acquire(lock, folder)
        _write_holder(lock)
        goes_on = config.run.resume != "never" and any((folder / CHECKPOINTS).glob("step-*"))
        for name in (SUMMARY,) if goes_on else CONTENTS:
            _remove(folder / name)
        write_whole(folder / CONFIG, config.to_yaml())
    except OSError as error:
        raise JobError(f"run.dir={folder}: cannot be written: {error.strerror}") from None
    return lock


def _require_checkpoints(folder: Path) -> None:
    """A run that has recorded anything has written a checkpoint before."""
    metrics = folder / METRICS
    if metrics.exists() and metrics.stat().st_size and not any((folder / CHECKPOINTS).glob("step-*")):
        raise CheckpointError(
            f"run.dir={folder}: holds a run, but none of its checkpoints, so there is nothing to go on from; put"
            " checkpoints/ back, or give run.overwrite=true to start anew"
        )


def _acquire(lock: IO[str], folder: Path) -> None:
    """Take the lock. The kernel frees it when its holder dies, so that no dead process ever holds one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise UsageError(f"run.dir={folder} is in use by {holder}; give another run.dir, or end that run") from None


def _write_holder(lock: IO[str]) -> None:
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, whose presence says that the run is complete."""
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a file such that a reader finds all of it or none, also after a crash."""
    temporary = file.with_name(file.name + ".partial")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
