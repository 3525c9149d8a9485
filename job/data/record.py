"""RecordIO files as MXNet's ``im2rec`` writes them: ``train.rec`` with ``train.idx``, ``test.rec`` with ``test.idx``.

They are read by MXNet's own reader. The samples have the order of the ``.idx`` files.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mxnet import recordio
from mxnet.base import _LIB, MXNetError, check_call

from job.data.cache import Say
from job.data.dataset import named
from job.data.index import Index, kept, stamp
from job.data.pictures import Collection, Damaged, progress
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

PARTS = ("train", "test")
LARGEST_LABEL = 1 << 24  # a record has its label as float32, which holds no larger whole numbers one by one


class _Reader(recordio.MXRecordIO):
    """MXNet's reader, which seeks; its own subclass that does holds all keys in a dictionary, in each process."""

    def at(self, position: int) -> bytes | None:
        check_call(_LIB.MXRecordIOReaderSeek(self.handle, ctypes.c_size_t(position)))
        record: bytes | None = self.read()
        return record


class Records:
    """The pictures of a part; see :class:`job.data.pictures.Encoded`.

    Args:
        file: the ``.rec``.
        keys: int64 (n,).
        positions: where each record begins, int64 (n,).
        labels: int32 (n,).
    """

    def __init__(self, file: Path, keys: np.ndarray, positions: np.ndarray, labels: np.ndarray) -> None:
        self._file, self._keys, self._positions = file, keys, positions
        self.labels = labels
        self._own = threading.local()  # a reader has a place in the file, so each thread needs its own

    def read(self, index: int) -> bytes:
        """The picture in a record, as the file or its encoding was.

        Raises:
            Damaged: there is no whole record in its place.
        """
        return self.unpacked(index)[1]

    def unpacked(self, index: int) -> tuple[recordio.IRHeader, bytes]:
        """The header of a record, and the picture in it."""
        if not hasattr(self._own, "reader"):
            self._own.reader = _Reader(str(self._file), "r")
        try:
            record = self._own.reader.at(int(self._positions[index]))
            if record is None:
                raise ValueError("the file ends before it")
            header, content = recordio.unpack(record)
        except Exception as error:  # MXNetError of the reader, struct.error or ValueError of what it found
            lines = str(error).splitlines() or [type(error).__name__]
            why = lines[-1].rpartition("Check failed: ")[2] if isinstance(error, MXNetError) else lines[0]
            raise Damaged(f"{self.name(index)}: damaged: {why}; write the file anew with im2rec") from None
        return header, content

    def name(self, index: int) -> str:
        """What a message calls it."""
        return f"{self._file}, record {self._keys[index]}"


def find(config: DataConfig, say: Say) -> Collection:
    """The records of ``data.dir``. The first time all are read, for their labels and for what they are.

    Raises:
        DataError: a file is missing or damaged, or a label is not one of a class.
    """
    top = config.dir
    assert top  # as config.py demands
    files = [top / f"{part}.{ending}" for part in PARTS for ending in ("rec", "idx")]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: no such file; data.format=record needs train.rec, train.idx, test.rec and test.idx"
            )
    state = stamp(top, files)
    skip = config.on_damaged == "skip"
    index = kept(config, state.part("skip") if skip else state, lambda: _read(top, skip), say)
    train, test = (
        Records(top / f"{part}.rec", *(index.arrays[f"{part}_{name}"] for name in ("keys", "positions", "labels")))
        for part in PARTS
    )
    classes, damaged = named(top, train.labels, test.labels), tuple(index.facts["damaged"])
    return Collection(train, test, classes, index.facts["digests"], state, damaged)


def _read(top: Path, skip: bool) -> Index:
    """All records once, for their labels and digests; with ``skip`` without those that are not whole."""
    arrays: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    damaged: list[str] = []
    for part in PARTS:
        keys, positions = _index(top / f"{part}.idx")
        records = Records(top / f"{part}.rec", keys, positions, np.zeros(len(keys), np.int32))
        images, whole = hashlib.sha256(), np.ones(len(keys), bool)
        for place in progress(range(len(keys)), f"reading {part}.rec"):
            try:
                header, content = records.unpacked(place)
            except Damaged:
                if not skip:
                    raise
                whole[place] = False
                damaged.append(records.name(place))
                continue
            records.labels[place] = _label(header.label, records.name(place))
            images.update(f"{len(content)} ".encode() + content)
        labels = records.labels[whole]
        if not len(labels):
            raise DataError(f"{top / part}.rec: holds no record that is whole")
        arrays.update({f"{part}_keys": keys[whole], f"{part}_positions": positions[whole], f"{part}_labels": labels})
        digests[f"{part}_images"] = images.hexdigest()
        digests[f"{part}_labels"] = hashlib.sha256(labels.tobytes()).hexdigest()
    return Index(arrays, {"digests": digests, "damaged": damaged})


def _index(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and positions, int64 (n,), of the lines ``KEY<tab>POSITION``."""
    try:
        numbers = np.array(file.read_bytes().split(), np.int64)
        keys, positions = numbers.reshape(-1, 2).T
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: no index of records, a key and a position in each line: {error}") from None
    if not len(keys):
        raise DataError(f"{file}: holds no record")
    if positions.min() < 0:
        raise DataError(f"{file}: the position {positions.min()} is before the file's beginning")
    return keys, positions


def _label(label: Any, name: str) -> int:
    values = np.atleast_1d(label)
    if len(values) != 1:
        raise DataError(f"{name}: has {len(values)} labels, and one is needed, the number of its class")
    value = float(values[0])
    if not (0 <= value < LARGEST_LABEL and value.is_integer()):
        raise DataError(f"{name}: its label is {value:g}, and the number of a class is needed, counted from 0")
    return int(value)
