"""Augmentation against plain Python, a sample and a pixel at a time, with the draws of numpy's own Philox."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from job.config import AugmentConfig
from job.data.dataset import Description
from job.data.sampler import Sampler, own_shards
from job.errors import UsageError
from job.training.augmentation import Augmentation
from tests.unit.training.test_learner import learner, split

SEED = 2**31 - 1
SHAPES = [(1, 28, 28), (3, 9, 14)]
EVERYTHING = {"horizontal_flip": True, "crop_padding": 3, "erase_probability": 0.6, "erase_area": 0.5}


def described(shape: tuple[int, int, int]) -> Description:
    return Description(("a", "b"), shape)


def pixels(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (count, *shape), dtype=np.uint8)


def augmented(images: np.ndarray, samples: np.ndarray, epoch: int, **config: Any) -> np.ndarray:
    found = Augmentation(AugmentConfig(**config), SEED, described(images.shape[1:]))(images, samples, epoch)
    assert found.dtype == np.uint8
    return np.asarray(found)


def raw_draws(sample: int, epoch: int, count: int) -> np.ndarray:
    key = np.array([SEED, 2**63 + epoch], np.uint64)
    return np.random.Philox(key=key, counter=[0, sample, 0, 0]).random_raw(count)


def expected(image: np.ndarray, sample: int, epoch: int, config: AugmentConfig) -> np.ndarray:
    """What becomes of one image, from the definitions."""
    channels, height, width = image.shape
    draws = [int(word >> np.uint64(11)) / 2**53 for word in raw_draws(sample, epoch, 12)]
    values = image.astype(np.float64)
    if strength := config.colour_jitter:
        brightness, contrast, saturation = (1 + strength * (2 * draw - 1) for draw in draws[8:11])
        values = np.minimum(values * brightness, 255)
        luma = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
        values = np.clip((values - (values * luma).sum(0).mean()) * contrast + (values * luma).sum(0).mean(), 0, 255)
        grey = (values * luma).sum(0)
        values = np.clip(grey + saturation * (values - grey), 0, 255)
    if config.horizontal_flip and draws[0] < 0.5:
        values = values[:, :, ::-1]
    padding = config.crop_padding
    padded = np.pad(values, ((0, 0), (padding, padding), (padding, padding)))
    top, left = (padding - (math.floor(draw * (2 * padding + 1)) - padding) for draw in draws[1:3])
    values = padded[:, top : top + height, left : left + width].copy()
    if draws[3] < config.erase_probability:
        smallest = min(0.02, config.erase_area)
        area = (smallest + draws[4] * (config.erase_area - smallest)) * height * width
        ratio = 0.3 + draws[5] * (1 / 0.3 - 0.3)
        rows = min(height, max(1, round(math.sqrt(area * ratio))))
        columns = min(width, max(1, round(math.sqrt(area / ratio))))
        top, left = math.floor(draws[6] * (height - rows + 1)), math.floor(draws[7] * (width - columns + 1))
        size = channels * rows * columns
        noise = raw_draws(sample, epoch, 12 + -(-size // 8))[12:].astype("<u8").view(np.uint8)[:size]
        values[:, top : top + rows, left : left + columns] = noise.reshape(channels, rows, columns)
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "config",
    [
        {"horizontal_flip": True}, {"crop_padding": 2}, {"erase_probability": 0.5}, EVERYTHING,
        {"erase_probability": 1.0, "erase_area": 0.01}, {"erase_probability": 1.0, "erase_area": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_image_becomes_what_its_own_draws_say(shape: tuple[int, int, int], config: dict[str, Any]) -> None:
    images, samples = pixels(60, shape), np.random.default_rng(5).permutation(10**6)[:60]
    found = augmented(images, samples, 7, **config)
    for image, sample, actual in zip(images, samples, found):
        np.testing.assert_array_equal(actual, expected(image, sample, 7, AugmentConfig(**config)))


@pytest.mark.parametrize(
    "config", [{"colour_jitter": 0.4}, {"colour_jitter": 1.0}, {**EVERYTHING, "colour_jitter": 0.3}]
)
def test_colours_are_within_a_level_of_what_float64_gives(config: dict[str, Any]) -> None:
    images, samples = pixels(40, (3, 9, 14)), np.arange(100, 140)
    found = augmented(images, samples, 2, **config)
    wanted = np.stack([expected(i, s, 2, AugmentConfig(**config)) for i, s in zip(images, samples)])
    assert np.abs(found - wanted).max() <= 0.5 + 1e-6
    assert np.abs(found.astype(int) - images).max() > 20


def test_an_image_does_not_depend_on_those_beside_it_and_changes_with_the_epoch() -> None:
    images, samples = pixels(50, (1, 28, 28)), np.arange(50)
    whole = augmented(images, samples, 1, **EVERYTHING)
    np.testing.assert_array_equal(augmented(images[33:40], samples[33:40], 1, **EVERYTHING), whole[33:40])
    np.testing.assert_array_equal(augmented(images[::-1], samples[::-1], 1, **EVERYTHING), whole[::-1])
    other = augmented(images, samples, 2, **EVERYTHING)
    assert sum(not np.array_equal(a, b) for a, b in zip(whole, other)) > 40


def test_the_frequencies_are_those_that_were_asked_for() -> None:
    image = np.zeros((1, 9, 9), np.uint8)
    image[0, 4, 3] = 255
    images, samples = np.repeat(image[None], 4000, axis=0), np.arange(4000)
    moved = augmented(images, samples, 0, horizontal_flip=True, crop_padding=1)
    places = np.array([np.argwhere(one)[0] for one in moved[:, 0]])
    downs, rights = np.bincount(places[:, 0], minlength=9), np.bincount(places[:, 1], minlength=9)
    np.testing.assert_allclose(downs[3:6] / 4000, 1 / 3, atol=0.03)
    np.testing.assert_allclose(
        rights[2:7] / 4000, [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6], atol=0.03
    )  # 3 or 5, and one off
    erased = augmented(np.full_like(images, 7), samples, 0, erase_probability=0.25, erase_area=0.2)
    assert abs((erased != 7).any(axis=(1, 2, 3)).mean() - 0.25) < 0.03


def test_without_any_of_it_images_are_handed_on_as_they_are() -> None:
    images = pixels(3, (1, 28, 28))
    assert Augmentation(AugmentConfig(), 0, described((1, 28, 28)))(images, np.arange(3), 0) is images


def test_the_data_set_itself_is_not_changed() -> None:
    images = pixels(8, (3, 9, 14))
    before = images.copy()
    augmented(images, np.arange(8), 0, **EVERYTHING, colour_jitter=0.5)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        ({"colour_jitter": 0.1}, (1, 28, 28), ["data.augment.colour_jitter=0.1", "three channels", "have 1"]),
        ({"crop_padding": 9}, (3, 9, 14), ["data.augment.crop_padding=9", "9x14"]),
    ],
)
def test_what_makes_no_sense_for_the_images_is_refused(
    config: dict[str, Any], shape: tuple[int, int, int], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        Augmentation(AugmentConfig(**config), 0, described(shape))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_train_on_the_augmented_images_of_the_epoch_and_evaluate_on_the_plain_ones(ranks: int) -> None:
    data, sampler = split(40), Sampler(40, 20, 3)
    epoch, step = 5, 1
    fed: list[np.ndarray] = []
    for rank in range(ranks):
        trained = learner(augment=EVERYTHING)
        shards = sampler.shards(epoch, step, own_shards(rank, ranks, 3), 3)
        fed += [feed["data"].asnumpy() for feed in trained._fed(data, shards, 0)]
        plain, _ = trained.feed(data, slice(0, 4))
        np.testing.assert_array_equal(plain.asnumpy()[:, 0], data.images[:4].astype(np.float64) / 255)
    augment = Augmentation(AugmentConfig(**EVERYTHING), 0, described((1, 28, 28)))
    samples = sampler._permutation(epoch)[20:]
    wanted = [augment(data.images[[sample]], np.array([sample]), epoch) / 255 for sample in samples]
    np.testing.assert_array_equal(np.concatenate(fed)[:, 0], np.concatenate(wanted))
