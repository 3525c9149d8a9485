"""The cache, ``data.cache_dir``: held by one process at a time, and filled with nothing that is half written."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Callable

from job import storage
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

POLL_SECONDS = 0.05
SCRATCH = ".horovod-gluon-job-"  # begins the name of a folder to work in, which nothing else may bear

Say = Callable[[str], None]


class Unwritable(DataError):
    """Nothing can be stored in the cache."""


@contextlib.contextmanager
def locked(config: DataConfig, say: Say) -> Iterator[Path]:
    """Hold the cache alone, with an empty folder to work in. The kernel frees the lock when its holder dies."""
    scratch = None
    try:
        config.cache_dir.mkdir(parents=True, exist_ok=True)
        with (config.cache_dir / "lock").open("a+", errors="replace") as lock:
            if _acquire(lock, config.lock_timeout_seconds, say):
                for left in config.cache_dir.glob(f"{SCRATCH}*"):  # by a holder that was killed
                    shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=config.cache_dir))  # alone in it, locks or not
            yield scratch
    except OSError as error:
        raise Unwritable(
            f"{config.cache_dir}: cannot store the data set there: {error}; set data.cache_dir to a writable folder, or"
            " data.dir to one that holds the four files decompressed, which needs no cache"
        ) from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _acquire(lock: IO[str], timeout_seconds: float, say: Say) -> bool:
    """Wait for the lock; whether it is held, and not just passed by because the file system has no locks."""
    _refuse_stranger(Path(lock.name))
    deadline, told = time.monotonic() + timeout_seconds, False
    while True:
        try:
            held = storage.lock(lock)
            break
        except storage.InUse as error:
            holder = str(error)
        if not told:
            say(f"data: waiting for {holder}, which is preparing it")
            told = True
        if time.monotonic() > deadline:
            advice = "end it, or raise data.lock_timeout_seconds"
            raise DataError(f"{lock.name}: {holder} still holds it after {timeout_seconds:g} s; {advice}")
        time.sleep(POLL_SECONDS)
    storage.sign(lock)
    return held


def _refuse_stranger(lock: Path) -> None:
    """The holder signs the lock, and must not write over a file of somebody else's."""
    if lock.stat().st_size and not storage.is_signed(lock):
        raise DataError(f"{lock}: is not the lock of this program; set data.cache_dir to a folder of its own")
