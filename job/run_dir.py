"""The folder of a run, ``run.dir``: claimed by rank 0 before anything is computed, so that no run is ever lost.

Nor any file of somebody else's: what a run removes must prove to be of a run.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from job import storage
from job.config import Config
from job.errors import CheckpointError, JobError, UsageError

CONFIG, DATASET, METRICS, CHANGES, TENSORBOARD, SUMMARY, CHECKPOINTS, PROFILE = (
    "config.yaml", "dataset.json", "metrics.jsonl", "changes.jsonl", "tensorboard", "summary.json", "checkpoints",
    "profile",
)  # fmt: skip
CONTENTS = (CONFIG, DATASET, METRICS, CHANGES, TENSORBOARD, SUMMARY, CHECKPOINTS, PROFILE)
LOCK = "lock"
CHECKPOINT = re.compile(r"step-\d{8,}")  # the name of a checkpoint that is whole
UNFINISHED = re.compile(r"step-\d{8,}(\.old)?\.partial")  # of one that is being written or removed

_POLL_SECONDS = 0.1
_PARTIAL = ".partial"  # ends the name of a file that is being written
_WRITTEN = {  # by a run, into its folders
    TENSORBOARD: re.compile(
        r"events\.out\.tfevents\..+|projector_config\.pbtxt|\d{5,}/[^/]+/(sprite\.png|metadata\.tsv|tensors\.tsv)"
    ),
    CHECKPOINTS: re.compile(r"step-\d{8,}(\.old)?(\.partial)?/(arrays\.params|state\.json|manifest\.json)"),
    PROFILE: re.compile(r"steps?-\d+(-\d+)?\.(rank\d+|horovod)\.json(\.partial)?|steps?-\d+(-\d+)?\.rank\d+\.raw"),
}
_SECTIONS = {"run", "train", "data", "model", "optimizer"}  # that the config.yaml of every run has


def check(config: Config) -> None:
    """Refuse a folder that holds a run, unless the configuration says to go on with it or to replace it.

    Raises:
        UsageError: the folder holds a run, or what is of no run and would be replaced, or another process is using it,
            or it is no folder, or it cannot be looked at.
        CheckpointError: it is to be gone on with, and there is nothing to go on from.
    """
    with _usable(config.run.dir):
        _check(config)


def _check(config: Config) -> None:
    folder = config.run.dir
    if not _exists(folder):
        return
    if not folder.is_dir():
        raise UsageError(f"run.dir={folder} is a file, not a folder")
    _refuse_strangers(folder, (CONFIG, SUMMARY) if _goes_on(config) else CONTENTS)
    if _exists(folder / LOCK):
        with open(folder / LOCK, "r+", encoding="utf-8", errors="replace") as lock:
            _acquire(lock, folder)
    held = [name for name in CONTENTS if _exists(folder / name)]
    if not held or config.run.overwrite:
        return
    if config.run.resume == "auto":
        _require_checkpoints(folder)
    elif config.run.resume == "never" or not _is_own_checkpoint(config):
        raise UsageError(
            f"run.dir={folder} already holds a run ({', '.join(held)}); give another run.dir, run.resume=auto to go on"
            " with it, or run.overwrite=true to replace it"
        )


def wait_until_free(folder: Path, patience_seconds: float) -> None:
    """Wait while another process is using the folder: it may be on a host that was cut off, and about to end."""
    end = time.monotonic() + patience_seconds
    while time.monotonic() < end and _in_use(folder):
        time.sleep(_POLL_SECONDS)


def claim(config: Config) -> IO[str]:
    """Check the folder, lock it, empty it unless its run is to be gone on with, and write the resolved config.

    Only files of an earlier run are removed, and nothing else. Returns the lock, which is held until it is closed or
    the process ends, however it ends.
    """
    check(config)
    folder = config.run.dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  (held as long as we live)
        _acquire(lock, folder)
        storage.sign(lock)
        for name in (SUMMARY,) if _goes_on(config) else CONTENTS:
            _remove(folder / name)
        write_whole(folder / CONFIG, config.to_yaml())
    except OSError as error:
        raise JobError(f"run.dir={folder}: cannot be written: {error.strerror}") from None
    return lock


def _in_use(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+", encoding="utf-8", errors="replace") as lock:
            storage.lock(lock)
    except storage.InUse:
        return True
    except OSError:  # which check() will tell
        pass
    return False


def _goes_on(config: Config) -> bool:
    return config.run.resume != "never" and _has_checkpoints(config.run.dir)


def _has_checkpoints(folder: Path) -> bool:
    """Raises OSError if one cannot know: what cannot be looked at is not empty."""
    try:
        return any(CHECKPOINT.fullmatch(name) for name in os.listdir(folder / CHECKPOINTS))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_own_checkpoint(config: Config) -> bool:
    """By ``os.path.realpath``, which raises nothing where it may not look."""
    return os.path.dirname(os.path.realpath(config.run.resume)) == os.path.realpath(config.run.dir / CHECKPOINTS)


def _require_checkpoints(folder: Path) -> None:
    """A run that has recorded anything has written a checkpoint before."""
    metrics = folder / METRICS
    if _exists(metrics) and metrics.stat().st_size and not _has_checkpoints(folder):
        raise CheckpointError(
            f"run.dir={folder}: holds a run, but none of its checkpoints, so there is nothing to go on from; put"
            " checkpoints/ back, or give run.overwrite=true to start anew"
        )


def _refuse_strangers(folder: Path, names: tuple[str, ...]) -> None:
    """Refuse to remove or replace what no run has written, whatever the configuration says."""
    strangers = [] if not _exists(folder / LOCK) or _is_lock(folder / LOCK) else [LOCK]
    of_a_run = _is_lock(folder / LOCK, signed=True) or _is_resolved_config(folder / CONFIG)
    files = (CONFIG, DATASET, SUMMARY, METRICS)
    for name in [*names, *(name + _PARTIAL for name in files)]:
        if not of_a_run or name in _WRITTEN:
            strangers += _strange_files(folder, name, of_a_run)
        elif name == CONFIG and not _is_resolved_config(folder / CONFIG) and _holds_something(folder / CONFIG):
            strangers.append(CONFIG)
    if strangers:
        raise UsageError(
            f"run.dir={folder} holds what no run has written, and a run would replace it: {', '.join(strangers[:5])}"
            + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
            + "; nothing was removed; give another run.dir, or move them elsewhere"
        )


def _strange_files(folder: Path, name: str, of_a_run: bool) -> Iterator[str]:
    """The files under ``name`` that a run does not write; all of them in a folder that was never a run's."""
    top = folder / name
    if not os.path.islink(top) and os.path.isdir(top):
        for file in _files(top):
            if not (of_a_run and name in _WRITTEN and _WRITTEN[name].fullmatch(file)):
                yield f"{name}/{file}"
    elif _holds_something(top):
        yield name


