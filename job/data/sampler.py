"""Which samples each rank sees at each step: pure index arithmetic, without state.

One permutation of the data set per (seed, epoch) is cut into batches, a batch into micro-batches, and a micro-batch
into one share per rank. Every cut is into parts whose sizes differ by at most one. So the global batch of a step holds
the same samples for any number of ranks, and a run can go on from any step with any number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, int64 of shape (samples,): the same on all ranks and machines.

    Sorting the raw output of the counter-based Philox generator (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) uses nothing but its stream, which numpy keeps across versions; not so ``Generator.permutation``.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(samples)
    return np.argsort(keys, kind="stable")


class Sampler:
    """The global batches of a data set of ``samples`` samples.

    An epoch has ``ceil(samples / global_batch)`` steps, whose batches differ in size by at most one: 60,000 samples at
    256 make 235 batches of 256 or 255, never a tiny last one. No sample is dropped or repeated.
    """

    def __init__(self, samples: int, global_batch: int, seed: int) -> None:
        self.samples = samples
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

    def share(self, epoch: int, step: int, rank: int, size: int, micro: int = 0, micros: int = 1) -> np.ndarray:
        """The samples, as int64 indices, of one rank in micro-batch ``micro`` of ``micros`` of a step of an epoch."""
        span = self.batch(step).part(micro, micros).part(rank, size)
        return self._permutation(epoch)[span.start : span.stop]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self.samples, self.seed, epoch))
        return self._order[1]
