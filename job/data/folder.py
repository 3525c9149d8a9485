"""Folders of pictures: ``train/CLASS/*.png`` and ``test/CLASS/*.png``.

Classes and files have one order, that of their names, so that a label and an index mean the same on every machine. The
names are listed once and kept in the cache: as bytes, not as a list of texts, for there may be a million of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from job.data.cache import Say
from job.data.index import Index, kept, stamp
from job.data.pictures import ENDINGS, Collection
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

PARTS = ("train", "test")
ARRAYS = ("names", "ends", "sizes", "labels")


class Files:
    """The pictures of a part; see :class:`job.data.pictures.Encoded`.

    Args:
        folder: of the part.
        classes: the names of its folders, in the order of the labels.
        arrays: ``names`` of the files, end to end, uint8; ``ends`` of each in it, int64 (n,); ``sizes`` in bytes when
            they were listed, int64 (n,); ``labels``, int32 (n,).
    """

    def __init__(self, folder: Path, classes: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        self._folder, self._classes = folder, classes
        self._names, self._ends, self._sizes = arrays["names"], arrays["ends"], arrays["sizes"]
        self.labels = arrays["labels"]

    def read(self, index: int) -> bytes:
        """The file's bytes, as many as were listed: what the data is follows from names and sizes."""
        file = self.name(index)
        try:
            with open(file, "rb") as stream:
                content = stream.read()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
        if len(content) != self._sizes[index]:
            raise DataError(
                f"{file}: has {len(content)} bytes, and had {self._sizes[index]} when the folder was listed; if it was"
                f" replaced on purpose, `touch {os.path.dirname(file)}` has it listed anew"
            )
        return content

    def name(self, index: int) -> str:
        """Its path."""
        start = int(self._ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._ends[index])].tobytes())
        return str(self._folder / self._classes[int(self.labels[index])] / name)


def find(config: DataConfig, say: Say) -> Collection:
    """The pictures of ``data.dir``. What they are is told by their names and sizes; nothing is read.

    Raises:
        DataError: a folder is missing or empty, or cannot be read.
    """
    assert config.dir  # as config.py demands
    if not config.dir.is_dir():
        raise DataError(f"data.dir={config.dir}: no such folder")
    classes = _folders(config.dir / "train")
    if len(classes) < 2:
        raise DataError(f"{config.dir / 'train'}: holds {len(classes)} folders, and a folder for each class is needed")
    tested = _folders(config.dir / "test")
    if unknown := sorted({*tested} - {*classes}):
        raise DataError(f"{config.dir / 'test' / unknown[0]}: a class that train/ does not have")
    folders = {"train": classes, "test": tested}
    watched = [config.dir / part / name for part in PARTS for name in ("", *folders[part])]
    top, state = config.dir, stamp(config.dir, watched)
    index = kept(config, state, lambda: _listed(top, folders), say)
    train, test = (
        Files(top / part, classes, {name: index.arrays[f"{part}_{name}"] for name in ARRAYS}) for part in PARTS
    )
    return Collection(train, test, tuple(classes), index.facts, state)


def _folders(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}; with data.format=folder pictures are in train/CLASS/ and test/CLASS/"
        ) from None
    for name in names:
        if not name.isprintable():
            raise DataError(f"{folder}: the name of a class has what cannot be printed: {name!r}")
    return names


def _listed(top: Path, folders: Mapping[str, Sequence[str]]) -> Index:
    """The arrays of both parts, and their digests."""
    arrays: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    for part in PARTS:
        found = _part(top / part, folders["train"], {*folders[part]})
        arrays.update({f"{part}_{name}": array for name, array in found.items()})
        images = hashlib.sha256(found["names"].tobytes() + found["ends"].tobytes() + found["sizes"].tobytes())
        digests[f"{part}_images"] = images.hexdigest()
        digests[f"{part}_labels"] = hashlib.sha256(found["labels"].tobytes()).hexdigest()
    return Index(arrays, digests)


def _part(folder: Path, classes: Sequence[str], present: set[str]) -> dict[str, np.ndarray]:
    """The arrays that :class:`Files` takes."""
    names, lengths, sizes, counts = [], [], [], []
    for name in classes:
        found = sorted(_pictures(folder / name)) if name in present else []
        if not found and folder.name == "train":
            raise DataError(f"{folder / name}: holds no picture ({', '.join(ENDINGS)})")
        names.append(b"".join(file for file, _ in found))  # of one class at a time there is a list
        lengths.append(np.array([len(file) for file, _ in found], np.int64))
        sizes.append(np.array([size for _, size in found], np.int64))
        counts.append(len(found))
    if not sum(counts):
        raise DataError(f"{folder}: holds no picture ({', '.join(ENDINGS)})")
    return {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum(np.concatenate(lengths)),
        "sizes": np.concatenate(sizes),
        "labels": np.repeat(np.arange(len(classes), dtype=np.int32), counts),
    }


def _pictures(folder: Path) -> Iterator[tuple[bytes, int]]:
    """The names and sizes of the pictures in a folder, in no order."""
    endings = tuple(ending.encode() for ending in ENDINGS)
    try:
        for entry in os.scandir(os.fsencode(folder)):
            if entry.name.lower().endswith(endings) and entry.name[:1] != b".":
                yield entry.name, entry.stat().st_size
    except OSError as error:
        where = os.fsdecode(error.filename or folder)
        raise DataError(f"{where}: cannot be read: {error.strerror}; repair or remove it") from None