def _files(top: Path) -> Iterator[str]:
    """All below ``top`` that is no folder; a link is none, and what it leads to is not looked at."""
    for entry in sorted(os.scandir(top), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{file}" for file in _files(Path(entry.path)))
        else:
            yield entry.name


def _is_lock(file: Path, signed: bool = False) -> bool:
    """Whether it is one of a run; without ``signed`` also one whose holder died before it could sign."""
    return file.is_file() and (storage.is_signed(file) or (not signed and file.stat().st_size == 0))


def _is_resolved_config(file: Path) -> bool:
    """Whether a run has written it: a file by hand has comments, another order or fewer sections."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        return isinstance(values, dict) and {*values} >= _SECTIONS and yaml.safe_dump(values, sort_keys=False) == text
    except (FileNotFoundError, IsADirectoryError, ValueError, yaml.YAMLError):
        return False


def _holds_something(file: Path) -> bool:
    """Whether there is anything to lose: not in an empty file, nor behind a link to an empty folder, which stays."""
    if not _exists(file):
        return False
    if os.path.isdir(file):
        return bool(os.listdir(file))
    return os.path.islink(file) or not file.is_file() or file.stat().st_size > 0


def _exists(path: Path) -> bool:
    """Whether there is anything of that name, be it a link to nothing. Raises OSError if one cannot know."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f", {error.filename}" if error.filename and str(error.filename) != str(folder) else ""
        raise UsageError(
            f"run.dir={folder}{where}: cannot be used: {error.strerror}; give another run.dir, or mend the permissions"
        ) from None


def _acquire(lock: IO[str], folder: Path) -> None:
    """Take the lock. The kernel frees it when its holder dies, so that no dead process ever holds one."""
    try:
        storage.lock(lock)
    except storage.InUse as holder:
        raise UsageError(f"run.dir={folder} is in use by {holder}; give another run.dir, or end that run") from None


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json``, whose presence says that the run is complete."""
    write_whole(folder / SUMMARY, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` for JSON, which has no NaN: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(file: Path, text: str) -> None:
    """Write a file such that a reader finds all of it or none, also after a crash."""
    temporary = file.with_name(file.name + _PARTIAL)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    storage.sync_folder(file.parent)


def _remove(path: Path) -> None:
    """A folder goes with all that is in it: that it is a run's has been seen before."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not path.is_dir():
        path.unlink(missing_ok=True)
