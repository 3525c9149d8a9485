"""Commits: checkpoints in memory, for ranks that a supervisor starts again when some of them have died.

A commit is a checkpoint as those on disk are, with the same list of state and the same checksums. It lies in a folder
of ``/dev/shm``, so that it outlives the process that has written it, and costs no disk. Whoever supervises the ranks
(launch/elastic) makes the folder, names it in the environment, and removes it at the end of the job.

    step-00000235/      the newest commit; see job/checkpoints/store.py
    progress            after which step these ranks went on, and how many the run has taken: for the supervisor
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from job import storage
from job.checkpoints.store import BackgroundWriter, Checkpoint, Damaged, Store, read
from job.errors import CheckpointError
from job.run_dir import CHECKPOINTS, LOCK, wait_until_free

if TYPE_CHECKING:
    import numpy as np

FOLDER = "JOB_COMMITS"  # the variable that names the folder; without it nobody would start the ranks again
TAKEOVER_SECONDS = 100.0  # for a rank 0 on a host that was cut off to end: its agent asks it to, then kills it
_PROGRESS = "progress"


class Progress(NamedTuple):
    """How many steps the run had taken when its ranks went on with it, and has taken now."""

    went_on: int
    steps: int


class Commits:
    """The commits of one job on this host.

    Args:
        folder: of a supervisor.
        every_steps: from one commit to the next.
        writes: whether this rank is the one of its host that does.
    """

    def __init__(self, folder: Path, every_steps: int, writes: bool) -> None:
        self._store = Store(folder, keep=1)
        if writes:
            self._store.tidy(sys.maxsize)  # of what those before have left unfinished
        self._every_steps = every_steps
        self._writer = BackgroundWriter(self._store) if writes else None
        self._progress = os.open(folder / _PROGRESS, os.O_WRONLY | os.O_CREAT, 0o600) if writes else -1
        self._went_on = -1
        self._told = False

    def newest(self, warn: Callable[[str], None]) -> Optional[Checkpoint]:
        """The newest intact commit, None if there is none: then the checkpoints on the disk still are."""
        try:
            found = self._store.newest(warn)
        except CheckpointError as error:
            warn(str(error))
            found = None
        self._store.tidy(found.step if found else -1)
        return found

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is to be committed."""
        return step % self._every_steps == 0

    def write(self, step: int, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Begin to write a commit. A failure is told once, and ends nothing: the checkpoints on the disk are there."""
        if self._writer is None:
            return
        if self._writer.failure and not self._told:
            self._told = True
            print(f"warning: {self._writer.failure}; steps since then are repeated", file=sys.stderr, flush=True)
        self._writer.write(step, arrays, state)

    def tell(self, step: int) -> None:
        """Let the supervisor know how many steps the run has taken."""
        if self._writer:
            self._went_on = step if self._went_on < 0 else self._went_on
            os.pwrite(self._progress, b"%12d %12d" % (self._went_on, step), 0)

    def close(self) -> None:
        """Finish what is being written."""
        if self._writer:
            self._writer.close()
            os.close(self._progress)


def progress(folder: Path) -> Optional[Progress]:
    """Where the run is, None before its ranks have told so."""
    try:
        went_on, steps = (folder / _PROGRESS).read_text().split()
        return Progress(int(went_on), int(steps))
    except (OSError, ValueError):
        return None


def forget_progress(folder: Path) -> None:
    """Have :func:`progress` give None until ranks that are to be started tell where they are."""
    (folder / _PROGRESS).unlink(missing_ok=True)


def bring_to_disk(folder: Path, run_dir: Path) -> None:
    """Make a checkpoint of the newest commit, if it is newer than those on the disk. For when no rank runs any more.

    Raises:
        CheckpointError: it cannot be written.
    """
    on_disk, in_memory = Store(run_dir / CHECKPOINTS, 1).paths()[:1], Store(folder, 1).paths()[:1]
    if not in_memory or [path.name for path in on_disk] >= [path.name for path in in_memory]:
        return
    try:
        read(in_memory[0])
        Store(run_dir / CHECKPOINTS, 1).adopt(in_memory[0])
    except Damaged:
        return  # which is told when a run goes on: from the one on the disk
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: cannot write the last commit: {error.strerror}; the checkpoint before it is kept"
        ) from None


def rescue(folder: Path, run_dir: Path, patience_seconds: float = 10.0) -> None:
    """What :func:`bring_to_disk` does, where other hosts may do so too: one after the other, and none beside a run.

    Raises:
        CheckpointError: it cannot be written, or ``run_dir`` is in use for longer than ``patience_seconds``.
    """
    wait_until_free(run_dir, patience_seconds)
    try:
        with open(run_dir / LOCK, "a+", encoding="utf-8", errors="replace") as lock:
            storage.lock(lock)
            bring_to_disk(folder, run_dir)
    except (OSError, storage.InUse) as error:
        raise CheckpointError(f"{run_dir}: the last commit was not saved: {error}") from None


def supervised() -> bool:
    """Whether ranks are started again when some have died."""
    return FOLDER in os.environ


def open_commits(every_steps: int, writes: bool) -> Optional[Commits]:
    """The commits of this job, None where nobody supervises it."""
    folder = os.environ.get(FOLDER)
    return Commits(Path(folder), every_steps, writes) if folder else None
