"""The description of a data set, as a run's folder has it, and what is fed by it."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest

from job.data.dataset import FASHION_MNIST, Dataset, Description, Split
from job.training.feed import Feed

COLOUR = Description(("cat", "dog"), (3, 5, 4), (0.5, 0.25, 0.125), (0.5, 1.0, 2.0), "dark", ("x.png",))


@pytest.mark.parametrize("about", [COLOUR, FASHION_MNIST])
def test_a_description_survives_json(about: Description) -> None:
    assert Description.from_mapping(json.loads(about.to_json())) == about


@pytest.mark.parametrize("about", [COLOUR, Description(("a", "b"), (3, 5, 4))])
def test_each_channel_is_scaled_with_its_own_mean_and_deviation(about: Description) -> None:
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8), np.array([0, 1, 1, 0, 1, 0]))
    images, labels = Feed(mx.cpu(), "float64", about)(split, np.array([4, 0]))
    expected = split.images[[4, 0]] / 255.0
    if about is COLOUR:
        for channel in range(3):
            expected[:, channel] = (expected[:, channel] - about.mean[channel]) / about.std[channel]
    np.testing.assert_allclose(images.asnumpy(), expected, rtol=1e-12)
    assert labels.asnumpy().tolist() == [1, 0]


def some_data() -> Dataset:
    images = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    return Dataset(Split(images, np.arange(10) % 3), Split(images[:4], np.arange(4)), FASHION_MNIST, {})


def test_held_out_samples_are_a_split_of_their_own_for_places_and_slices() -> None:
    held = some_data().holding_out(np.array([1, 5, 8])).validation
    assert held and len(held.images) == 3
    assert held.labels.tolist() == [1, 2, 2]
    assert held.images[slice(1, 3)][:, 0, 0].tolist() == [5, 8]
    assert held.images[np.array([2, 0])][:, 0, 0].tolist() == [8, 1]


def test_with_a_validation_set_the_test_set_waits_for_the_last_evaluation() -> None:
    data = some_data()
    assert [name for name, _ in data.measured(last=False)] == ["test"]
    assert [name for name, _ in data.measured(last=True)] == ["test"]
    data = data.holding_out(np.array([3]))
    assert [name for name, _ in data.measured(last=False)] == ["validation"]
    assert [name for name, _ in data.measured(last=True)] == ["validation", "test"]
    assert data.measured(last=True)[1][1] is data.test


def test_holding_out_nothing_leaves_the_data_as_it_is() -> None:
    assert some_data().holding_out(np.empty(0, np.int64)).validation is None
