"""What a step sums over its shards, its micro-batches and all ranks: the gradients, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm
from job.operators.kernels import HostViews
from job.training.exact import ExactSum, words
from job.training.rounded import RoundedSum

# In the words of the error about a number that cannot be summed.
_KINDS = (_LOSS, _GRADIENT, _CORRECT, _MOMENTS) = (
    "the loss",
    "the gradient",
    "the number of right answers",
    "a mean or variance of BatchNorm",
)
_VOTES_PLACE, _LOSS_PLACE, _CORRECT_PLACE, _MOMENTS_PLACE = range(4)  # in the last vector
# So large that the bytes take far longer than the latency of one more sum, and so small that little is left for after
# backward. Not tuned: `python -m benchmarks.buckets` compares others. What is less than two of these is not cut.
BUCKET_BYTES = 2**23


class _Place(NamedTuple):
    """Where the gradient of a parameter is summed."""

    vector: ExactSum
    start: int
    stop: int


class StepSums:
    """The sums of a step, exact: in no order.

    The gradients of a large network are summed in buckets (Li et al., 2020, "PyTorch Distributed"). Backward computes
    those of the last layers first; ranks sum them while it goes on with the layers before. The last bucket has the
    first layers, and all that is no gradient.

    Args:
        comm: the ranks.
        gradients: of each parameter, in the order of the network, the arrays that backward fills: one for each shard of
            this rank.
        moments: of each BatchNorm whose shards have statistics of their own, how many numbers these are in a step.
        addends: how many numbers are added to each place at most: the shards of a step, over all ranks and
            micro-batches.
        dtype: float32 or float64, of the gradients.
        bucket_bytes: the least that a bucket has.
        in_float16: whether ranks sum the gradients in float16, and not exactly (:mod:`job.training.rounded`).
    """

    def __init__(
        self,
        comm: Comm,
        gradients: Sequence[Sequence[mx.nd.NDArray]],
        moments: Sequence[int],
        addends: int,
        dtype: str,
        bucket_bytes: int = BUCKET_BYTES,
        in_float16: bool = False,
    ) -> None:
        self._arrays, self._scale = gradients, 1.0
        self._memory = HostViews() if gradients[0][0].context.device_type == "cpu" else None
        ends = np.cumsum([_MOMENTS_PLACE, *moments]).tolist()
        self._moments = list(zip(ends, ends[1:]))
        sizes = [arrays[0].size for arrays in gradients]
        # In float16 one: which buckets Horovod would put into one sum depends on timing, and with it the order of it.
        buckets = cut(sizes, sum(sizes) if in_float16 else bucket_bytes // (8 * words(dtype)))
        if in_float16:  # what is no gradient stays exact, in a vector of its own
            buckets.append([])
        places: dict[int, _Place] = {}
        self._buckets: list[tuple[ExactSum, list[int]]] = []
        for bucket in buckets:
            start = ends[-1] if bucket is buckets[-1] else 0
            stops = np.cumsum([start, *(sizes[number] for number in bucket)]).tolist()
            vector = (
                RoundedSum(comm, stops[-1], _GRADIENT, addends, dtype, lambda: self._scale)
                if in_float16 and bucket
                else ExactSum(comm, stops[-1], _KINDS, addends, dtype)
            )
            places.update({number: _Place(vector, *span) for number, *span in zip(bucket, stops, stops[1:])})
            # The largest first. They are those of dense layers, which are there while the convolutions are computed.
            self._buckets.append((vector, sorted(bucket, key=lambda number: -sizes[number])))
        self._last = self._buckets[-1][0]
        self._places = [places[number] for number in range(len(sizes))]
        self.limit = self._last.limit  # of the size of a number that can be summed

    def start(self, stop: bool, scale: float = 1.0) -> None:
        """A step begins.

        Args:
            stop: this rank's vote to end the run after it.
            scale: of the loss that gradients are of, a power of two. They are summed without it.
        """
        self._scale = scale
        for vector, _ in self._buckets:
            vector.clear()
        self._last.add(_LOSS, _VOTES_PLACE, np.array([float(stop)]))

    def add(self, outcomes: Sequence[Sequence[mx.nd.NDArray]], global_batch: int, last: bool) -> None:
        """Add what a micro-batch has given, as soon as it is there.

        Args:
            outcomes: of each of this rank's shards the sum of its samples' losses, and how many of them are classified
                right; both (1,).
            global_batch: the number of samples in the batch, over all ranks and micro-batches.
            last: whether no other micro-batch follows.
        """
        for shard, (losses, correct) in enumerate(outcomes):
            self._last.add(_LOSS, _LOSS_PLACE, self._values(_LOSS, shard, losses) / global_batch)
            self._last.add(_CORRECT, _CORRECT_PLACE, self._values(_CORRECT, shard, correct))
        for vector, numbers in self._buckets:
            for number in numbers:
                self._add_gradient(number)
            if last and vector is not self._last:
                vector.begin()

    def add_moments(self, layer: int, first: int, values: np.ndarray) -> None:
        """Add ``values`` (n,) of a shard to the moments of a BatchNorm, from their place ``first`` on."""
        self._last.add(_MOMENTS, self._moments[layer][0] + first, values)

    def reduce(self) -> None:
        """Add up what all ranks have added. Waits for them."""
        self._last.begin()
        for vector, _ in self._buckets:
            vector.finish()

    @property
    def refused(self) -> dict[str, int]:
        """What could not be summed, in words, and how many numbers of it: not finite, or larger than ``limit``."""
        counts = {kind: sum(vector.refused.get(kind, 0) for vector, _ in self._buckets) for kind in _KINDS}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def overflowed(self) -> bool:
        """Whether it was gradients alone that could not be summed: a smaller scale may mend that."""
        return {*self.refused} == {_GRADIENT}

    @property
    def stops(self) -> bool:
        """Whether a rank has voted to end the run."""
        return self._number(_VOTES_PLACE) > 0

    @property
    def loss(self) -> float:
        """The mean over the samples of the global batch."""
        return self._number(_LOSS_PLACE)

    @property
    def correct(self) -> float:
        """How many samples of the global batch are classified right."""
        return self._number(_CORRECT_PLACE)

    @property
    def gradient_norm(self) -> float:
        """The L2 norm of all gradients together."""
        return math.sqrt(sum(vector.sum_of_squares(start, stop) for vector, start, stop in self._places))

    def write_gradients(self, arrays: Sequence[mx.nd.NDArray], scale: float) -> None:
        """Fill an array for each parameter, which nobody computes or reads now, with its gradient times ``scale``."""
        for number, (place, array) in enumerate(zip(self._places, arrays)):
            if self._memory:
                place.vector.write(place.start, self._memory.one("sums", number, array).ravel(), scale)
            else:
                values = np.empty(array.shape, array.dtype)
                place.vector.write(place.start, values.ravel(), scale)
                array[:] = values

    def moments(self) -> list[np.ndarray]:
        """Of each BatchNorm whose shards have statistics of their own, the sums over shards, in float64."""
        return [self._last.read(*place) for place in self._moments]

    def _number(self, place: int) -> float:
        return float(self._last.read(place, place + 1)[0])

    def _add_gradient(self, number: int) -> None:
        """Wait for the gradients of a parameter of this rank's shards, and add them."""
        place = self._places[number]
        for shard, gradient in enumerate(self._arrays[number]):
            values = self._values(f"gradient {number}", shard, gradient)
            place.vector.add(_GRADIENT, place.start, values / self._scale if self._scale != 1 else values)

    def _values(self, name: str, shard: int, array: mx.nd.NDArray) -> np.ndarray:
        """The numbers of an array (n,), when they are there; without a copy on the CPU."""
        array.wait_to_read()
        return (self._memory.one(name, shard, array) if self._memory else array.asnumpy()).ravel()


def cut(sizes: Sequence[int], least: int) -> list[list[int]]:
    """Cut the parameters, from the last one to the first, into buckets of ``least`` numbers or more, but none if less.

    Args:
        sizes: of each parameter, in the order of the network.
        least: how many numbers are worth a sum over ranks of their own.

    Returns:
        The numbers of the parameters in each bucket.
    """
    buckets: list[list[int]] = [[]]
    inside, left = 0, sum(sizes)
    for number in reversed(range(len(sizes))):
        buckets[-1].append(number)
        inside, left = inside + sizes[number], left - sizes[number]
        if inside >= least and left >= least:
            buckets.append([])
            inside = 0
    return buckets
