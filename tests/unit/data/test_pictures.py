"""Pictures: the pixels that were written, in the order of names, whoever decodes them, ahead of time or not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config import DataConfig
from job.data import formats, index, pictures
from job.data.dataset import Dataset
from job.data.pictures import AHEAD, decoded_ahead
from job.data.sampler import Sampler
from job.errors import DataError
from tests import synthetic


def config(folder: Path, **more: Any) -> DataConfig:
    return DataConfig(dir=folder, cache_dir=folder.with_name("cache"), **more)


def load(folder: Path, **more: Any) -> Dataset:
    return formats.load(config(folder, **more), lambda line: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synthetic.write_pictures(tmp_path / "data", train=12, test=6)
    return tmp_path / "data"


def expected(count: int = 12, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = synthetic.coloured(count, seed)
    order = np.lexsort((np.arange(count), labels))  # by class, then by name
    return pixels[order], labels[order]


@pytest.mark.parametrize("write", [synthetic.write_pictures, synthetic.write_records, synthetic.write_coloured_idx])
def test_indices_and_slices_give_the_pixels_that_were_written(write: Callable[..., Any], tmp_path: Path) -> None:
    overrides = write(tmp_path / "data", train=12, test=6)
    dataset = load(tmp_path / "data", **({"sha256": "any"} if "data.sha256=any" in overrides else {}))
    pixels, labels = expected()
    assert dataset.about.classes == ("blue", "green", "red") and dataset.about.shape == (3, 32, 32)
    assert dataset.train.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(dataset.train.images[:], pixels)
    np.testing.assert_array_equal(dataset.train.images[np.array([7, 0, 7])], pixels[[7, 0, 7]])
    np.testing.assert_array_equal(dataset.train.images[3:5], pixels[3:5])
    np.testing.assert_array_equal(dataset.test.images[:], expected(6, 2)[0])


def test_pictures_are_brought_to_the_size_that_is_asked_for(folder: Path) -> None:
    dataset = load(folder, image_size=16)
    assert dataset.about.shape == (3, 16, 16) and dataset.train.images[:2].shape == (2, 3, 16, 16)


def test_grey_pictures_have_one_channel(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.fromarray(np.full((4, 5), 9, np.uint8)).save(tmp_path / "data" / part / name / "0.png")
    dataset = load(tmp_path / "data")
    assert dataset.about.shape == (1, 4, 5)
    np.testing.assert_array_equal(dataset.test.images[:], np.full((2, 1, 4, 5), 9))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def other_size(file: Path) -> None:
    Image.new("RGB", (8, 9)).save(file)


def sixteen_bits(file: Path) -> None:
    Image.fromarray(np.full((32, 32), 3000, np.uint16)).save(file)


FAULTS = {
    "damaged": (truncate, "damaged, or not a picture"),
    "no picture": (lambda file: file.write_text("hello"), "no format that Pillow reads"),
    "of another size": (other_size, "8x9 pixels, and the first"),
    "of 16 bits": (sixteen_bits, "more than 8 bits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_that_cannot_be_used_is_named(folder: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    last = sorted((folder / "train" / "red").iterdir())[-1]
    damage(last)
    with pytest.raises(DataError) as error:
        load(folder).train.images[:]
    assert str(last) in str(error.value) and words in str(error.value)


def test_a_picture_that_has_changed_or_gone_since_it_was_listed_is_named(folder: Path) -> None:
    images = load(folder).train.images
    first, second = sorted((folder / "train" / "red").iterdir())[:2]
    first.write_bytes(first.read_bytes() + b"more")
    second.unlink()
    for place, file, words in ((8, first, "when the folder was listed"), (9, second, "No such file")):
        with pytest.raises(DataError, match=words) as error:
            images[place : place + 1]
        assert str(file) in str(error.value)


def step_order(samples: int) -> Any:
    return Sampler(samples, 5, seed=3).batches(range(7), range(2), 2)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_what_is_decoded_ahead_is_what_is_asked_for_and_the_same_for_any_number_of_threads(
    folder: Path, threads: int
) -> None:
    images = load(folder, decode_threads=threads).train.images
    pixels, steps = expected()[0], []
    for step, ((first, second),) in decoded_ahead(images, step_order(12)):
        samples = np.concatenate([first.samples, second.samples])
        np.testing.assert_array_equal(images[samples], pixels[samples])
        np.testing.assert_array_equal(images[2:4], pixels[2:4])  # something else in between, as an evaluation asks
        steps.append(step)
    assert steps == list(range(7))


def test_the_next_steps_are_decoded_while_one_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(folder).train.images
    steps = decoded_ahead(images, step_order(12))
    next(steps)
    for batch in list(images._expected):
        batch.wait()
    monkeypatch.setattr(images, "_decoded", pytest.fail)  # from here on there is nothing left to decode
    for _, (shards,) in [next(step_order(12))]:
        images[np.concatenate([shard.samples for shard in shards])]
    assert len(images._expected) == AHEAD


def test_a_damaged_picture_ends_the_step_that_needs_it_and_no_other(folder: Path) -> None:
    images = load(folder).train.images
    order = [np.concatenate([shard.samples for shard in shards]) for _, (shards,) in step_order(12)]
    files = sorted((folder / "train").glob("*/*"))
    victim = next(sample for sample in order[2].tolist() if sample not in order[0] and sample not in order[1])
    truncate(files[victim])
    images = load(folder).train.images
    done = 0
    with pytest.raises(DataError, match=str(files[victim])):
        for step, (shards,) in decoded_ahead(images, step_order(12)):
            images[np.concatenate([shard.samples for shard in shards])]
            done = step + 1
    assert done == 2 and not images._expected


def test_images_in_memory_are_handed_through_without_a_look_ahead() -> None:
    taken = []

    def batches() -> Any:
        for step, batch in step_order(12):
            taken.append(step)
            yield step, batch

    for step, _ in decoded_ahead(np.zeros((12, 4, 4), np.uint8), batches()):
        assert taken[-1] == step


def damage_some(folder: Path) -> list[Path]:
    files = sorted((folder / "train").glob("*/*"))
    for number in (0, 5, 11):  # the first one, from which the shape would be taken, too
        truncate(files[number])
    truncate(sorted((folder / "test").glob("*/*"))[1])
    return [files[0], files[5], files[11], sorted((folder / "test").glob("*/*"))[1]]


@pytest.mark.parametrize("threads", [1, 5])
def test_damaged_pictures_are_left_out_from_the_start_counted_and_listed(folder: Path, threads: int) -> None:
    damaged = damage_some(folder)
    values = config(folder, on_damaged="skip", decode_threads=threads)
    dataset = formats.load(values, lambda line: None)
    rest = np.delete(np.arange(12), [0, 5, 11])
    pixels, labels = expected()
    np.testing.assert_array_equal(dataset.train.images[:], pixels[rest])
    assert dataset.train.labels.tolist() == labels[rest].tolist()
    assert len(dataset.test.labels) == len(dataset.test.images) == 5
    assert dataset.about.left_out == tuple(map(str, damaged))
    assert f"4 damaged and left out, listed in dataset.json: {damaged[0]}, " in formats.summary(values, dataset)


def test_what_is_left_out_is_a_part_of_what_the_data_is(folder: Path) -> None:
    whole = load(folder).digests
    assert load(folder, on_damaged="skip").digests == whole
    truncate(next((folder / "train" / "red").iterdir()))
    left = load(folder, on_damaged="skip").digests
    assert {key for key in whole if left[key] != load(folder).digests[key]} == {"train_images", "train_labels"}


def test_a_part_of_which_everything_is_damaged_is_an_error(folder: Path) -> None:
    for file in (folder / "test").glob("*/*"):
        truncate(file)
    with pytest.raises(DataError, match="all pictures of test are damaged"):
        load(folder, on_damaged="skip")


def test_all_is_decoded_only_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_some(folder)
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)  # else what was written a moment ago is not trusted
    first = load(folder, on_damaged="skip", compute_mean_std=True)
    monkeypatch.setattr(pictures.Pictures, "scan", pytest.fail)
    again = load(folder, on_damaged="skip", compute_mean_std=True)
    assert (again.about, again.digests) == (first.about, first.digests)
    np.testing.assert_array_equal(again.train.images[:], first.train.images[:])


def test_no_thread_decodes_for_a_run_that_has_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(folder, decode_threads=1).train.images
    gate, begun = threading.Event(), []

    def held(sample: int) -> np.ndarray:
        begun.append(sample)
        assert gate.wait(60)
        return np.zeros((3, 32, 32), np.uint8)

    monkeypatch.setattr(images, "_decoded", held)
    steps = decoded_ahead(images, step_order(12))
    next(steps)
    expecting = [piece for batch in images._expected for piece in batch.pieces]
    while not begun:
        time.sleep(0.001)
    steps.close()
    gate.set()
    assert [piece.cancelled() for piece in expecting] == [False] + [True] * (len(expecting) - 1)
