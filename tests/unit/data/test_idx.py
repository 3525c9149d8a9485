"""Loading, with IDX files written here by hand: found in order, verified, cached whole or not at all, shared."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config import DataConfig
from job.data import cache, download, idx
from job.data.__main__ import main
from job.data.dataset import Dataset
from job.errors import DataError, UsageError

KEYS = {
    "train-images-idx3-ubyte": "train_images",
    "train-labels-idx1-ubyte": "train_labels",
    "t10k-images-idx3-ubyte": "test_images",
    "t10k-labels-idx1-ubyte": "test_labels",
}
TRAIN_IMAGES, TRAIN_LABELS = list(KEYS)[:2]


def image_file(count: int, seed: int) -> bytes:
    return struct.pack(">IIII", 2051, count, 28, 28) + np.random.default_rng(seed).bytes(count * 784)


def label_file(count: int) -> bytes:
    return struct.pack(">II", 2049, count) + bytes(index % 10 for index in range(count))


CONTENT = dict(zip(KEYS, (image_file(30, 1), label_file(30), image_file(20, 2), label_file(20))))


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    digests = {KEYS[name]: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    digests.update(changes.pop("sha256", {}))
    defaults = {"cache_dir": tmp_path / "cache", "mirrors": [], "download_attempts": 1, "lock_timeout_seconds": 60}
    return DataConfig(sha256=digests, **{**defaults, **changes})


def fill(folder: Path, content: dict[str, bytes] = CONTENT, compressed: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in content.items():
        (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(body) if compressed else body)
    return folder


def cached(tmp_path: Path) -> list[str]:
    """What the cache holds, but for the lock and the empty folders."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "lock")


def is_right(dataset: Dataset) -> bool:
    """Whether the arrays are the bytes that were written, read with nothing but slices."""
    arrays = [*dataset.train, *dataset.test]
    return [array.tobytes() for array in arrays] == [
        body[16 if "images" in name else 8 :] for name, body in CONTENT.items()
    ]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No distribution's package and no apt-get on this machine, no proxy on the way to it."""
    monkeypatch.setattr(download, "PACKAGE_FOLDER", tmp_path / "package")
    monkeypatch.setenv("PATH", str(tmp_path / "commands"))
    monkeypatch.setenv("no_proxy", "*")


class MirrorServer(http.server.ThreadingHTTPServer):
    """Serves a folder; a closed gate holds the answers back."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(MirrorHandler, directory=str(folder)))
        self.folder = folder
        self.requests: list[str] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are part of the tests."""


