"""Folders of pictures: ``train/CLASS/*.png`` and ``test/CLASS/*.png``, decoded when a batch asks for them.

Classes and files have one order, that of their names, so that a label and an index mean the same on every machine. A
picture is decoded by Pillow alone, whoever asks for it, so that its pixels depend neither on ranks nor on threads.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from job.data.dataset import Dataset, Description, Split
from job.distributed.placement import cores, placement
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PARTS = ("train", "test")


class Pictures:
    """The pictures of a part, as an array of uint8 (n, channels, height, width) would give them.

    Args:
        folder: of the part.
        files: their paths in it, as bytes (n,).
        shape: of a picture: channels, height, width.
        resize: whether others are brought to that size; else they are an error.
    """

    def __init__(self, folder: Path, files: np.ndarray, shape: tuple[int, int, int], resize: bool) -> None:
        self._folder, self._files, self._shape, self._resize = folder, files, shape, resize

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, samples: Any) -> np.ndarray:
        """Decode the pictures with the given indices, or in a slice of them, on all cores of this rank.

        Raises:
            DataError: one is damaged, or of another size.
        """
        files = self._files[samples]
        pixels = np.empty((len(files), *self._shape), np.uint8)

        def fill(place: int) -> None:
            pixels[place] = self._decoded(self._folder / os.fsdecode(files[place]))

        list(_pool().map(fill, range(len(files))))
        return pixels

    def _decoded(self, file: Path) -> np.ndarray:
        channels, height, width = self._shape
        picture = _opened(file, "L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            if not self._resize:
                raise DataError(
                    f"{file}: {picture.width}x{picture.height} pixels, and the first picture has {width}x{height}; set"
                    " data.image_size=SIDE, to which all are then brought"
                )
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)


def load(config: DataConfig) -> Dataset:
    """List the pictures of ``data.dir``. Nothing but the first one is decoded.

    Raises:
        DataError: a folder is missing or empty, or the first picture is damaged.
    """
    assert config.dir  # as config.py demands
    if not config.dir.is_dir():
        raise DataError(f"data.dir={config.dir}: no such folder")
    classes = _folders(config.dir / "train")
    if len(classes) < 2:
        raise DataError(f"{config.dir / 'train'}: holds {len(classes)} folders, and a folder for each class is needed")
    if unknown := sorted({*_folders(config.dir / "test")} - {*classes}):
        raise DataError(f"{config.dir / 'test' / unknown[0]}: a class that train/ does not have")
    parts = [_listed(config.dir / part, classes) for part in PARTS]
    shape = _shape(config.dir / "train" / os.fsdecode(parts[0][0][0]), config.image_size)
    train, test = (
        Split(Pictures(config.dir / part, files, shape, config.image_size is not None), labels)
        for part, (files, labels) in zip(PARTS, parts)
    )
    return Dataset(train, test, Description(tuple(classes), shape))


def digests(config: DataConfig) -> dict[str, str]:
    """What the data is, as far as names and sizes of files say it, by the keys of ``data.sha256``."""
    assert config.dir
    found = {}
    for part in PARTS:
        state, labels = hashlib.sha256(), hashlib.sha256()
        files, numbers = _listed(config.dir / part, _folders(config.dir / "train"))
        for file in files:
            path = os.fsdecode(file)
            state.update(f"{os.stat(config.dir / part / path).st_size} ".encode() + file + b"\n")
        labels.update(numbers.tobytes())
        found.update({f"{part}_images": state.hexdigest(), f"{part}_labels": labels.hexdigest()})
    return found


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


def _listed(folder: Path, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The paths of all pictures in ``folder``, as bytes (n,), and their labels (n,)."""
    files: list[np.ndarray] = []
    labels: list[int] = []
    for name in classes:
        if not (folder / name).is_dir():
            continue
        found = sorted(
            os.fsencode(f"{name}/{entry.name}")
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(ENDINGS) and entry.name[0] != "."
        )
        if not found and folder.name == "train":
            raise DataError(f"{folder / name}: holds no picture ({', '.join(ENDINGS)})")
        files.append(np.array(found, "S"))  # not as a list: a rank may have a million of them
        labels.append(len(found))
    if not sum(labels):
        raise DataError(f"{folder}: holds no picture ({', '.join(ENDINGS)})")
    present = [label for label, name in enumerate(classes) if (folder / name).is_dir()]
    return np.concatenate(files), np.repeat(np.array(present, np.int64), labels)


def _shape(first: Path, side: int | None) -> tuple[int, int, int]:
    with_mode = _opened(first, None)
    channels = 1 if with_mode.mode in ("1", "L", "I", "I;16", "F") else 3
    return (channels, side or with_mode.height, side or with_mode.width)


def _opened(file: Path, mode: str | None) -> Image.Image:
    """The picture, decoded whole, in ``mode``."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture.convert(mode) if mode else picture.copy()
    except Exception as error:  # of Pillow's many kinds
        raise DataError(f"{file}: damaged, or not a picture: {error}; repair or remove it") from None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, cores() // placement().local_size), thread_name_prefix="decode")
