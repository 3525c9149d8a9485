"""Which format is taken, how pixels are scaled, and one message for each thing that can be wrong with a data set."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mxnet import recordio
from PIL import Image

from job import cli
from job.config import DataConfig, load_config
from job.data import formats
from job.data.cache import SCRATCH
from job.data.dataset import FASHION_MNIST
from job.errors import DataError, UsageError
from tests import synthetic

WRITE: dict[str, Callable[..., list[str]]] = {
    "folder": synthetic.write_pictures,
    "record": synthetic.write_records,
    "idx": synthetic.write_coloured_idx,
}


def write(kind: str, folder: Path) -> DataConfig:
    overrides = WRITE[kind](folder, train=12, test=6)
    return load_config(overrides=[*overrides, f"data.cache_dir={folder.with_name('cache')}"]).data


@pytest.mark.parametrize("kind", WRITE)
def test_auto_takes_what_data_dir_holds_and_says_so(kind: str, tmp_path: Path) -> None:
    config = write(kind, tmp_path / "data")
    assert config.format == kind
    dataset = formats.load(config)
    words = {"folder": "folders of pictures", "record": "records", "idx": "IDX files"}[kind]
    told = f"data: {words} in {tmp_path}/data: 12 images to train and 6 to test, 3x32x32, 3 classes\n"
    assert formats.summary(config, dataset) == told


def test_fashion_mnist_stays_the_default_with_its_names_and_nothing_is_said() -> None:
    config = load_config().data
    assert config.format == "idx" and config.mean == [0.0] and config.std == [1.0]
    dataset = formats.load(config, pytest.fail)
    assert dataset.about == FASHION_MNIST and dataset.about.scales_only and formats.summary(config, dataset) == ""
    assert dict(dataset.digests) == config.sha256.model_dump()


@pytest.mark.parametrize("kind", WRITE)
def test_mean_and_deviation_are_those_of_the_training_images(kind: str, tmp_path: Path) -> None:
    config = write(kind, tmp_path / "data").model_copy(update={"compute_mean_std": True})
    about = formats.load(config, lambda line: None).about
    pixels = synthetic.coloured(12, seed=1)[0].astype(np.float64) / 255
    np.testing.assert_allclose(about.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(about.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_they_are_whole_numbers_until_the_end_so_that_no_order_shows() -> None:
    counts = np.zeros((1, 256), np.int64)
    counts[0, [0, 255]] = 2**53 + 1, 2**53 - 1  # which float64 does not tell apart
    (mean,), (std,) = formats.mean_and_std(counts)
    assert mean == 0.5 - 2.0**-54 and std == 0.5


def test_given_numbers_are_taken_for_each_channel_or_for_all(tmp_path: Path) -> None:
    config = write("folder", tmp_path / "data")
    given = config.model_copy(update={"mean": [0.1, 0.2, 0.3], "std": [0.5]})
    about = formats.load(given).about
    assert (about.mean, about.std) == ((0.1, 0.2, 0.3), (0.5,))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def remove(*patterns: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def labels(folder: Path, *values: int, part: str = "train") -> None:
    body = struct.pack(">2I", 0x801, len(values)) + bytes(values)
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(body)


def record(folder: Path, label: Any, content: bytes = b"") -> None:
    """Another last record of the training set."""
    writer = recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    png = (folder.parent / "some.png").as_posix()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(png)
    for key, value in enumerate([0, 1, 2, label]):
        header = recordio.IRHeader(0, value, key, 0)
        writer.write_idx(key, recordio.pack(header, content if content and key == 3 else Path(png).read_bytes()))
    writer.close()


def nothing(folder: Path) -> None:
    pass


KEEP = ["data.on_damaged=skip"]
WRONG: dict[str, tuple[str, Callable[[Path], Any], list[str], list[str]]] = {
    "no folder": ("folder", shutil.rmtree, ["data.format=folder"], ["no such folder"]),
    "no folder that could tell the format": ("folder", shutil.rmtree, ["data.image_size=8"], ["no such folder"]),
    "no train": ("folder", remove("train"), ["data.format=folder"], ["train", "train/CLASS/"]),
    "no test": ("folder", remove("test"), [], ["test", "No such file"]),
    "no class": ("folder", remove("train/*"), [], ["train", "0 folders"]),
    "one class": ("folder", remove("train/[rg]*", "test/[rg]*"), [], ["train", "1 folders"]),
    "a class without pictures": ("folder", remove("train/green/*"), [], ["green", "holds no picture"]),
    "no test picture": ("folder", remove("test/*/*"), [], ["test", "holds no picture"]),
    "an unknown class in test": (
        "folder", lambda folder: (folder / "test" / "pink").mkdir(), [], ["pink", "train/ does not"],
    ),
    "a class that cannot be printed": (
        "folder", lambda folder: (folder / "train" / "a\nb").mkdir(), [], ["cannot be printed", r"a\nb"],
    ),
    "a link to nothing": (
        "folder", lambda folder: (folder / "train" / "red" / "x.png").symlink_to("gone"), [], ["x.png", "No such file"],
    ),
    "the first picture is damaged": (
        "folder", lambda folder: truncate(min((folder / "train" / "blue").iterdir())), [], ["blue", "damaged"],
    ),
    "a later picture is damaged, and all are looked at": (
        "folder", lambda folder: truncate(max((folder / "test" / "red").iterdir())), ["data.compute_mean_std=true"],
        ["test/red", "damaged"],
    ),
    "all pictures of test are damaged": (
        "folder", lambda folder: [truncate(file) for file in (folder / "test").glob("*/*")], KEEP,
        ["all pictures of test"],
    ),
    "checksums": ("folder", nothing, ["data.sha256.train_images=any"], ["no checksums"]),
    "a size of nothing": ("folder", nothing, ["data.image_size=0"], ["data.image_size"]),
    "an unknown format": ("folder", nothing, ["data.format=zip"], ["data.format", "'folder'"]),
    "no data.dir": ("folder", nothing, ["data.format=folder", "data.dir=null"], ["format=folder needs data.dir"]),
    "a folder of other things": (
        "folder", lambda folder: (folder / "train").rename(folder / "training"), [], ["holds no data", "train.rec"],
    ),
    "two formats": (
        "folder", lambda folder: (folder / "train.rec").touch(), [],
        ["several formats", "format=folder or format=record"],
    ),
    "too small for the network": ("folder", nothing, ["data.image_size=4"], ["takes no images of 4x4"]),
    "two means for three channels": ("folder", nothing, ["data.mean=[0.5, 0.5]"], ["data.mean has 2", "3 channels"]),
    "a mean of bytes": ("folder", nothing, ["data.mean=[123.7]"], ["data.mean", "from 0 to 1"]),
    "a deviation of 0": ("folder", nothing, ["data.std=[0]"], ["data.std", "from 1e-06 to 1"]),
    "a mean given and computed": (
        "folder", nothing, ["data.mean=[0.5]", "data.compute_mean_std=true"], ["contradicts mean"],
    ),
    "a deviation that is none": (
        "idx", lambda folder: (folder / "train-images-idx4-ubyte").write_bytes(
            struct.pack(">5I", 0x804, 12, 3, 32, 32) + bytes(12 * 3 * 32 * 32)
        ), ["data.compute_mean_std=true"], ["channel 0 has the same value"],
    ),
    "a size without pictures": ("idx", nothing, ["data.image_size=8"], ["for format=folder or record"]),
    "damaged IDX files left out": ("idx", nothing, KEEP, ["on_damaged=skip is for format=folder"]),
    "a label too few": ("idx", lambda folder: labels(folder, 0, 1, 2), [], ["12 images", "3 labels"]),
    "one label for all": (
        "idx", lambda folder: (labels(folder, *[0] * 12), (folder / "classes.txt").unlink()), [], ["all labels are 0"],
    ),
    "a label without a name": ("idx", lambda folder: labels(folder, *[3] * 12), [], ["classes.txt", "names 3", "to 3"]),
    "a name for two classes": (
        "idx", lambda folder: (folder / "classes.txt").write_text("a\nb\na\n"), [], ["classes.txt: line 3", "'a'"],
    ),
    "a class that only test has": (
        "idx", lambda folder: (labels(folder, *[4] * 6, part="t10k"), (folder / "classes.txt").unlink()), [],
        ["test set has label 4", "classes.txt"],
    ),
    "images of another shape in test": (
        "idx", lambda folder: (folder / "t10k-images-idx4-ubyte").write_bytes(
            struct.pack(">5I", 0x804, 6, 3, 16, 64) + bytes(6 * 3 * 1024)
        ), [], ["(3, 32, 32)", "(3, 16, 64)"],
    ),
    "images twice": (
        "idx", lambda folder: (folder / "train-images-idx3-ubyte").touch(), [], ["holds both", "keep one"],
    ),
    "no index": ("record", remove("test.idx"), [], ["test.idx: no such file", "train.rec, train.idx"]),
    "an index of words": ("record", lambda folder: (folder / "test.idx").write_text("a b"), [], ["test.idx: no index"]),
    "an empty index": ("record", lambda folder: (folder / "test.idx").write_text(""), [], ["test.idx: holds no"]),
    "an index of another file": (
        "record", lambda folder: (folder / "test.idx").write_text("7\t4\n"), [], ["test.rec, record 7: damaged"],
    ),
    "half a record file": (
        "record", lambda folder: truncate(folder / "train.rec"), [], ["train.rec, record", "damaged"],
    ),
    "a label between classes": ("record", lambda folder: record(folder, 1.5), [], ["record 3: its label is 1.5"]),
    "several labels": ("record", lambda folder: record(folder, [1.0, 2.0]), [], ["record 3: has 2 labels"]),
    "a record that is no picture": (
        "record", lambda folder: record(folder, 2, b"hello"), ["data.compute_mean_std=true"],
        ["train.rec, record 3: damaged", "Pillow"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_data_set_is_one_message_before_anything_starts(case: str, tmp_path: Path) -> None:
    kind, damage, more, words = WRONG[case]
    overrides = [*WRITE[kind](tmp_path / "data", train=12, test=6), f"data.cache_dir={tmp_path / 'cache'}"]
    damage(tmp_path / "data")
    run = tmp_path / "run"
    with pytest.raises(UsageError) as error:
        cli.parse([f"run.dir={run}", *overrides, *more])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2 and not run.exists()
    assert not list(tmp_path.glob(f"cache/{SCRATCH}*"))


def test_other_idx_data_than_fashion_mnist_has_to_be_said_on_purpose(tmp_path: Path) -> None:
    config = write("idx", tmp_path / "data").model_copy(update={"sha256": load_config().data.sha256})
    with pytest.raises(DataError, match=r"wrong checksum.*data\.sha256=any"):
        formats.load(config)
