"""Whether an exported model says what the run's network says: of the same pictures, and of the whole test set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mxnet as mx
import numpy as np
from rich.console import Console
from rich.progress import track

from job.data.dataset import Split
from job.errors import JobError
from job.exporting.graph import IMAGES, network
from job.exporting.served import Model, as_decoded
from job.exporting.trained import Trained
from job.training.feed import Feed

PICTURES, TOLERANCE = 1000, 1e-5
_BATCH = 100


class Agreement(NamedTuple):
    """What a comparison has found."""

    pictures: int  # compared
    difference: float  # the largest of a probability
    right: int  # of the whole test set
    total: int


def compare(model: Model, trained: Trained, test: Split) -> Agreement:
    """Ask both about :data:`PICTURES` pictures, spread over the test set, and the exported model about all of it.

    The run's network is fed as in training, and not by anything that an export has.

    Raises:
        JobError: a probability differs by more than :data:`TOLERANCE`, or the accuracy is not the run's.
    """
    total = len(test.labels)
    chosen = np.unique(np.linspace(0, total - 1, PICTURES).astype(np.int64))
    reference = _Network(trained)
    difference = 0.0
    for part in _batches(chosen, "comparing"):
        found, expected = model.probabilities(_pixels(test, part, trained)), reference(test, part)
        if found.shape != expected.shape:
            raise JobError(f"the exported model gives {found.shape}, and the run's network {expected.shape}")
        apart = np.abs(found - expected)
        if not apart.max() <= TOLERANCE:  # not "more": it may be NaN
            raise JobError(
                f"the exported model is not the run's: a probability differs by {apart.max():.1e} (more than"
                f" {TOLERANCE:g}) for test picture {part[apart.max(axis=1).argmax()]}; nothing was written"
            )
        difference = max(difference, float(apart.max()))
    right, close = 0, 0
    for part in _batches(np.arange(total), "evaluating"):
        found = model.probabilities(_pixels(test, part, trained))
        right += int((found.argmax(axis=1) == test.labels[part]).sum())
        first_two = np.sort(found, axis=1)[:, -2:]
        close += int((first_two[:, 1] - first_two[:, 0] <= 2 * TOLERANCE).sum())  # rounding may decide these
    if trained.accuracy is not None and abs(right - trained.accuracy * total) > close + 0.5:
        raise JobError(
            f"the exported model has a test accuracy of {right / total:.4f}, and the run measured"
            f" {trained.accuracy:.4f} at step {trained.step}; is this the run's data? Nothing was written"
        )
    return Agreement(len(chosen), difference, right, total)


class _Network:
    """The run's network and the run's way to feed it."""

    def __init__(self, trained: Trained) -> None:
        graph = network(trained)
        self._feed = Feed(mx.cpu(), trained.model.weights_dtype, trained.about)
        self._operator = mx.nd.CachedOp(graph.symbol)
        self._order = graph.symbol.list_inputs()
        self._arrays = {name: mx.nd.array(array, dtype=array.dtype) for name, array in graph.arrays.items()}

    def __call__(self, split: Split, samples: np.ndarray) -> np.ndarray:
        images, _ = self._feed(split, samples)
        logits = self._operator(*(images if name == IMAGES else self._arrays[name] for name in self._order))
        probabilities: np.ndarray = mx.nd.softmax(logits, axis=1).asnumpy()
        return probabilities


def _pixels(split: Split, samples: np.ndarray, trained: Trained) -> np.ndarray:
    return as_decoded(split.images[samples], trained.about)


def _batches(samples: np.ndarray, what: str) -> Iterator[np.ndarray]:
    """Samples in turn, with a progress bar on a terminal."""
    console = Console(stderr=True)
    parts = np.array_split(samples, -(-len(samples) // _BATCH))
    yield from track(parts, what, console=console, transient=True, disable=not console.is_terminal)
