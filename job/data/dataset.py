"""What a data set is, whatever files it is kept in: its images and labels, and what a network has to know of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from job.errors import DataError

CLASSES = "classes.txt"  # names the classes of IDX files and records, one a line, in the order of the labels


@dataclass(frozen=True)
class Description:
    """The one place for what a network, a picture or an export needs to know of a data set.

    A network is fed with ``(pixels / 255 - mean) / std``, each channel with its own.
    """

    classes: tuple[str, ...]  # their names, in the order of the labels
    shape: tuple[int, int, int]  # of an image: channels, height, width
    mean: tuple[float, ...] = (0.0,)  # of each channel, or of all channels
    std: tuple[float, ...] = (1.0,)
    ground: Optional[str] = None  # "dark" where each picture shows a light thing on a dark ground; None: unknown
    left_out: tuple[str, ...] = ()  # the damaged pictures that data.on_damaged=skip has found

    @property
    def scales_only(self) -> bool:
        """Whether pixels are brought to [0, 1], and nothing else."""
        return not any(self.mean) and all(value == 1 for value in self.std)

    def to_json(self) -> str:
        """Text that :meth:`from_mapping` reads back, once it is parsed."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> Description:
        """What ``dataset.json`` in a run's folder holds."""
        classes, shape, mean, std = (tuple(values[name]) for name in ("classes", "shape", "mean", "std"))
        return Description(classes, shape, mean, std, values.get("ground"), tuple(values.get("left_out", ())))


class Split(NamedTuple):
    """One part of a data set, read-only."""

    images: Any  # uint8 (n, height, width) or (n, channels, height, width), for indices (n,) or a slice
    labels: np.ndarray  # (n,) whole numbers, from 0


class Part:
    """Some of the images of a split, in an order of their own.

    Args:
        images: of the split.
        samples: their indices (n,) there.
    """

    def __init__(self, images: Any, samples: np.ndarray) -> None:
        self._images, self._samples = images, samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def nbytes(self) -> Optional[int]:
        """Of their pixels; None where these are not in memory, or in a file that is mapped into it."""
        whole = getattr(self._images, "nbytes", None)
        return None if whole is None else whole // len(self._images) * len(self)

    def __getitem__(self, places: Any) -> Any:
        """The images at these places (n,), or in a slice of them."""
        return self._images[self._samples[places]]


class Dataset(NamedTuple):
    """All of it."""

    train: Split
    test: Split
    about: Description
    digests: Mapping[str, str]  # what the data is, by the keys of data.sha256
    validation: Optional[Split] = None  # samples of train that nobody trains on

    def holding_out(self, samples: np.ndarray) -> Dataset:
        """With these samples (n,) of the training set to validate on. ``train`` still has them, by the same indices."""
        images, labels = Part(self.train.images, samples), np.asarray(self.train.labels)[samples]
        return self._replace(validation=Split(images, labels)) if len(samples) else self

    def measured(self, last: bool) -> list[tuple[str, Split]]:
        """What an evaluation looks at, by name. If there is a validation set, the test set only at the ``last`` one."""
        validation = [("validation", self.validation)] if self.validation else []
        return [*validation, *([("test", self.test)] if last or not validation else [])]


def named(folder: Path | None, train: np.ndarray, test: np.ndarray) -> tuple[str, ...]:
    """Names for the classes of the labels (n,): the lines of ``classes.txt`` in ``folder``, or else their numbers.

    Raises:
        DataError: a label has no name, or the names are not usable, or the test set has a class of its own.
    """
    lowest, highest = min(train.min(), test.min()), int(train.max())
    if lowest < 0:
        raise DataError(f"{folder}: a label is {lowest}, and labels are counted from 0")
    file = folder / CLASSES if folder else None
    names = _lines(file) if file and file.exists() else [str(number) for number in range(highest + 1)]
    if len(names) <= max(highest, 1):
        raise DataError(
            f"{file}: names {len(names)} classes, and the labels go to {highest}"
            if file and file.exists()
            else f"{folder or 'training set'}: all labels are 0, and there is nothing to tell apart"
        )
    if test.max() >= len(names):
        raise DataError(
            f"{folder}: the test set has label {test.max()}, and the highest of the training set is {highest}; name all"
            f" classes in {CLASSES}, one a line, if that is right"
        )
    return tuple(names)


def _lines(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    for number, name in enumerate(names, 1):
        if not name.strip() or not name.isprintable() or name in names[: number - 1]:
            raise DataError(f"{file}: line {number}: {name!r} is no name, or another class has it too")
    return names


FASHION_MNIST = Description(
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    (1, 28, 28),
    ground="dark",
)