class MirrorHandler(http.server.SimpleHTTPRequestHandler):
    server: MirrorServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.asked.set()
        self.server.gate.wait()
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[MirrorServer]:
    server = MirrorServer(fill(tmp_path / "mirror"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_arrays_are_the_files_bytes_mapped_read_only(tmp_path: Path) -> None:
    dataset = idx.load(config(tmp_path, dir=fill(tmp_path / "mine")))
    assert is_right(dataset)
    assert [array.shape for array in (*dataset.train, *dataset.test)] == [(30, 28, 28), (30,), (20, 28, 28), (20,)]
    for array in (*dataset.train, *dataset.test):
        assert isinstance(array, np.memmap)
        assert array.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_locating_finds_what_is_here_and_fetches_nothing(tmp_path: Path, mirror: MirrorServer) -> None:
    with_mirror = config(tmp_path, mirrors=[mirror.url])
    assert idx.locate(with_mirror) == {}
    assert mirror.requests == [] and cached(tmp_path) == []
    idx.load(with_mirror, lambda line: None)
    assert sorted(path.read_bytes() for path in idx.locate(with_mirror).values()) == sorted(CONTENT.values())


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("place", ["mine", "package"])
def test_locating_looks_into_data_dir_and_the_package(tmp_path: Path, place: str, compressed: bool) -> None:
    folder = fill(tmp_path / place, compressed=compressed)
    found = idx.locate(config(tmp_path, dir=folder if place == "mine" else None))
    assert {path.parent for path in found.values()} == {folder} and len(found) == 4


def test_a_damaged_file_of_the_package_is_not_located_and_one_of_data_dir_is_an_error(tmp_path: Path) -> None:
    folder = fill(tmp_path / "package", compressed=False)
    (folder / idx.FILES[1].name).write_bytes(b"damaged")
    assert [file for file in idx.FILES if file not in idx.locate(config(tmp_path))] == [idx.FILES[1]]
    with pytest.raises(DataError, match=idx.FILES[1].name):
        idx.locate(config(tmp_path, dir=folder))


SOURCES = ("data.dir", "package folder", "first mirror", "second mirror", "apt")


@pytest.mark.parametrize("holder", SOURCES)
def test_sources_are_tried_in_order_and_the_first_that_has_the_files_is_the_last_asked(
    holder: str, tmp_path: Path, mirror: MirrorServer
) -> None:
    shutil.rmtree(mirror.folder)
    (tmp_path / "mine").mkdir()
    labels = dict(
        zip(
            SOURCES,
            (str(tmp_path / "mine"), str(tmp_path / "package"), f"{mirror.url}a/", f"{mirror.url}b/", "apt package"),
        )
    )
    folders = dict(zip(SOURCES, ("mine", "package", "mirror/a", "mirror/b", "deb")))
    fill(tmp_path / folders[holder])
    stand_in_for_apt(tmp_path)
    said: list[str] = []
    mirrors = [labels["first mirror"], labels["second mirror"]]
    assert is_right(idx.load(config(tmp_path, dir=tmp_path / "mine", mirrors=mirrors), said.append))
    tried = [line.split(" from ")[1] for line in said if f"{TRAIN_IMAGES} from " in line]
    expected = [labels[name] for name in SOURCES[: SOURCES.index(holder) + 1]]
    assert [label[: len(start)] for label, start in zip(tried, expected)] == expected
    assert len(tried) == len(expected)


def stand_in_for_apt(tmp_path: Path) -> None:
    """An apt-get whose package holds what the folder ``deb`` holds."""
    commands = {
        "apt-get": 'case "$*" in *download*) : >it.deb;; esac',
        "dpkg-deb": f"/bin/mkdir -p tree{tmp_path} && /bin/cp -r {tmp_path}/deb tree{tmp_path}/package",
    }
    (tmp_path / "commands").mkdir()
    for name, script in commands.items():
        path = tmp_path / "commands" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


def test_when_all_fail_one_error_names_each_failure_and_says_what_to_do(tmp_path: Path, mirror: MirrorServer) -> None:
    (tmp_path / "mine").mkdir()
    (mirror.folder / f"{TRAIN_IMAGES}.gz").unlink()
    fill(tmp_path / "package", {TRAIN_IMAGES: CONTENT[TRAIN_IMAGES][:-1] + b"?"})
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        idx.load(config(tmp_path, dir=tmp_path / "mine", mirrors=[mirror.url]), said.append)
    message = str(caught.value)
    for part in (
        f"missing: {TRAIN_IMAGES}. Tried",
        f"{tmp_path}/mine: holds neither {TRAIN_IMAGES} nor",
        f"{tmp_path}/package/{TRAIN_IMAGES}.gz: wrong checksum",
        f"{mirror.url}: HTTP 404",
        "apt package dataset-fashion-mnist: apt-get is not installed",
        "data.dir=FOLDER",
        *(f"  {name}.gz\n" for name in KEYS),
    ):
        assert part in message
    for line in message.splitlines():
        if line.startswith(f"  {tmp_path}") or line.startswith("  http"):
            assert line in said
    assert TRAIN_IMAGES not in cached(tmp_path)


def test_a_mirror_that_cannot_be_reached_is_asked_once_not_for_each_file(tmp_path: Path, mirror: MirrorServer) -> None:
    said: list[str] = []
    mirrors = ["http://127.0.0.1:1/", mirror.url]
    assert is_right(idx.load(config(tmp_path, mirrors=mirrors), said.append))
    assert sum("from http://127.0.0.1:1/" in line for line in said) == 1


def test_no_source_may_use_up_the_time_of_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    class Empty:
        def find(self, name: str, scratch: Path, deadline: float) -> Path:
            shares.append(round(deadline - time.monotonic()))
            raise download.SourceUnavailable("empty")

    monkeypatch.setattr(idx, "_sources", lambda config, say: [Empty(), Empty(), Empty()])
    with pytest.raises(DataError):
        idx.load(config(tmp_path, lock_timeout_seconds=600), lambda line: None)
    assert shares == [200, 300, 600]


def test_decompressed_files_in_data_dir_are_mapped_in_place_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mine = fill(tmp_path / "mine", compressed=False)
    dataset = idx.load(config(tmp_path, dir=mine, cache_dir=tmp_path / "file" / "cache"), pytest.fail)
    assert is_right(dataset)
    assert dataset.train.images.filename == mine / TRAIN_IMAGES


def test_a_full_cache_serves_in_silence_and_is_not_written(tmp_path: Path) -> None:
    fill(tmp_path / "package")
    idx.load(config(tmp_path))
    shutil.rmtree(tmp_path / "package")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert is_right(idx.load(config(tmp_path), pytest.fail))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_a_server_that_decompresses_on_the_way_is_understood(tmp_path: Path, mirror: MirrorServer) -> None:
    for name, body in CONTENT.items():
        (mirror.folder / f"{name}.gz").write_bytes(body)
    assert is_right(idx.load(config(tmp_path, mirrors=[mirror.url])))


def test_a_data_dir_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "package")
    with pytest.raises(DataError, match=re.escape(f"data.dir={tmp_path}/typo: not a folder")):
        idx.load(config(tmp_path, dir=tmp_path / "typo"))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_file_in_data_dir_is_an_error_although_the_cache_could_serve(tmp_path: Path, compressed: bool) -> None:
    fill(tmp_path / "package")
    idx.load(config(tmp_path))
    mine = fill(tmp_path / "mine", {**CONTENT, TRAIN_IMAGES: image_file(30, seed=3)}, compressed)
    with pytest.raises(DataError, match=f"{mine}/{TRAIN_IMAGES}.*wrong checksum.*data.sha256.train_images"):
        idx.load(config(tmp_path, dir=mine))


@pytest.mark.parametrize("compressed", [True, False])
def test_any_accepts_what_data_dir_holds(tmp_path: Path, compressed: bool) -> None:
    mine = fill(tmp_path / "mine", {**CONTENT, TRAIN_IMAGES: image_file(30, seed=3)}, compressed)
    dataset = idx.load(config(tmp_path, dir=mine, sha256={"train_images": "any"}))
    assert dataset.train.images.tobytes() == image_file(30, seed=3)[16:]
    assert dataset.test.images.tobytes() == CONTENT["t10k-images-idx3-ubyte"][16:]


def test_one_cache_serves_two_data_sets(tmp_path: Path) -> None:
    fill(tmp_path / "package")
    idx.load(config(tmp_path))
    mine = fill(tmp_path / "mine", {**CONTENT, TRAIN_IMAGES: image_file(30, seed=3)})
    idx.load(config(tmp_path, dir=mine, sha256={"train_images": "any"}))
    assert is_right(idx.load(config(tmp_path), pytest.fail))


def test_any_never_fetches(tmp_path: Path) -> None:
    fill(tmp_path / "package")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=f"holds neither {TRAIN_IMAGES}"):
        idx.load(config(tmp_path, dir=tmp_path / "mine", sha256={"train_images": "any"}))


