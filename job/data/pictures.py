"""Pictures that are decoded when a batch needs them, wherever their bytes are kept.

A picture is decoded by Pillow alone, whoever asks for it, so that its pixels depend neither on ranks nor on threads.
"""

from __future__ import annotations

import functools
import io
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from job.data.index import Stamp
from job.data.sampler import Shard
from job.distributed.placement import cores, placement
from job.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
AHEAD = 2  # steps, whose pictures are decoded while another one is computed
PIECE = 8  # pictures that a thread decodes without a pause
GREY = ("1", "L", "LA")
WIDE = ("I", "F")  # begin the names of Pillow's modes with more than 8 bits a channel

Item = TypeVar("Item")
Numbered = TypeVar("Numbered", bound="tuple[int, Sequence[Sequence[Shard]]]")


class Damaged(DataError):
    """A picture cannot be decoded. The message names it."""


class Encoded(Protocol):
    """The pictures of a part of a data set, as they are kept."""

    labels: np.ndarray  # (n,)

    def read(self, index: int) -> bytes:
        """The bytes of a picture; DataError if they cannot be had, Damaged if they are not whole."""

    def name(self, index: int) -> str:
        """What a message calls it."""


class Collection(NamedTuple):
    """A data set of encoded pictures."""

    train: Encoded
    test: Encoded
    classes: tuple[str, ...]
    digests: Mapping[str, str]  # what it is, by the keys of data.sha256
    state: Stamp  # by which more may be kept of it
    damaged: tuple[str, ...] = ()  # what has been left out of it already


class Scan(NamedTuple):
    """What decoding all pictures has shown."""

    damaged: np.ndarray  # their indices, int64
    histogram: np.ndarray  # of the others: how often a channel has a value, int64 (channels, 256)


class _Batch(NamedTuple):
    """Pictures that are being decoded."""

    samples: np.ndarray
    pixels: np.ndarray
    pieces: list[Future[None]]

    def wait(self) -> np.ndarray:
        for piece in self.pieces:  # in order, so that of several errors the first one is told
            piece.result()
        return self.pixels


class Pictures:
    """Encoded pictures, as an array of uint8 (n, channels, height, width) would give them.

    Args:
        encoded: the pictures.
        shape: of a picture: channels, height, width.
        resize: whether others are brought to that size; else they are an error.
        threads: how many decode.
        chosen: the indices of those that are used, in order; by default all.
    """

    def __init__(
        self,
        encoded: Encoded,
        shape: tuple[int, int, int],
        resize: bool,
        threads: int | None = None,
        chosen: np.ndarray | None = None,
    ) -> None:
        self._encoded, self._shape, self._resize, self._chosen = encoded, shape, resize, chosen
        self._threads = threads
        self._expected: deque[_Batch] = deque()

    def __len__(self) -> int:
        return len(self._encoded.labels if self._chosen is None else self._chosen)

    def __getitem__(self, samples: Any) -> np.ndarray:
        """The pictures with the given indices (n,), or in a slice of them; those that are expected next are ready.

        Raises:
            DataError: one is damaged, or of another size.
        """
        wanted = np.arange(len(self))[samples]
        if self._expected and np.array_equal(self._expected[0].samples, wanted):
            return self._expected.popleft().wait()
        return self._begun(wanted).wait()

    def expect(self, samples: np.ndarray) -> None:
        """Begin to decode what will be asked for, in the order of these calls."""
        self._expected.append(self._begun(samples))

    def forget(self) -> None:
        """Drop what is expected."""
        for batch in self._expected:
            for piece in batch.pieces:
                piece.cancel()
        self._expected.clear()

    def scan(self, title: str, skip: bool) -> Scan:
        """Decode all; with ``skip`` a damaged one is no error. Whole numbers have the same sum in any order."""
        histogram = np.zeros((self._shape[0], 256), np.int64)
        damaged: list[int] = []
        for pixels, sample in progress(self._all(skip), title, len(self)):
            if pixels is None:
                damaged.append(sample)
            else:
                histogram += [np.bincount(channel.ravel(), minlength=256) for channel in pixels]
        return Scan(np.array(damaged, np.int64), histogram)

    def _all(self, skip: bool) -> Iterator[tuple[np.ndarray | None, int]]:
        def decoded(sample: int) -> tuple[np.ndarray | None, int]:
            try:
                return self._decoded(sample), sample
            except Damaged:
                if not skip:
                    raise
                return None, sample

        for first in range(0, len(self), 1024):  # not all at once: each waits in memory to be looked at
            yield from _pool(self._threads).map(decoded, range(first, min(first + 1024, len(self))))

    def _begun(self, samples: np.ndarray) -> _Batch:
        pixels = np.empty((len(samples), *self._shape), np.uint8)

        def fill(first: int) -> None:
            for place in range(first, min(first + PIECE, len(samples))):
                pixels[place] = self._decoded(int(samples[place]))

        submit = _pool(self._threads).submit
        return _Batch(samples, pixels, [submit(fill, first) for first in range(0, len(samples), PIECE)])

    def _decoded(self, sample: int) -> np.ndarray:
        index = sample if self._chosen is None else int(self._chosen[sample])
        channels, height, width = self._shape
        name = self._encoded.name(index)
        picture = opened(self._encoded.read(index), name, "L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            if not self._resize:
                raise DataError(
                    f"{name}: {picture.width}x{picture.height} pixels, and the first picture has {width}x{height}; set"
                    " data.image_size=SIDE, to which all are then brought"
                )
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)


