"""What a step sums over its shards, its micro-batches and all ranks: the gradients, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mxnet as mx
import numpy as np

from job.data.sampler import Span
from job.distributed.comm import Comm
from job.networks.kernels import HostViews
from job.training.exact import ExactSum

# In the words of the error about a number that cannot be summed.
_KINDS = (_LOSS, _GRADIENT, _CORRECT, _MOMENTS) = (
    "the loss",
    "the gradient",
    "the number of right answers",
    "a mean or variance of BatchNorm",
)


class StepSums:
    """The sums of a step, in one vector that is summed over ranks at once, and exactly: in no order.

    Args:
        comm: the ranks.
        gradients: of each parameter the arrays that backward fills, one for each shard of this rank.
        moments: of each BatchNorm whose shards have statistics of their own, how many numbers these are in a step.
        addends: how many numbers are added to each place at most: the shards of a step, over all ranks and
            micro-batches.
        dtype: float32 or float64, of the gradients.
    """

    def __init__(
        self,
        comm: Comm,
        gradients: Sequence[Sequence[mx.nd.NDArray]],
        moments: Sequence[int],
        addends: int,
        dtype: str,
    ) -> None:
        ends = np.cumsum([0, *(arrays[0].size for arrays in gradients), 1, 1, 1, *moments]).tolist()
        spans = [Span(start, stop) for start, stop in zip(ends, ends[1:])]
        self._gradients, (self._votes, self._loss, self._correct, *self._moments) = (
            spans[: len(gradients)],
            spans[len(gradients) :],
        )
        # The largest first. They are those of dense layers, which are there while the convolutions are computed.
        self._by_size = sorted(zip(self._gradients, gradients), key=lambda pair: -len(pair[0]))
        self._memory = HostViews() if gradients[0][0].context.device_type == "cpu" else None
        self._vector = ExactSum(comm, ends[-1], _KINDS, addends, dtype)
        self._scale = 1.0
        self.limit = self._vector.limit  # of the size of a number that can be summed

    def start(self, stop: bool, scale: float = 1.0) -> None:
        """A step begins.

        Args:
            stop: this rank's vote to end the run after it.
            scale: of the loss that gradients are of, a power of two. They are summed without it.
        """
        self._scale = scale
        self._vector.clear()
        self._vector.add(_LOSS, self._votes.start, np.array([float(stop)]))

    def add(self, outcomes: Sequence[Sequence[mx.nd.NDArray]], global_batch: int) -> None:
        """Add what a micro-batch has given, as soon as it is there.

        Args:
            outcomes: of each of this rank's shards the sum of its samples' losses, and how many of them are classified
                right; both (1,).
            global_batch: the number of samples in the batch, over all ranks and micro-batches.
        """
        for shard, (losses, correct) in enumerate(outcomes):
            self._vector.add(_LOSS, self._loss.start, self._values(_LOSS, shard, losses) / global_batch)
            self._vector.add(_CORRECT, self._correct.start, self._values(_CORRECT, shard, correct))
        for place, gradients in self._by_size:
            for shard, gradient in enumerate(gradients):
                values = self._values(f"gradient {place.start}", shard, gradient)
                self._vector.add(_GRADIENT, place.start, values / self._scale if self._scale != 1 else values)

    def add_moments(self, layer: int, first: int, values: np.ndarray) -> None:
        """Add ``values`` (n,) of a shard to the moments of a BatchNorm, from their place ``first`` on."""
        self._vector.add(_MOMENTS, self._moments[layer].start + first, values)

    def reduce(self) -> None:
        """Add up what all ranks have added. Waits for them."""
        self._vector.reduce()

    @property
    def refused(self) -> dict[str, int]:
        """What could not be summed, in words, and how many numbers of it: not finite, or larger than ``limit``."""
        return self._vector.refused

    @property
    def overflowed(self) -> bool:
        """Whether it was gradients alone that could not be summed: a smaller scale may mend that."""
        return {*self.refused} == {_GRADIENT}

    @property
    def stops(self) -> bool:
        """Whether a rank has voted to end the run."""
        return self._read(self._votes)[0] > 0

    @property
    def loss(self) -> float:
        """The mean over the samples of the global batch."""
        return float(self._read(self._loss)[0])

    @property
    def correct(self) -> float:
        """How many samples of the global batch are classified right."""
        return float(self._read(self._correct)[0])

    @property
    def gradient_norm(self) -> float:
        """The L2 norm of all gradients together."""
        return math.sqrt(sum(self._vector.sum_of_squares(*place) for place in self._gradients))

    def write_gradients(self, arrays: Sequence[mx.nd.NDArray], scale: float) -> None:
        """Fill an array for each parameter, which nobody computes or reads now, with its gradient times ``scale``."""
        for number, (place, array) in enumerate(zip(self._gradients, arrays)):
            if self._memory:
                self._vector.write(place.start, self._memory.one("sums", number, array).ravel(), scale)
            else:
                values = np.empty(array.shape, array.dtype)
                self._vector.write(place.start, values.ravel(), scale)
                array[:] = values

    def moments(self) -> list[np.ndarray]:
        """Of each BatchNorm whose shards have statistics of their own, the sums over shards, in float64."""
        return [self._read(place) for place in self._moments]

    def _read(self, place: Span) -> np.ndarray:
        return self._vector.read(*place)

    def _values(self, name: str, shard: int, array: mx.nd.NDArray) -> np.ndarray:
        """The numbers of an array (n,), when they are there; without a copy on the CPU."""
        array.wait_to_read()
        return (self._memory.one(name, shard, array) if self._memory else array.asnumpy()).ravel()
