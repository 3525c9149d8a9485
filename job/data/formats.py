"""The data set that the configuration names, in whichever format it is kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from job.data import folder, idx
from job.data.cache import Say
from job.data.dataset import Dataset, Description, Split
from job.data.index import VERSION, Index, Stamp, kept
from job.data.pictures import Collection, Encoded, Pictures, shape_of
from job.errors import DataError

if TYPE_CHECKING:
    from job.config import DataConfig

CHUNK = 1024  # images that are counted at once
SHOWN = 3  # names of damaged pictures on the console
KINDS = {"idx": "IDX files", "folder": "folders of pictures", "record": "records"}


def load(config: DataConfig, say: Say = print) -> Dataset:
    """Find it, and fetch what is missing of Fashion-MNIST. What takes long to find out is kept in the cache.

    Args:
        config: the section ``data`` of the configuration.
        say: receives what somebody who waits has to know, a line at a time.

    Raises:
        DataError: something is missing or damaged. The message names it and says what to do.
    """
    if not config.is_pictures:
        dataset = idx.load(config, say)
        return _normalized(config, dataset, lambda: _counted(config, dataset, say))
    if config.format == "folder":
        return _decoding(config, folder.find(config, say), say)
    from job.data import record  # only now, for it imports MXNet

    return _decoding(config, record.find(config, say), say)


def summary(config: DataConfig, dataset: Dataset) -> str:
    """What was taken, in lines for the console; nothing about Fashion-MNIST where it is fetched."""
    about, lines = dataset.about, []
    if config.dir:
        images = f"{len(dataset.train.labels):,} images to train and {len(dataset.test.labels):,} to test"
        size = "x".join(map(str, about.shape))
        lines.append(f"data: {KINDS[config.format]} in {config.dir}: {images}, {size}, {len(about.classes)} classes\n")
    if config.compute_mean_std:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (about.mean, about.std))
        lines.append(f"data: of the training images the mean is {mean}, and the standard deviation {std}\n")
    if out := about.left_out:
        names = ", ".join(out[:SHOWN]) + (f" and {len(out) - SHOWN} more" if len(out) > SHOWN else "")
        lines.append(f"data: {len(out)} damaged and left out, listed in dataset.json: {names}\n")
    return "".join(lines)


def _decoding(config: DataConfig, found: Collection, say: Say) -> Dataset:
    """Pictures as a data set: all of them, or without those that a look at all has found damaged."""
    skip, side, digests = config.on_damaged == "skip", config.image_size, dict(found.digests)
    shape = shape_of(found.train, side, skip)
    parts = {"train": found.train, "test": found.test}

    def pictures(part: Encoded, chosen: np.ndarray | None = None) -> Pictures:
        return Pictures(part, shape, side is not None, config.decode_threads, chosen)

    def look() -> Index:
        say(f"data: decoding all {sum(len(part.labels) for part in parts.values()):,} pictures once")
        scans = {name: pictures(part).scan(f"decoding {name}", skip) for name, part in parts.items()}
        damaged = {f"{name}_damaged": scan.damaged for name, scan in scans.items()}
        return Index({**damaged, "histogram": scans["train"].histogram}, {})

    splits, left_out = [], list(found.damaged)
    state = found.state.part(f"{shape} {side} {skip}")
    scan = kept(config, state, look, say).arrays if skip or config.compute_mean_std else {}
    for name, part in parts.items():
        damaged = scan.get(f"{name}_damaged", np.empty(0, np.int64))
        if not len(damaged):
            splits.append(Split(pictures(part), part.labels))
            continue
        chosen = np.setdiff1d(np.arange(len(part.labels)), damaged)
        if not len(chosen):
            raise DataError(f"{config.dir}: all pictures of {name} are damaged")
        left_out += [part.name(int(index)) for index in damaged]
        digests[f"{name}_images"] = _hash(digests[f"{name}_images"].encode() + damaged.tobytes())
        digests[f"{name}_labels"] = _hash(part.labels[chosen].tobytes())
        splits.append(Split(pictures(part, chosen), part.labels[chosen]))
    about = Description(found.classes, shape, left_out=tuple(left_out))
    return _normalized(config, Dataset(splits[0], splits[1], about, digests), lambda: scan["histogram"])


def _counted(config: DataConfig, dataset: Dataset, say: Say) -> np.ndarray:
    """How often each channel of the training images has each value, (channels, 256)."""
    images, shape = dataset.train.images, dataset.about.shape

    def count() -> Index:
        found = np.zeros((shape[0], 256), np.int64)
        for first in range(0, len(images), CHUNK):
            chunk = images[first : first + CHUNK].reshape(-1, *shape)
            found += [np.bincount(chunk[:, channel].ravel(), minlength=256) for channel in range(shape[0])]
        return Index({"histogram": found}, {})

    digest = dataset.digests["train_images"]
    return kept(config, Stamp(digest, f"{VERSION} {digest} {shape}"), count, say).arrays["histogram"]


def _normalized(config: DataConfig, dataset: Dataset, histogram: Callable[[], np.ndarray]) -> Dataset:
    """With the mean and standard deviation that the configuration says."""
    channels = dataset.about.shape[0]
    mean, std = mean_and_std(histogram()) if config.compute_mean_std else (tuple(config.mean), tuple(config.std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise DataError(
                f"data.{name} has {len(values)} numbers, and an image has {channels} channel{'s' * (channels > 1)};"
                " give one for each channel, or one for all"
            )
    return dataset._replace(about=replace(dataset.about, mean=mean, std=std))


def mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel, with pixels in [0, 1]. From whole numbers of any size, and rounded once.

    Args:
        histogram: how often a channel has a value, whole numbers (channels, 256).

    Raises:
        DataError: a channel has only one value.
    """
    mean, std = [], []
    for channel, counts in enumerate(histogram.tolist()):
        count = sum(counts)
        total = sum(value * times for value, times in enumerate(counts))
        squares = sum(value * value * times for value, times in enumerate(counts))
        spread = count * squares - total * total
        if not spread:
            raise DataError(
                f"channel {channel} has the same value in all training images, so that there is no standard deviation"
                " to divide by; give data.mean and data.std, without data.compute_mean_std"
            )
        mean.append(total / (255 * count))
        std.append(math.sqrt(spread) / (255 * count))
    return tuple(mean), tuple(std)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
