"""Folders of pictures: the pixels that were written, in the order of names, and one message for what is wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job import cli
from job.config import DataConfig
from job.data import formats
from job.errors import DataError, UsageError
from tests import synthetic


def config(folder: Path, **more: Any) -> DataConfig:
    return DataConfig(format="folder", dir=folder, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synthetic.write_pictures(tmp_path / "data", train=12, test=6)
    return tmp_path / "data"


def test_indices_and_slices_give_the_pixels_that_were_written(folder: Path) -> None:
    dataset = formats.load(config(folder))
    pixels, labels = synthetic.coloured(12, seed=1)
    order = np.lexsort((np.arange(12), labels))  # by class, then by name
    assert dataset.about.classes == ("blue", "green", "red") and dataset.about.shape == (3, 32, 32)
    assert dataset.train.labels.tolist() == labels[order].tolist()
    np.testing.assert_array_equal(dataset.train.images[:], pixels[order])
    np.testing.assert_array_equal(dataset.train.images[np.array([7, 0, 7])], pixels[order][[7, 0, 7]])
    np.testing.assert_array_equal(dataset.train.images[3:5], pixels[order][3:5])
    assert len(dataset.test.labels) == 6


def test_pictures_are_brought_to_the_size_that_is_asked_for(folder: Path) -> None:
    dataset = formats.load(config(folder, image_size=16))
    assert dataset.about.shape == (3, 16, 16) and dataset.train.images[:2].shape == (2, 3, 16, 16)


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((4, 5), 9, np.uint8)).save(tmp_path / part / name / "0.png")
    dataset = formats.load(config(tmp_path))
    assert dataset.about.shape == (1, 4, 5)
    np.testing.assert_array_equal(dataset.test.images[:], np.full((2, 1, 4, 5), 9))


def test_what_the_data_is_follows_from_its_names_and_sizes(folder: Path) -> None:
    before = formats.digests(config(folder), formats.load(config(folder)))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert formats.digests(config(moved), formats.load(config(moved))) == before
    (moved / "train" / "red" / "new.png").write_bytes(next((moved / "train" / "red").iterdir()).read_bytes())
    after = formats.digests(config(moved), formats.load(config(moved)))
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"train_images", "train_labels"}


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def other_size(file: Path) -> None:
    Image.new("RGB", (8, 9)).save(file)


@pytest.mark.parametrize(("damage", "words"), [(truncate, "damaged"), (other_size, "8x9 pixels, and the first")])
def test_a_picture_that_cannot_be_used_is_named(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    last = sorted((folder / "train" / "red").iterdir())[-1]
    damage(last)
    with pytest.raises(DataError) as error:
        formats.load(config(folder)).train.images[:]
    assert str(last) in str(error.value) and words in str(error.value)


def no_class(folder: Path) -> None:
    for path in (folder / "train").iterdir():
        shutil.rmtree(path)


def no_picture_of_a_class(folder: Path) -> None:
    for file in (folder / "train" / "green").iterdir():
        file.unlink()


def no_test_picture(folder: Path) -> None:
    for file in (folder / "test").glob("*/*"):
        file.unlink()


WRONG: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "no folder": (shutil.rmtree, [], ["no such folder"]),
    "no train": (lambda folder: shutil.rmtree(folder / "train"), [], ["train", "train/CLASS/"]),
    "no test": (lambda folder: shutil.rmtree(folder / "test"), [], ["test", "No such file"]),
    "no class": (no_class, [], ["train", "0 folders"]),
    "a class without pictures": (no_picture_of_a_class, [], ["green", "holds no picture"]),
    "no test picture": (no_test_picture, [], ["test", "holds no picture"]),
    "an unknown class in test": (lambda folder: (folder / "test" / "pink").mkdir(), [], ["pink", "train/ does not"]),
    "the first picture is damaged": (
        lambda folder: truncate(sorted((folder / "train" / "blue").iterdir())[0]), [], ["blue", "damaged"],
    ),
    "checksums": (lambda folder: None, ["data.sha256.train_images=any"], ["no checksums"]),
    "a size of nothing": (lambda folder: None, ["data.image_size=0"], ["data.image_size"]),
    "an unknown format": (lambda folder: None, ["data.format=zip"], ["data.format", "'folder'"]),
    "no data.dir": (lambda folder: None, ["data.dir=null"], ["format=folder needs data.dir"]),
    "too small for the network": (lambda folder: None, ["data.image_size=4"], ["takes no images of 4x4"]),
    "a size without pictures": (lambda folder: None, ["data.format=idx", "data.image_size=8"], ["for format=folder"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_data_set_is_one_message_before_anything_starts(case: str, folder: Path, tmp_path: Path) -> None:
    damage, overrides, words = WRONG[case]
    damage(folder)
    run = tmp_path / "run"
    with pytest.raises(UsageError) as error:
        cli.parse([f"run.dir={run}", "data.format=folder", f"data.dir={folder}", *overrides])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2 and not run.exists()
