"""The sums of a step, on ranks that are threads: whatever is summed with what, and when, the numbers are numpy's."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, NamedTuple

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.distributed.comm import Comm
from job.errors import PeerLostError
from job.training.step_sums import BUCKET_BYTES, StepSums, cut

PATIENCE = 60.0
SIZES = [307, 300, 40, 2, 500, 90]  # of the parameters, in the order of the network
MOMENTS = [6, 4]
SHARDS, MICROS, BATCH = 6, 2, 64
WHOLE, SMALL = 2**40, 8 * 300  # bytes of a bucket: that of a network that is not cut, and one for 300 numbers


class Meeting:
    """Where ranks that are threads hand over what they sum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._handed: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self._changed = threading.Condition()

    def hand_over(self, key: tuple[str, int], values: np.ndarray) -> None:
        with self._changed:
            self._handed[key].append(values)
            self._changed.notify_all()

    def total(self, key: tuple[str, int]) -> np.ndarray:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._handed[key]) == self.size, PATIENCE), key
        return np.asarray(np.sum(self._handed[key], axis=0))


class Rank(Comm):
    """One of them. Remembers which sums it began."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self.begun: list[str] = []

    def begin_sum(self, values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        key = (name, self.begun.count(name))
        self.begun.append(name)
        self._meeting.hand_over(key, values.copy())
        return lambda: self._meeting.total(key)


class Step(NamedTuple):
    """What a step gives, by micro-batch and shard: numbers of which sums are exact in float64."""

    gradients: list[np.ndarray]  # of each parameter (micros, shards, size)
    losses: np.ndarray  # (micros, shards)
    correct: np.ndarray
    moments: list[np.ndarray]  # of each BatchNorm (micros, shards, size)

    @classmethod
    def drawn(cls, seed: int) -> Step:
        random = np.random.default_rng(seed)

        def numbers(*shape: int) -> np.ndarray:
            return random.integers(-(2**20), 2**20, (MICROS, SHARDS, *shape)) / 2.0**20

        return cls([numbers(n) for n in SIZES], numbers(), np.abs(numbers()), [numbers(n // MICROS) for n in MOMENTS])


def take(sums: StepSums, arrays: list[list[mx.nd.NDArray]], own: range, step: Step, votes: bool = False) -> None:
    """Sum what the shards ``own`` give in a step, as the learner does it."""
    sums.start(votes)
    for micro in range(MICROS):
        for values, of_shards in zip(step.gradients, arrays):
            for shard, array in zip(own, of_shards):
                array[:] = values[micro, shard]
        outcomes = [
            [mx.nd.array([numbers[micro, shard]], dtype="float64") for numbers in (step.losses, step.correct)]
            for shard in own
        ]
        sums.add(outcomes, BATCH, last=micro == MICROS - 1)
    for layer, values in enumerate(step.moments):
        for micro in range(MICROS):
            for shard in own:
                sums.add_moments(layer, micro * values.shape[2], values[micro, shard])
    sums.reduce()


def on_ranks(size: int, steps: Sequence[Step], bucket_bytes: int, dtype: str = "float32") -> list[tuple[Rank, Any]]:
    """Each rank, and what it reads after each step."""
    meeting = Meeting(size)

    def work(rank: int) -> tuple[Rank, Any]:
        comm, own = Rank(meeting, rank), range(rank * SHARDS // size, (rank + 1) * SHARDS // size)
        arrays = [[mx.nd.zeros(n, dtype=dtype) for _ in own] for n in SIZES]
        sums, read = StepSums(comm, arrays, MOMENTS, SHARDS * MICROS, dtype, bucket_bytes), []
        for step in steps:
            take(sums, arrays, own, step, votes=rank == size - 1)
            outcome = (sums.loss, sums.correct, sums.stops, sums.refused)
            gradients = [mx.nd.zeros(n, dtype=dtype) for n in SIZES]
            mx.nd.waitall()
            sums.write_gradients(gradients, 0.5)
            norm = sums.gradient_norm
            read.append(([array.asnumpy() for array in gradients], norm, sums.moments(), outcome))
        return comm, read

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, range(size)))


@given(sizes=st.lists(st.integers(1, 50), min_size=1), least=st.integers(1, 200))
def test_buckets_are_the_parameters_from_the_last_to_the_first_and_none_is_small(sizes: list[int], least: int) -> None:
    buckets = cut(sizes, least)
    assert [number for bucket in buckets for number in bucket] == [*reversed(range(len(sizes)))]
    numbers = [sum(sizes[number] for number in bucket) for bucket in buckets]
    assert len(buckets) == 1 or min(numbers) >= least
    for bucket, count in zip(buckets[:-1], numbers):
        assert count - sizes[bucket[-1]] < least, "it ends as soon as it is large enough"


def test_what_has_less_than_two_buckets_is_not_cut() -> None:
    assert cut([5, 4, 10], 10) == [[2, 1, 0]]
    assert cut([6, 4, 10], 10) == [[2], [1, 0]]
    assert cut([6, 4, 9], 10) == [[2, 1, 0]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_sums_are_numpys_with_and_without_buckets_on_any_number_of_ranks(size: int, dtype: str) -> None:
    steps = [Step.drawn(1), Step.drawn(2)]
    for bucket_bytes in (WHOLE, SMALL):
        for _, read in on_ranks(size, steps, bucket_bytes, dtype):
            for step, (gradients, norm, moments, outcome) in zip(steps, read):
                expected = [values.sum(axis=(0, 1)) for values in step.gradients]
                for found, values in zip(gradients, expected):
                    np.testing.assert_array_equal(found, (values / 2).astype(dtype))
                assert norm == pytest.approx(np.linalg.norm(np.concatenate(expected)), rel=1e-12)
                for found, given_ in zip(moments, step.moments):
                    np.testing.assert_array_equal(found, given_.sum(axis=1).ravel())
                assert outcome == (step.losses.sum() / BATCH, step.correct.sum(), True, {})


def test_every_rank_begins_each_bucket_once_a_step_in_the_same_order_whatever_the_micro_batches() -> None:
    ranks = [rank for rank, _ in on_ranks(3, [Step.drawn(1), Step.drawn(2)], SMALL)]
    names = [f"exact sum.{number}" for number in range(3)]  # 590, 342 and 307 numbers, and what is no gradient
    assert [rank.begun for rank in ranks] == [[*names, *names]] * 3


def test_the_tutorials_network_is_one_bucket() -> None:
    sizes = [20 * 25, 20, 20, 20, 50 * 180, 50, 50, 50, 128 * 1250, 128, 10 * 128, 10]
    assert len(cut(sizes, BUCKET_BYTES // 8)) == 1


def test_sums_in_float16_whose_order_matters_are_one_bucket_and_what_is_exact_another() -> None:
    comm = Rank(Meeting(1), 0)
    arrays = [[mx.nd.zeros(n) for _ in range(SHARDS)] for n in SIZES]
    sums = StepSums(comm, arrays, MOMENTS, SHARDS * MICROS, "float32", SMALL, in_float16=True)
    take(sums, arrays, range(SHARDS), Step.drawn(1))
    assert len(comm.begun) == 2


@pytest.mark.parametrize("parameter", range(len(SIZES)))
def test_a_gradient_that_is_not_finite_is_known_on_all_ranks_whichever_bucket_it_is_in(parameter: int) -> None:
    step = Step.drawn(1)
    step.gradients[parameter][0, SHARDS - 1, 1] = np.nan  # of the last rank
    step.gradients[parameter][1, 0, 0] = np.inf  # of the first
    step.losses[0, 0] = np.nan
    for _, ((*_, outcome),) in on_ranks(3, [step], SMALL):
        assert outcome[3] == {"the loss": 1, "the gradient": 2}
        assert list(outcome[3]) == ["the loss", "the gradient"]


class Lost(Rank):
    """One whose peers are gone before its sum ``number`` is complete."""

    number = 0

    def begin_sum(self, values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        lost = len(self.begun) == self.number
        total = super().begin_sum(values, name)

        def finish() -> np.ndarray:
            if lost:
                raise PeerLostError
            return total()

        return finish


@pytest.mark.parametrize("number", range(3))
def test_a_lost_peer_is_told_to_whoever_waits_for_the_step(number: int) -> None:
    comm = Lost(Meeting(1), 0)
    comm.number = number
    arrays = [[mx.nd.zeros(n) for _ in range(SHARDS)] for n in SIZES]
    sums = StepSums(comm, arrays, MOMENTS, SHARDS * MICROS, "float32", SMALL)
    with pytest.raises(PeerLostError):
        take(sums, arrays, range(SHARDS), Step.drawn(1))