IMAGES, LABELS = CONTENT[TRAIN_IMAGES], CONTENT[TRAIN_LABELS]
FAULTS: dict[str, tuple[str, bytes, str]] = {
    "labels in place of images": (TRAIN_IMAGES, LABELS, "wrong magic number 2049, expected 2051"),
    "images in place of labels": (TRAIN_LABELS, IMAGES, "wrong magic number 2051, expected 2049"),
    "a web page": (TRAIN_IMAGES, b"<html>please log in</html>", "wrong magic number"),
    "empty": (TRAIN_IMAGES, b"", "truncated: 0 bytes"),
    "half a header": (TRAIN_IMAGES, IMAGES[:10], "truncated: 10 bytes"),
    "one byte short": (TRAIN_IMAGES, IMAGES[:-1], "truncated: 23519 bytes.* promises 23520"),
    "one byte long": (TRAIN_IMAGES, IMAGES + b"!", "more bytes.* promises 23520"),
    "bytes without end": (TRAIN_IMAGES, struct.pack(">IIII", 2051, 1, 2**16, 2**16), r"\(65536, 65536\), expected"),
    "channels last": (TRAIN_IMAGES, struct.pack(">5I", 2052, 2, 28, 14, 3), "channels last.*transpose"),
    "numbers of another type": (TRAIN_LABELS, struct.pack(">II", 0xD01, 1), "wrong magic number 3329"),
    "no items": (TRAIN_LABELS, struct.pack(">II", 2049, 0), "counts 0 items"),
    "four billion items": (TRAIN_LABELS, struct.pack(">II", 2049, 2**32 - 1), "counts 4294967295 items"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_file_in_data_dir_is_named_with_its_fault_and_not_cached(
    fault: str, compressed: bool, tmp_path: Path
) -> None:
    name, body, complaint = FAULTS[fault]
    mine = fill(tmp_path / "mine", {**CONTENT, name: body}, compressed)
    with pytest.raises(DataError, match=f"{mine}/{name}.*{complaint}"):
        idx.load(config(tmp_path, dir=mine, sha256={KEYS[name]: hashlib.sha256(body).hexdigest()}))
    assert cached(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_from_elsewhere_is_named_and_not_cached(fault: str, tmp_path: Path) -> None:
    name, body, complaint = FAULTS[fault]
    fill(tmp_path / "package", {name: body})
    with pytest.raises(DataError, match=f"{tmp_path}/package/{name}.*{complaint}"):
        idx.load(config(tmp_path, sha256={KEYS[name]: hashlib.sha256(body).hexdigest()}))
    assert cached(tmp_path) == []
    assert not list((tmp_path / "cache").glob(f"{cache.SCRATCH}*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-4],
        lambda packed: packed + b"garbage",
        lambda packed: packed[:5000] + bytes(100) + packed[5100:],
        lambda packed: packed[:10] + b"\xff" * 50 + packed[60:],
        lambda packed: packed[:2],
    ],
    ids=["half", "no trailer", "trailing garbage", "zeros inside", "no deflate", "two bytes"],
)
@pytest.mark.parametrize("place", ["mine", "package"])
def test_a_damaged_gzip_file_is_named_and_not_cached(
    damage: Callable[[bytes], bytes], place: str, tmp_path: Path
) -> None:
    path = fill(tmp_path / place) / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "mine").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"{path}: "):
        idx.load(config(tmp_path, dir=tmp_path / "mine"))
    assert TRAIN_IMAGES not in cached(tmp_path)
    assert not list((tmp_path / "cache").glob(f"{cache.SCRATCH}*"))


def test_a_decompression_bomb_is_left_at_the_size_that_its_header_promises(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(CONTENT[TRAIN_IMAGES] + bytes(1 << 24)))
    unpacked = 0
    with pytest.raises(DataError, match="more bytes"):
        for chunk in idx._decoded(path, idx.FILES[0]):
            unpacked += len(chunk)
    assert unpacked == len(CONTENT[TRAIN_IMAGES])


def test_as_many_labels_as_images_or_an_error_that_names_both(tmp_path: Path) -> None:
    mine = fill(tmp_path / "mine", {**CONTENT, TRAIN_LABELS: label_file(29)}, compressed=False)
    with pytest.raises(DataError, match=f"{TRAIN_IMAGES}: 30 images, but .*{TRAIN_LABELS}: 29 labels"):
        idx.load(config(tmp_path, dir=mine, sha256={"train_labels": "any"}))


def idx_file(array: np.ndarray) -> bytes:
    """As the format's own page describes it: zero, zero, type, axes, then each axis and the numbers, big-endian."""
    code = {"u1": 8, "i2": 11, "i4": 12}[array.dtype.str[1:]]
    numbers = array.astype(array.dtype.newbyteorder(">")).tobytes()
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + numbers


def own(folder: Path, images: tuple[int, ...], labels: np.ndarray, names: str = "", compressed: bool = False) -> Any:
    """Files of one's own, whose training and test sets are alike; the pixels, and the configuration that takes them."""
    pixels = np.random.default_rng(5).integers(0, 256, (len(labels), *images), dtype=np.uint8)
    kind = {"u1": "ubyte", "i2": "short", "i4": "int"}[labels.dtype.str[1:]]
    content = {}
    for part in ("train", "t10k"):
        content[f"{part}-images-idx{pixels.ndim}-ubyte"] = idx_file(pixels)
        content[f"{part}-labels-idx1-{kind}"] = idx_file(labels)
    fill(folder, content, compressed)
    if names:
        (folder / "classes.txt").write_text(names)
    return pixels, DataConfig(dir=folder, sha256="any", cache_dir=folder.with_name("cache"))


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("images", [(5, 7), (1, 5, 7), (3, 32, 32)])
def test_images_of_any_size_and_channels_are_the_bytes_that_were_written(
    images: tuple[int, ...], compressed: bool, tmp_path: Path
) -> None:
    labels = np.array([0, 1, 2, 1, 2], np.uint8)
    pixels, values = own(tmp_path / "mine", images, labels, compressed=compressed)
    dataset = idx.load(values)
    assert (dataset.about.classes, dataset.about.shape) == (("0", "1", "2"), (1, *images)[-3:])
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.images, pixels)
        np.testing.assert_array_equal(split.labels, labels)


