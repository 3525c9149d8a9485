"""IDX files, Fashion-MNIST's or others: found, verified, and mapped into memory.

The cache holds the decompressed IDX files under names that contain their SHA-256, so that they are checked on every
start, and mapped where they lie: the ranks of a node share one copy in the page cache.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job.data import cache, download
from job.data.dataset import FASHION_MNIST, Dataset, Description, Split, named
from job.data.download import AptPackage, FileUnavailable, Folder, Mirror, Say, Source, SourceUnavailable
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

MAX_ITEMS = 100_000_000  # a header that promises more is damaged, or a bomb
MAX_ITEM_BYTES = 1 << 26
TYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype("u1"),
    11: np.dtype(">i2"),
    12: np.dtype(">i4"),
}  # by the third byte of a file

Mapped = np.memmap[Any, np.dtype[Any]]


class Header(NamedTuple):
    """What the first bytes of a file say: type of the numbers, how many items there are, and the shape of each."""

    dtype: np.dtype[Any]
    items: int
    item_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its own length in bytes; the rest is what is mapped."""
        return 8 + 4 * len(self.item_shape)

    @property
    def body_bytes(self) -> int:
        """How much must follow it."""
        return self.items * math.prod(self.item_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class IdxFile:
    """A file of magic number, count and item shape in big-endian 32-bit words, then the items."""

    key: str  # in data.sha256
    name: str

    @property
    def magics(self) -> tuple[int, ...]:
        """The magic numbers that it may begin with: images are bytes, labels are bytes or wider whole numbers."""
        return (0x803, 0x804) if "images" in self.key else (0x801, 0xB01, 0xC01)

    def header(self, stream: IO[bytes], path: Path) -> tuple[Header, bytes]:
        """Read the header, and its bytes; DataError if it is not that of such a file."""
        start = stream.read(4)
        magic = int.from_bytes(start, "big")
        if len(start) == 4 and magic not in self.magics:
            raise DataError(f"{path}: wrong magic number {magic}, expected {self.magics[0]}: not {self.name}")
        words = 1 if len(start) < 4 else magic & 0xFF
        rest = stream.read(4 * words)
        if len(rest) < 4 * words:
            length = len(start + rest)
            raise DataError(f"{path}: truncated: {length} bytes, its header alone has {max(8, 4 + 4 * words)}")
        count, *shape = struct.unpack(f">{words}I", rest)
        if not 1 <= count <= MAX_ITEMS:
            raise DataError(f"{path}: its header counts {count} items, expected 1 to {MAX_ITEMS}")
        if not 1 <= math.prod(shape) <= MAX_ITEM_BYTES:
            raise DataError(f"{path}: items of shape {tuple(shape)}, expected 1 to {MAX_ITEM_BYTES} bytes")
        if len(shape) == 3 and shape[0] > 4 >= shape[2]:
            raise DataError(
                f"{path}: items of shape {tuple(shape)} have their channels last, and IDX images are read as (count,"
                " channels, height, width); write images.transpose(0, 3, 1, 2)"
            )
        return Header(TYPES[magic >> 8], count, tuple(shape)), start + rest


FILES = (
    IdxFile("train_images", "train-images-idx3-ubyte"),
    IdxFile("train_labels", "train-labels-idx1-ubyte"),
    IdxFile("test_images", "t10k-images-idx3-ubyte"),
    IdxFile("test_labels", "t10k-labels-idx1-ubyte"),
)


def load(config: DataConfig, say: Say = print) -> Dataset:
    """Find, verify and map the data set; fetch what is missing. Silent when nothing is.

    Args:
        config: the section ``data`` of the configuration.
        say: receives each attempt and failure, a line at a time. The one process of a node that fetches has the
            most to say, and it can be any of them: let all ranks speak.

    Raises:
        DataError: a file is damaged, or cannot be had or stored. The message names it and says what to do.
    """
    digests = _expected_digests(config)
    paths = _ready(config, digests)
    if len(paths) < len(digests):
        with cache.locked(config, say) as scratch:
            paths = _ready(config, digests, say)  # another process may have fetched meanwhile
            missing = {file: digest for file, digest in digests.items() if file not in paths}
            paths.update(_fetch(config, missing, scratch, say))
    train_images, train_labels, test_images, test_labels = (_mapped(paths[file], file) for file in digests)
    train, test = _paired(train_images, train_labels), _paired(test_images, test_labels)
    found = {file.key: digest for file, digest in digests.items()}
    return Dataset(train, test, _described(config, train, test, found), found)


def locate(config: DataConfig) -> dict[IdxFile, Path]:
    """The files that are on this machine and intact, and where. Those that :func:`load` would have to fetch are not.

    Raises:
        DataError: data.dir is no folder, or a file in it is damaged.
    """
    digests = _expected_digests(config)
    paths = _ready(config, digests)
    for file, digest in digests.items():
        for folder in filter(None, (config.dir, download.PACKAGE_FOLDER)):
            held = Folder(folder).path_of(file.name)
            if file not in paths and held:
                with contextlib.suppress(DataError):  # a damaged one is as good as none: load() looks elsewhere too
                    _verify(held, file, digest)
                    paths[file] = held
    return paths


def _described(config: DataConfig, train: Split, test: Split, found: dict[str, str]) -> Description:
    """The classes are as many as ``classes.txt`` names, or as the highest label of the training set says."""
    if train.images.shape[1:] != test.images.shape[1:]:
        names = [os.path.basename(str(split.images.filename)) for split in (train, test)]
        raise DataError(
            f"{config.dir}: {names[0]} has items of shape {train.images.shape[1:]}, and {names[1]} of"
            f" {test.images.shape[1:]}"
        )
    shape = (1, *train.images.shape[1:])[-3:]
    if all(found[key] == type(config.sha256)().model_dump()[key] for key in ("train_labels", "test_labels")):
        return replace(FASHION_MNIST, shape=shape)
    return Description(named(config.dir, train.labels, test.labels), shape)


def _paired(images: Mapped, labels: Mapped) -> Split:
    if len(images) != len(labels):
        raise DataError(f"{images.filename}: {len(images)} images, but {labels.filename}: {len(labels)} labels")
    return Split(images, labels)


def _mapped(path: Path, file: IdxFile) -> Mapped:
    with path.open("rb") as stream:
        header, _ = file.header(stream, path)
    shape = (header.items, *header.item_shape)
    return np.memmap(path, dtype=header.dtype, mode="r", offset=header.size, shape=shape)


def _expected_digests(config: DataConfig) -> dict[IdxFile, str]:
    if config.dir:
        try:
            os.stat(f"{config.dir}/.")
        except OSError as error:
            raise DataError(f"data.dir={config.dir}: not a folder that can be used: {error.strerror}") from error
    return {file: _expected_sha256(config, file) for file in _files(config)}


def _files(config: DataConfig) -> tuple[IdxFile, ...]:
    """The four files, by the names that they have in data.dir: four axes or wider labels are told in a name.

    ``train-images-idx4-ubyte`` has four axes, and ``train-labels-idx1-int`` labels above 255.
    """
    files, held = [], []
    with contextlib.suppress(OSError):  # a folder that can be entered and not listed may hold the usual names
        held = os.listdir(config.dir) if config.dir else []
    for file in FILES:
        stem = file.name.rpartition("-idx")[0]
        form = re.compile(rf"({re.escape(stem)}-idx\d-(?:ubyte|short|int))(?:\.gz)?")
        names = sorted({found[1] for name in held if (found := form.fullmatch(name))})
        if len(names) > 1:
            raise DataError(f"{config.dir}: holds both {names[0]} and {names[1]}; keep one of them")
        files.append(IdxFile(file.key, names[0] if names else file.name))
    return tuple(files)


def _expected_sha256(config: DataConfig, file: IdxFile) -> str:
    """The configured digest; for ``any``, that of the file in data.dir.

    What data.dir holds is checked even if the cache could serve: who points at data must not train on other data.
    """
    wanted: str = getattr(config.sha256, file.key)
    held = config.dir and Folder(config.dir).path_of(file.name)
    if held:
        return _verify(held, file, wanted)
    if wanted == "any":
        raise DataError(f"{config.dir}: holds neither {file.name} nor its .gz, which data.sha256.{file.key}=any needs")
    return wanted


def _ready(config: DataConfig, digests: dict[IdxFile, str], say: Say | None = None) -> dict[IdxFile, Path]:
    """The files that can be mapped where they lie: decompressed in data.dir, or whole in the cache."""
    paths = {}
    for file, digest in digests.items():
        in_place, cached = config.dir and config.dir / file.name, _cached_path(config, file, digest)
        if in_place and os.path.isfile(in_place) and not _is_compressed(in_place):
            paths[file] = in_place
        elif os.path.exists(cached):  # not Path.exists, which raises where permission is lacking
            try:
                _verify(cached, file, digest)
                paths[file] = cached
            except DataError as error:
                if say:
                    say(f"data: damaged file in the cache, to be replaced: {error}")
    return paths


def _cached_path(config: DataConfig, file: IdxFile, digest: str) -> Path:
    return config.cache_dir / digest[:16] / file.name


def _verify(path: Path, file: IdxFile, wanted: str, copy_to: IO[bytes] | None = None) -> str:
    """Check all that can be wrong with a file, compressed or not, and copy it decompressed, if asked. Its digest."""
    state = hashlib.sha256()
    for chunk in _decoded(path, file):
        state.update(chunk)
        if copy_to:
            copy_to.write(chunk)
    digest = state.hexdigest()
    if wanted not in (digest, "any"):
        raise DataError(
            f"{path}: wrong checksum: SHA-256 of the decompressed bytes is {digest}, expected {wanted}; if this is"
            f" other data on purpose, set data.dir, and data.sha256=any, or data.sha256.{file.key} to its digest"
        )
    return digest


def _decoded(path: Path, file: IdxFile) -> Iterator[bytes]:
    """The decompressed bytes, no more than the header promises; DataError at the first fault."""
    try:
        with _open(path) as stream:
            header, start = file.header(stream, path)
            body = left = header.body_bytes
            yield start
            while left and (chunk := stream.read(min(left, 1 << 20))):
                left -= len(chunk)
                yield chunk
            if left or stream.read(1):
                found = f"truncated: {body - left}" if left else "more"
                raise DataError(f"{path}: {found} bytes after the header, which promises {body}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated, damaged or unreadable: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if _is_compressed(path) else path.open("rb")  # type: ignore[return-value]


def _is_compressed(path: Path) -> bool:
    """By its content: some servers decompress on the way, and some tools compress without another name."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _sources(config: DataConfig, say: Say) -> list[Source]:
    """Where to look for what is not ready, in this order."""
    timeout = config.download_timeout_seconds
    return [
        *([Folder(config.dir)] if config.dir else []),
        Folder(download.PACKAGE_FOLDER),
        *(Mirror(url, timeout, config.download_attempts, say) for url in config.mirrors),
        AptPackage(timeout),
    ]


def _fetch(config: DataConfig, missing: dict[IdxFile, str], scratch: Path, say: Say) -> dict[IdxFile, Path]:
    """Bring files into the cache, by IDX file; one DataError that names every failure if any cannot be had."""
    paths: dict[IdxFile, Path] = {}
    failures: list[str] = []
    sources = _sources(config, say)
    end = time.monotonic() + config.lock_timeout_seconds  # the other processes wait no longer than that
    for index, source in enumerate(sources):
        now = time.monotonic()
        deadline = now + (end - now) / (len(sources) - index)  # no source uses up the time of those after it
        for file in [file for file in missing if file not in paths]:
            say(f"data: {file.name} from {source}")
            try:
                found = source.find(file.name, scratch, deadline)
                paths[file] = _install(found, file, missing[file], scratch, _cached_path(config, file, missing[file]))
            except (FileUnavailable, SourceUnavailable, DataError) as error:
                failures.append(f"  {source}: {error}")
                say(failures[-1])
                if isinstance(error, SourceUnavailable):
                    break
    if len(paths) < len(missing):
        raise DataError(_how_to_help([file.name for file in missing if file not in paths], failures))
    return paths


def _install(found: Path, file: IdxFile, digest: str, scratch: Path, target: Path) -> Path:
    """Decompress, check, and only then give it its name: the cache never holds a half file."""
    partial = scratch / file.name
    with partial.open("wb") as out:
        _verify(found, file, digest, out)
        out.flush()
        os.fsync(out.fileno())
    target.parent.mkdir(exist_ok=True)
    return partial.replace(target)


def _how_to_help(missing: list[str], failures: list[str]) -> str:
    return "\n".join(
        [
            f"cannot get the data set; missing: {', '.join(missing)}. Tried:",
            *failures,
            "Put these four files, with or without .gz, into one folder, and name it with data.dir=FOLDER:",
            *(f"  {file.name}.gz" for file in FILES),
            f"They are in the package {download.PACKAGE} of Debian and Ubuntu, and linked from"
            " https://github.com/zalandoresearch/fashion-mnist#get-the-data",
        ]
    )
