"""The description of a data set, as a run's folder has it, and what is fed by it."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest

from job.data.dataset import FASHION_MNIST, Description, Split
from job.training.learner import Feed

COLOUR = Description(("cat", "dog"), (3, 5, 4), (0.5, 0.25, 0.125), (0.5, 1.0, 2.0))


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