@pytest.mark.parametrize("dtype", ["i2", "i4"])
def test_labels_may_be_wider_than_a_byte(dtype: str, tmp_path: Path) -> None:
    labels = np.array([0, 999, 7], dtype)
    _, values = own(tmp_path / "mine", (4, 4), labels)
    dataset = idx.load(values)
    assert len(dataset.about.classes) == 1000 and dataset.train.labels[np.array([1, 2])].tolist() == [999, 7]


def test_classes_have_the_names_of_classes_txt(tmp_path: Path) -> None:
    _, values = own(tmp_path / "mine", (4, 4), np.array([0, 1, 0], np.uint8), "cat\ndog\nzebra\n")
    assert idx.load(values).about.classes == ("cat", "dog", "zebra")


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: body[:-1] + b"?", lambda body: b""])
def test_a_damaged_cache_is_named_and_mended(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    fill(tmp_path / "package")
    path = Path(idx.load(config(tmp_path)).train.images.filename)
    path.write_bytes(damage(CONTENT[TRAIN_IMAGES]))
    said: list[str] = []
    assert is_right(idx.load(config(tmp_path), said.append))
    assert re.search(f"damaged.*{path}", said[0])
    assert path.read_bytes() == CONTENT[TRAIN_IMAGES]


def test_a_mended_cache_leaves_the_mappings_of_running_jobs_alone(tmp_path: Path) -> None:
    fill(tmp_path / "package")
    running = idx.load(config(tmp_path))
    path = Path(running.train.images.filename)
    path.rename(path.with_name("old"))
    path.write_bytes(b"")
    assert is_right(idx.load(config(tmp_path), lambda line: None))
    assert is_right(running)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def unprivileged() -> Iterator[Callable[[], None]]:
    """For root, whom permissions do not stop: a call that makes this process nobody until the test ends."""
    user = os.geteuid()
    yield lambda: os.seteuid(65534) if user == 0 else None
    os.seteuid(user)


def test_a_cache_that_cannot_be_written_is_named_with_its_key(
    public_folder: Path, unprivileged: Callable[[], None]
) -> None:
    fill(public_folder / "package")
    (public_folder / "cache").mkdir()
    (public_folder / "cache").chmod(0o555)
    unprivileged()
    with pytest.raises(DataError, match=rf"{public_folder}/cache: cannot store.*Permission denied.*data\.cache_dir"):
        idx.load(config(public_folder))


def test_a_full_cache_serves_although_it_cannot_be_written(
    public_folder: Path, unprivileged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PACKAGE_FOLDER", fill(public_folder / "package"))
    idx.load(config(public_folder))
    for path in ((public_folder / "cache"), *(public_folder / "cache").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    unprivileged()
    assert is_right(idx.load(config(public_folder), pytest.fail))


def test_a_forbidden_cache_and_a_forbidden_data_dir_are_errors_without_traceback(
    public_folder: Path, unprivileged: Callable[[], None]
) -> None:
    fill(public_folder / "secret", compressed=False)
    (public_folder / "secret").chmod(0o600)
    unprivileged()
    with pytest.raises(DataError, match=r"data\.dir=.*Permission denied"):
        idx.load(config(public_folder, dir=public_folder / "secret"))
    with pytest.raises(DataError, match="cannot store"):
        idx.load(config(public_folder, cache_dir=public_folder / "secret"))


def test_a_forbidden_package_folder_is_one_more_failed_source(
    public_folder: Path, unprivileged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PACKAGE_FOLDER", fill(public_folder / "secret"))
    (public_folder / "secret").chmod(0o600)
    (public_folder / "cache").mkdir()
    (public_folder / "cache").chmod(0o777)
    unprivileged()
    with pytest.raises(DataError, match=f"{public_folder}/secret: holds neither"):
        idx.load(config(public_folder))


LOADER = """
import json, resource, sys
from pathlib import Path
from job.data import idx, download
from job.config import DataConfig
package, limit, values = json.loads(sys.argv[1])
download.PACKAGE_FOLDER = Path(package)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
idx.load(DataConfig(**values), lambda line: print(line, flush=True))
print("done", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that load, and ends them with the test."""
    started = []

    def start(values: DataConfig, file_size_limit: int = 0) -> subprocess.Popen[str]:
        argument = json.dumps([str(tmp_path / "package"), file_size_limit, values.model_dump(mode="json")])
        command = [sys.executable, "-c", LOADER, argument]
        root = Path(idx.__file__).parents[2]
        process = subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its output and waits
            process.kill()


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    read = []
    for line in process.stdout:
        read.append(line)
        if text in line:
            return line
    raise AssertionError(f"the process ended without saying {text!r}: {''.join(read)}")


def test_two_processes_at_once_download_once(
    tmp_path: Path, mirror: MirrorServer, start: Callable[..., subprocess.Popen[str]]
) -> None:
    values = config(tmp_path, mirrors=[mirror.url])
    mirror.gate.clear()
    first = start(values)
    assert mirror.asked.wait(60)
    second = start(values)
    assert f"waiting for process {first.pid} on " in wait_for(second, "waiting")
    mirror.gate.set()
    wait_for(first, "done")
    wait_for(second, "done")
    assert sorted(mirror.requests) == sorted(f"/{name}.gz" for name in KEYS)


def test_when_the_holder_of_the_lock_is_killed_the_waiter_goes_on_and_cleans_up(
    tmp_path: Path, mirror: MirrorServer, start: Callable[..., subprocess.Popen[str]]
) -> None:
    values = config(tmp_path, mirrors=[mirror.url])
    mirror.gate.clear()
    holder = start(values)
    assert mirror.asked.wait(60)
    assert cached(tmp_path) == [f"{TRAIN_IMAGES}.gz"]  # what the killed process will leave
    next((tmp_path / "cache").glob(f"{cache.SCRATCH}*/")).joinpath("more").touch()

    def say(line: str) -> None:
        if "waiting" in line:
            holder.kill()
            mirror.gate.set()

    assert is_right(idx.load(values, say))
    assert holder.wait() == -9
    assert cached(tmp_path) == sorted(KEYS)


def test_a_lock_that_is_held_too_long_is_an_error_that_names_the_holder(
    tmp_path: Path, mirror: MirrorServer, start: Callable[..., subprocess.Popen[str]]
) -> None:
    mirror.gate.clear()
    holder = start(config(tmp_path, mirrors=[mirror.url]))
    assert mirror.asked.wait(60)
    with pytest.raises(DataError, match=rf"lock: process {holder.pid} on .* still holds.*data\.lock_timeout_seconds"):
        idx.load(config(tmp_path, lock_timeout_seconds=0.1), lambda line: None)


def test_a_full_disk_is_told_as_the_caches_fault_and_leaves_nothing_behind(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    fill(tmp_path / "package")
    output, _ = start(config(tmp_path), file_size_limit=10_000).communicate()
    assert f"Unwritable: {tmp_path}/cache: cannot store the data set there: [Errno 27] File too large" in output
    assert cached(tmp_path) == []
    assert not list((tmp_path / "cache").glob(f"{cache.SCRATCH}*"))


def test_compressed_bytes_under_the_plain_name_are_decompressed_before_they_are_mapped(tmp_path: Path) -> None:
    folder = fill(tmp_path / "mine", {name: gzip.compress(body) for name, body in CONTENT.items()}, compressed=False)
    assert is_right(idx.load(config(tmp_path, dir=folder)))
    assert is_right(idx.load(config(tmp_path, dir=folder)))  # from the cache
    assert len(idx.locate(config(tmp_path, dir=folder))) == 4


def arguments(values: DataConfig) -> list[str]:
    digests = [f"data.sha256.{key}={digest}" for key, digest in values.sha256.model_dump().items()]
    return [f"data.cache_dir={values.cache_dir}", "data.mirrors=[]", *digests]


def test_the_command_prints_where_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "package")
    main(arguments(config(tmp_path)))
    printed = capsys.readouterr().out
    for path in (tmp_path / "cache").glob("*/*-ubyte"):
        assert f"{path}: " in printed


def test_the_command_fails_with_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot get the data set"):
        main(arguments(config(tmp_path)))
    with pytest.raises(UsageError, match=r"data\.typo"):
        main(["data.typo=1"])
