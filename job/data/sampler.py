"""Which samples each rank sees at each step: pure index arithmetic, without state.

One permutation of the data set per (seed, epoch) is cut into batches, a batch into micro-batches, and a micro-batch
into shards, of which each rank has a range. Every cut is into parts whose sizes differ by at most one. So the shards of
a step hold the same samples for any number of ranks, and a run can go on from any step with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np

from job.errors import UsageError


class Span(NamedTuple):
    """The half-open range ``start <= i < stop``."""

    start: int
    stop: int

    def part(self, index: int, parts: int) -> Span:
        """Part ``index`` of this span cut into ``parts`` parts, the longer ones first."""
        length, longer = divmod(self.stop - self.start, parts)
        start = self.start + index * length + min(index, longer)
        return Span(start, start + length + (index < longer))

    def __len__(self) -> int:  # a NamedTuple's own length would be 2
        return self.stop - self.start


class Shard(NamedTuple):
    """The part of a global batch that is computed as one, whoever computes it."""

    samples: np.ndarray  # int64 indices into the data set
    first: int  # the place of the first one in the global batch
    epoch: int = 0


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, int64 of shape (samples,): the same on all ranks and machines.

    Sorting the raw output of the counter-based Philox generator (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) uses nothing but its stream, which numpy keeps across versions; not so ``Generator.permutation``.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(samples)
    return np.argsort(keys, kind="stable")


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on and those to validate on, int64 of shapes (n,) and (m,), both rising.

    Of each class that part of its samples is held out, rounded down, so that at least one is left. Which ones, follows
    from the seed and the labels (n + m,), and not from the seed of the run: runs with other seeds choose by the same
    samples.

    Raises:
        UsageError: no class has enough samples for that.
    """
    order = np.argsort(
        np.random.Philox(key=np.array([seed, 2**64 - 1], np.uint64)).random_raw(len(labels)), kind="stable"
    )
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels) if fraction else ():
        of_class = order[labels[order] == label]
        held[of_class[: int(fraction * len(of_class))]] = True
    if fraction and not held.any():
        raise UsageError(f"data.validation_fraction={fraction:g}: is not one sample of any class; give a larger one")
    return np.flatnonzero(~held), np.flatnonzero(held)


class Sampler:
    """The global batches of a data set of ``samples`` samples, or of those with the indices ``kept`` (samples,).

    An epoch has ``ceil(samples / global_batch)`` steps, whose batches differ in size by at most one: 60,000 samples at
    256 make 235 batches of 256 or 255, never a tiny last one. No sample is dropped or repeated.
    """

    def __init__(self, samples: int, global_batch: int, seed: int, kept: Optional[np.ndarray] = None) -> None:
        self.samples = samples
        self._kept = kept
        self.seed = seed
        self.steps_per_epoch = -(-samples // global_batch)
        self._order = (-1, np.empty(0, np.int64))

    @property
    def smallest_batch(self) -> int:
        """The fewest samples that a global batch holds."""
        return self.samples // self.steps_per_epoch

    def batch(self, step: int) -> Span:
        """The global batch of step ``step`` of an epoch, as a span of the epoch's permutation."""
        return Span(0, self.samples).part(step, self.steps_per_epoch)

    def shards(self, epoch: int, step: int, own: range, shards: int, micro: int = 0, micros: int = 1) -> list[Shard]:
        """The shards with numbers ``own``, of ``shards``, in micro-batch ``micro`` of ``micros`` of a step."""
        batch, order = self.batch(step), self._permutation(epoch)
        spans = [batch.part(micro, micros).part(index, shards) for index in own]
        return [Shard(order[span.start : span.stop], span.start - batch.start, epoch) for span in spans]

    def batches(
        self, steps: range, own: range, shards: int, micros: int = 1
    ) -> Iterator[tuple[int, list[list[Shard]]]]:
        """The numbers of ``steps`` of a run, each with the shards ``own`` of its micro-batches."""
        for step in steps:
            epoch, index = divmod(step, self.steps_per_epoch)
            yield step, [self.shards(epoch, index, own, shards, micro, micros) for micro in range(micros)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = permutation(self.samples, self.seed, epoch)
            self._order = (epoch, order if self._kept is None else self._kept[order])
        return self._order[1]


def own_shards(rank: int, size: int, shards: int) -> range:
    """The numbers of the shards that a rank computes: a contiguous range."""
    return range(*Span(0, shards).part(rank, size))
