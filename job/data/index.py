"""What is known of a large data set, kept in the cache: found out once, then mapped into memory by every rank.

An index is a folder of arrays. Its name says what it is of and in which state that was, so that one that has become
wrong is not found. The ranks of a node share one copy in the page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job import storage
from job.data import cache
from job.data.cache import Say
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

VERSION = "1"  # of what an index holds; others are not found
ABOUT = "about.json"
SETTLED_SECONDS = 2.0  # what has changed since may change again without looking newer
OLD_SECONDS = 30 * 24 * 3600.0  # then an index goes, when another of the same thing is written


class Index(NamedTuple):
    """Arrays, and facts that fit into JSON."""

    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


class Stamp(NamedTuple):
    """What an index is of, and the state of that."""

    of: str
    state: str
    settled: bool = True

    def part(self, name: str) -> Stamp:
        """For what is known beside the index, of the same state."""
        return Stamp(f"{self.of} {name}", f"{self.state} {name}", self.settled)


def stamp(of: Path, watched: Iterable[Path]) -> Stamp:
    """The state of the files or folders ``watched``: a folder changes when a name in it comes, goes or changes.

    Raises:
        DataError: one of them cannot be looked at.
    """
    state, newest = [VERSION], 0.0
    for path in watched:
        try:
            found = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        size = 0 if os.path.isdir(path) else found.st_size
        state.append(f"{os.fsencode(path)!r} {found.st_ino} {size} {found.st_mtime_ns} {found.st_ctime_ns}")
        newest = max(newest, found.st_mtime, found.st_ctime)
    return Stamp(str(of.resolve()), "\n".join(state), time.time() - newest > SETTLED_SECONDS)


def kept(config: DataConfig, stamp: Stamp, make: Callable[[], Index], say: Say) -> Index:
    """The index from the cache; if it is not there, what ``make`` makes, which is kept there.

    Where nothing can be kept, each process makes it at each start.

    Raises:
        DataError: the cache is held too long by another process.
    """
    folder = config.cache_dir / "index" / f"{_hash(stamp.of)}-{_hash(stamp.state)}"
    if found := _read(folder):
        return found
    if not stamp.settled:
        return make()
    try:
        with cache.locked(config, say) as scratch:
            return _read(folder) or _written(make(), folder, scratch)
    except cache.Unwritable as error:
        say(f"data: nothing that is found out now is kept for the next start: {error}")
        return make()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _read(folder: Path) -> Index | None:
    """None if it is not there, or damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about["arrays"]}
        return Index(arrays, about["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _written(index: Index, folder: Path, scratch: Path) -> Index:
    whole = scratch / folder.name
    whole.mkdir()
    for name, array in index.arrays.items():
        with open(whole / f"{name}.npy", "wb") as stream:
            np.save(stream, array)
            stream.flush()
            os.fsync(stream.fileno())
    about = {"arrays": [*index.arrays], "facts": index.facts}
    (whole / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    folder.parent.mkdir(exist_ok=True)
    for other in folder.parent.glob(f"{folder.name.partition('-')[0]}-*"):
        with contextlib.suppress(FileNotFoundError):
            if other == folder or time.time() - other.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(other)
    whole.rename(folder)
    storage.sync_folder(folder.parent)
    return _read(folder) or index