def opened(content: bytes, name: str, mode: str | None = None) -> Image.Image:
    """The picture, decoded whole, in ``mode``.

    Raises:
        Damaged: it cannot be decoded.
        DataError: it has more than 8 bits a channel, which would be cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            found = picture.convert(mode) if mode and not picture.mode.startswith(WIDE) else picture.copy()
    except Exception as error:  # of Pillow's many kinds
        why = "no format that Pillow reads" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Damaged(
            f"{name}: damaged, or not a picture: {why}; repair or remove it, or leave out what is damaged with"
            " data.on_damaged=skip"
        ) from None
    if found.mode.startswith(WIDE):
        raise DataError(f"{name}: has more than 8 bits a channel ({found.mode}); convert all pictures to 8 bits")
    return found


def shape_of(encoded: Encoded, side: int | None, skip: bool) -> tuple[int, int, int]:
    """Channels, height and width of the first picture, with ``skip`` of the first that can be decoded.

    Raises:
        DataError: it is damaged, or all are.
    """
    for index in range(len(encoded.labels)):
        try:
            picture = opened(encoded.read(index), encoded.name(index))
        except Damaged:
            if skip and index + 1 < len(encoded.labels):
                continue
            raise
        return (1 if picture.mode in GREY else 3, side or picture.height, side or picture.width)
    raise DataError("no pictures")


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal."""
    console = Console(stderr=True)
    return iter(track(items, title, total, console=console, transient=True, disable=not sys.stderr.isatty()))


def decoded_ahead(images: Any, batches: Iterable[Numbered]) -> Iterator[Numbered]:
    """The steps of ``batches`` as they are, while the pictures of the next ones are decoded.

    Images that are no :class:`Pictures` have nothing to decode, and the steps are handed through.
    """
    if not isinstance(images, Pictures):
        yield from batches
        return
    waiting: deque[Numbered] = deque()
    try:
        for step in batches:
            for shards in step[1]:
                images.expect(np.concatenate([shard.samples for shard in shards]))
            waiting.append(step)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        images.forget()


@functools.cache
def _pool(threads: int | None) -> ThreadPoolExecutor:
    own = threads or max(1, cores() // placement().local_size)
    return ThreadPoolExecutor(own, thread_name_prefix="decode")
