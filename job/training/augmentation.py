"""Augmentation: each training sample is changed anew in each epoch, whoever trains on it.

What a sample becomes follows from (seed, epoch, its index in the training set) alone. The draws of a sample are the
output of the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
for a counter that holds the sample's index, so that they need no state and no order. numpy has the same generator: its
``Philox(key=[seed, 2**63 + epoch], counter=[0, sample, 0, 0])`` gives the draws of a sample one by one, but takes
longer to be made than a sample to be trained on.

A pass over the bytes of a batch does it all, in the order colour, flip, shifted crop, erasing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from job.config import AugmentConfig
from job.data.dataset import Description
from job.errors import UsageError
from job.operators.compiled import compiled

_SMALLEST_ERASED = 0.02  # of the area, and the flattest shape: of Zhong et al., section 3.1
_FLATTEST = 0.3
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, for red, green and blue

# The draws of a sample, by their places; those from _FILL on are the bytes that an erased rectangle is filled with.
_FLIP, _DOWN, _RIGHT, _ERASE, _AREA, _SHAPE, _TOP, _LEFT, _BRIGHTNESS, _CONTRAST, _SATURATION = range(11)
_FILL = 12


class Augmentation:
    """Changes training images as configured.

    Args:
        config: what is done to them.
        seed: of the run.
        about: the data set.

    Raises:
        UsageError: the images cannot be changed in that way.
    """

    def __init__(self, config: AugmentConfig, seed: int, about: Description) -> None:
        require_fit(config, about)
        self._config = config
        self._seed = seed
        self._shape = about.shape

    def __call__(self, images: Any, samples: np.ndarray, epoch: int) -> Any:
        """Images as the epoch has them.

        Args:
            images: uint8 (n, height, width) or (n, channels, height, width); they stay as they are.
            samples: the indices (n,) of these samples in the training set.
            epoch: counted from 0.
        """
        config = self._config
        if not config.changes:
            return images
        changed = np.empty((len(images), *self._shape), np.uint8)
        key = np.array([self._seed, 2**63 + epoch], np.uint64)
        sources = np.ascontiguousarray(images).reshape(changed.shape)
        if config.colour_jitter:
            sources = sources.copy()
            _colour(sources, samples, key, config.colour_jitter)
        _place(sources, samples, key, config.horizontal_flip, config.crop_padding, changed)
        if config.erase_probability:
            _erase(changed, samples, key, config.erase_probability, config.erase_area)
        return changed.reshape(images.shape)


def require_fit(config: AugmentConfig, about: Description) -> None:
    """Refuse what makes no sense for these images.

    Raises:
        UsageError: naming the key.
    """
    channels, height, width = about.shape
    if config.colour_jitter and channels != 3:
        raise UsageError(
            f"data.augment.colour_jitter={config.colour_jitter:g}: is for images with three channels, red, green and"
            f" blue; these have {channels}"
        )
    if config.crop_padding >= min(height, width):
        raise UsageError(
            f"data.augment.crop_padding={config.crop_padding}: could move an image of {height}x{width} out of sight"
        )


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@compiled(reorders_sums=False)
def _high(a, b):  # type: ignore[no-untyped-def]
    """The upper 64 bits of the product of two words."""
    low_a, high_a, low_b, high_b = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    first = high_a * low_b + ((low_a * low_b) >> _HALF)
    second = low_a * high_b + (first & _LOW)
    return high_a * high_b + (first >> _HALF) + (second >> _HALF)


@compiled(reorders_sums=False)
def _block(key, sample, number, words):  # type: ignore[no-untyped-def]
    """Four draws of a sample, uint64, of its block ``number``."""
    one, two, three, four = np.uint64(number + 1), np.uint64(sample), np.uint64(0), np.uint64(0)
    first_key, second_key = key[0], key[1]
    for _ in range(10):
        high_one, low_one = _high(np.uint64(0xD2E7470EE14C6C93), one), np.uint64(0xD2E7470EE14C6C93) * one
        high_three, low_three = _high(np.uint64(0xCA5A826395121157), three), np.uint64(0xCA5A826395121157) * three
        one, two, three, four = high_three ^ two ^ first_key, low_three, high_one ^ four ^ second_key, low_one
        first_key += np.uint64(0x9E3779B97F4A7C15)
        second_key += np.uint64(0xBB67AE8584CAA73B)
    words[0], words[1], words[2], words[3] = one, two, three, four


@compiled(reorders_sums=False)
def _draws(key, sample, words):  # type: ignore[no-untyped-def]
    """Those before _FILL, each as a number of [0, 1)."""
    block = np.empty(4, np.uint64)
    for number in range(words.size // 4):
        _block(key, sample, number, block)
        for place in range(4):
            words[4 * number + place] = np.float64(block[place] >> np.uint64(11)) * 2.0**-53


@compiled(reorders_sums=False)
def _place(images, samples, key, flips, padding, out):  # type: ignore[no-untyped-def]
    """Write images (n, channels, height, width) mirrored or not, and moved; what comes into sight is black."""
    count, channels, height, width = images.shape
    draws = np.empty(_FILL)
    for i in range(count):
        _draws(key, samples[i], draws)
        flipped = flips and draws[_FLIP] < 0.5
        down = np.int64(draws[_DOWN] * (2 * padding + 1)) - padding
        right = np.int64(draws[_RIGHT] * (2 * padding + 1)) - padding
        first, last = max(0, right), min(width, width + right)
        for c in range(channels):
            for y in range(height):
                row, source = out[i, c, y], y - down
                row[:] = 0
                if 0 <= source < height:
                    seen = images[i, c, source, first - right : last - right]
                    if flipped:
                        seen = images[i, c, source, width - last + right : width - first + right][::-1]
                    row[first:last] = seen


@compiled(reorders_sums=False)
def _erase(images, samples, key, probability, largest):  # type: ignore[no-untyped-def]
    """Random erasing (Zhong et al., 2020): a rectangle of random bytes, cut to the image where it is too long."""
    count, channels, height, width = images.shape
    draws, block = np.empty(_FILL), np.empty(4, np.uint64)
    for i in range(count):
        _draws(key, samples[i], draws)
        if draws[_ERASE] >= probability:
            continue
        smallest = min(_SMALLEST_ERASED, largest)
        area = (smallest + draws[_AREA] * (largest - smallest)) * (height * width)
        shape = _FLATTEST + draws[_SHAPE] * (1 / _FLATTEST - _FLATTEST)
        rows = min(height, max(1, np.int64(np.rint(np.sqrt(area * shape)))))
        columns = min(width, max(1, np.int64(np.rint(np.sqrt(area / shape)))))
        top = np.int64(draws[_TOP] * (height - rows + 1))
        left = np.int64(draws[_LEFT] * (width - columns + 1))
        used = 0
        for c in range(channels):
            for y in range(top, top + rows):
                for x in range(left, left + columns):
                    if used % 32 == 0:
                        _block(key, samples[i], (_FILL + used // 8) // 4, block)
                    images[i, c, y, x] = np.uint8(block[used % 32 // 8] >> np.uint64(used % 8 * 8) & np.uint64(255))
                    used += 1


@compiled(reorders_sums=False)
def _colour(images, samples, key, strength):  # type: ignore[no-untyped-def]
    """Brightness, contrast and saturation, in this order, each times a factor of [1 - strength, 1 + strength)."""
    count, _, height, width = images.shape
    draws, pixel, red, green, blue = np.empty(_FILL), np.empty(3), _LUMA[0], _LUMA[1], _LUMA[2]
    for i in range(count):
        _draws(key, samples[i], draws)
        brightness = 1 + strength * (2 * draws[_BRIGHTNESS] - 1)
        contrast = 1 + strength * (2 * draws[_CONTRAST] - 1)
        saturation = 1 + strength * (2 * draws[_SATURATION] - 1)
        mean = 0.0
        for y in range(height):
            for x in range(width):
                for c in range(3):
                    pixel[c] = min(brightness * images[i, c, y, x], 255.0)
                mean += red * pixel[0] + green * pixel[1] + blue * pixel[2]
        mean /= height * width
        for y in range(height):
            for x in range(width):
                for c in range(3):
                    value = min(brightness * images[i, c, y, x], 255.0)
                    pixel[c] = min(max(mean + contrast * (value - mean), 0.0), 255.0)
                grey = red * pixel[0] + green * pixel[1] + blue * pixel[2]
                for c in range(3):
                    value = min(max(grey + saturation * (pixel[c] - grey), 0.0), 255.0)
                    images[i, c, y, x] = np.uint8(np.rint(value))
