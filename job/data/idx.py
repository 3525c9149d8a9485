"""Fashion-MNIST, or other data of its shape: found, verified, and mapped into memory.

The cache holds the decompressed IDX files under names that contain their SHA-256, so that they are checked on every
start, and mapped where they lie: the ranks of a node share one copy in the page cache.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from job import storage
from job.data import download
from job.data.dataset import FASHION_MNIST, Dataset, Split
from job.data.download import AptPackage, FileUnavailable, Folder, Mirror, Say, Source, SourceUnavailable
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

MAX_ITEMS = 1_000_000  # a header that promises more is damaged, or a bomb
POLL_SECONDS = 0.05
SCRATCH = ".horovod-gluon-job-"  # begins the name of a folder to work in, which nothing else may bear

Mapped = np.memmap[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class IdxFile:
    """A file of magic number, count and item shape in big-endian 32-bit words, then the items' bytes."""

    key: str  # in data.sha256
    name: str
    item_shape: tuple[int, ...]
    max_value: int

    @property
    def header_bytes(self) -> int:
        """Length of the header; the rest is what is mapped."""
        return 8 + 4 * len(self.item_shape)

    def body_bytes(self, header: bytes, path: Path) -> int:
        """How much must follow ``header``; DataError if it is not the header of this file."""
        if len(header) < self.header_bytes:
            raise DataError(f"{path}: truncated: {len(header)} bytes, its header alone has {self.header_bytes}")
        magic, count, *shape = struct.unpack(f">{self.header_bytes // 4}I", header)
        expected_magic = 0x801 + len(self.item_shape)
        if magic != expected_magic:
            raise DataError(f"{path}: wrong magic number {magic}, expected {expected_magic}: not {self.name}")
        if tuple(shape) != self.item_shape:
            raise DataError(f"{path}: items of shape {tuple(shape)}, expected {self.item_shape}")
        if not 1 <= count <= MAX_ITEMS:
            raise DataError(f"{path}: its header counts {count} items, expected 1 to {MAX_ITEMS}")
        return int(count) * math.prod(self.item_shape)


FILES = (
    IdxFile("train_images", "train-images-idx3-ubyte", (28, 28), 255),
    IdxFile("train_labels", "train-labels-idx1-ubyte", (), 9),
    IdxFile("test_images", "t10k-images-idx3-ubyte", (28, 28), 255),
    IdxFile("test_labels", "t10k-labels-idx1-ubyte", (), 9),
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
    if len(paths) < len(FILES):
        with _locked_cache(config, say) as scratch:
            paths = _ready(config, digests, say)  # another process may have fetched meanwhile
            missing = {file: digest for file, digest in digests.items() if file not in paths}
            paths.update(_fetch(config, missing, scratch, say))
    train_images, train_labels, test_images, test_labels = (_mapped(paths[file], file) for file in FILES)
    return Dataset(_paired(train_images, train_labels), _paired(test_images, test_labels), FASHION_MNIST)


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


def digests(config: DataConfig, dataset: Dataset) -> dict[str, str]:
    """What the data is: the SHA-256 of each file, by its key in ``data.sha256``; worked out for ``any``."""
    arrays = zip(FILES, (*dataset.train, *dataset.test))  # mapped by load()
    wanted = {file.key: getattr(config.sha256, file.key) for file in FILES}
    known = {file.key: _sha256_of(array) for file, array in arrays if wanted[file.key] == "any"}
    return {**wanted, **known}


def _sha256_of(array: Mapped) -> str:
    with open(str(array.filename), "rb") as stream:
        state = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _paired(images: Mapped, labels: Mapped) -> Split:
    if len(images) != len(labels):
        raise DataError(f"{images.filename}: {len(images)} images, but {labels.filename}: {len(labels)} labels")
    return Split(images, labels)


def _mapped(path: Path, file: IdxFile) -> Mapped:
    count = (path.stat().st_size - file.header_bytes) // math.prod(file.item_shape)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=file.header_bytes, shape=(count, *file.item_shape))


def _expected_digests(config: DataConfig) -> dict[IdxFile, str]:
    if config.dir:
        try:
            os.stat(f"{config.dir}/.")
        except OSError as error:
            raise DataError(f"data.dir={config.dir}: not a folder that can be used: {error.strerror}") from error
    return {file: _expected_sha256(config, file) for file in FILES}


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
            f" other data on purpose, set data.dir, and data.sha256.{file.key} to its digest or to any"
        )
    return digest


def _decoded(path: Path, file: IdxFile) -> Iterator[bytes]:
    """The decompressed bytes, no more than the header promises; DataError at the first fault."""
    try:
        with _open(path) as stream:
            header = stream.read(file.header_bytes)
            body = left = file.body_bytes(header, path)
            yield header
            while left and (chunk := stream.read(min(left, 1 << 20))):
                if file.max_value < 255 and max(chunk) > file.max_value:
                    raise DataError(f"{path}: label {max(chunk)} is out of range, expected 0 to {file.max_value}")
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


@contextlib.contextmanager
def _locked_cache(config: DataConfig, say: Say) -> Iterator[Path]:
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
        raise DataError(
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
            say(f"data: waiting for {holder}, which is fetching it")
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
