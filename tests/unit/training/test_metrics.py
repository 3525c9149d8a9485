"""Exact sums: for losses that float32 holds exactly, the totals are numpy's float64 sums to the last bit."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest

from job.distributed.comm import Comm
from job.training.metrics import Meter, Totals


class OtherRank(Comm):
    """Adds what another rank holds to every sum."""

    def __init__(self, other: list[float]) -> None:
        super().__init__()
        self.other = np.array(other)
        self.names: list[str] = []

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        assert values.dtype == np.float64
        self.names.append(name)
        return values + self.other


def pieces(sizes: list[int], dtype: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Losses in 1/256, logits and labels, of which a good part is right."""
    random = np.random.default_rng(0)
    made = []
    for size in sizes:
        logits = random.normal(size=(size, 10))
        labels = np.where(random.random(size) < 0.5, logits.argmax(axis=1), random.integers(0, 10, size))
        losses = random.integers(0, 2000, size) / 256
        made.append((losses.astype(dtype), logits.astype(dtype), labels.astype(dtype)))
    return made


def fill(meter: Meter, made: list[tuple[np.ndarray, np.ndarray, np.ndarray]], dtype: str) -> None:
    for arrays in made:
        meter.add(*(mx.nd.array(array, dtype=dtype) for array in arrays))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [[1], [7, 1, 500, 3, 64]], ids=["one sample", "uneven pieces"])
def test_sums_over_pieces_are_numpys(sizes: list[int], dtype: str) -> None:
    made = pieces(sizes, dtype)
    losses, logits, labels = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*made))
    meter = Meter(Comm(), "test")
    fill(meter, made, dtype)
    totals = meter.reduce()
    right = int(sum(row.argmax() == label for row, label in zip(logits, labels)))
    assert totals == Totals(losses.sum(), right, len(labels))
    assert totals.loss == losses.mean()
    assert totals.accuracy == right / len(labels)


def test_accuracy_counts_the_largest_logit() -> None:
    meter = Meter(Comm(), "test")
    logits = mx.nd.array([[0, 1, 2], [5, 1, 2], [0, 3, 2], [-3, -2, -1]])
    meter.add(mx.nd.zeros(4), logits, mx.nd.array([2, 0, 0, 2]))
    totals = meter.reduce()
    assert (totals.correct, totals.count, totals.accuracy) == (3, 4, 0.75)


def test_a_rank_without_samples_adds_nothing() -> None:
    assert Meter(Comm(), "test").reduce() == Totals(0.0, 0.0, 0.0)
    assert Meter(OtherRank([10.0, 3.0, 4.0]), "test").reduce() == Totals(10.0, 3.0, 4.0)


def test_the_ranks_sums_are_added_not_their_means() -> None:
    comm = OtherRank([10.0, 3.0, 4.0])
    meter = Meter(comm, "a name")
    meter.add(mx.nd.array([0.5, 1.5]), mx.nd.array([[1, 0], [1, 0]]), mx.nd.array([0, 1]))
    totals = meter.reduce()
    assert (totals.loss, totals.accuracy) == (12.0 / 6, 4 / 6)
    assert comm.names == ["a name"]


def test_a_meter_starts_anew_after_each_reduction() -> None:
    meter = Meter(Comm(), "test")
    for _ in range(2):
        meter.add(mx.nd.array([0.5]), mx.nd.array([[1, 0]]), mx.nd.array([0]))
        assert meter.reduce() == Totals(0.5, 1.0, 1.0)


def test_many_large_losses_lose_no_small_one() -> None:
    meter = Meter(Comm(), "test")
    for loss in (2.0**24, 1.0, 1.0, 1.0):  # in float32 the sum would stay at 2**24
        meter.add(mx.nd.array([loss]), mx.nd.array([[1, 0]]), mx.nd.array([0]))
    assert meter.reduce().loss_sum == 2.0**24 + 3


def test_totals_add_by_samples_so_that_uneven_pieces_weigh_what_they_hold() -> None:
    both = Totals(6.0, 1.0, 2.0) + Totals(2.0, 6.0, 6.0)
    assert (both.loss, both.accuracy, both.count) == (1.0, 7 / 8, 8)
