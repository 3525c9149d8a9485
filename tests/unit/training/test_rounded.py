"""Sums of gradients in float16, against numpy's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from job.distributed.comm import Comm
from job.training.rounded import RoundedSum
from tests.unit.training.test_exact import Others


class InFloat16(Others):
    """They add up in float16, as Horovod does."""

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        self.own, total = values, values
        with np.errstate(over="ignore", invalid="ignore"):
            for vector in self._vectors:
                total = total + vector
        return total


def summed(
    own: Sequence[np.ndarray], others: Sequence[np.ndarray] = (), scale: float = 1.0
) -> tuple[RoundedSum, np.ndarray]:
    """The sum of what this rank's shards have and other ranks hand over, and what this rank hands over."""
    comm = InFloat16(others)
    vector = RoundedSum(comm, own[0].size, "the gradient", 8, "float32", lambda: scale)
    for values in own:
        vector.add("the gradient", 0, values.astype(np.float32))
    vector.begin()
    vector.finish()
    assert comm.own is not None and comm.own.dtype == np.float16
    return vector, comm.own


def test_each_ranks_exact_sum_is_scaled_and_rounded_once_and_ranks_add_up_in_float16() -> None:
    random = np.random.default_rng(0)
    shards, scale = random.normal(0, 1e-3, (6, 500)).astype(np.float32), 2.0**12
    first, second = (part.astype(np.float64).sum(axis=0) for part in (shards[:4], shards[4:]))
    theirs = (second * scale).astype(np.float16)
    found, ours = summed(shards[:4], [theirs], scale)
    np.testing.assert_array_equal(ours, (first * scale).astype(np.float16))
    np.testing.assert_array_equal(found.read(0, 500), (ours + theirs).astype(np.float64) / scale)
    np.testing.assert_array_equal(found.read(7, 9), found.read(0, 500)[7:9])
    assert not found.refused
    other, _ = summed(shards[4:], [ours], scale)
    np.testing.assert_array_equal(other.read(0, 500), found.read(0, 500))  # on both ranks


def test_the_scale_saves_what_is_too_small_for_float16() -> None:
    tiny = np.full(3, 2.0**-30)
    assert not summed([tiny])[0].read(0, 3).any()
    assert summed([tiny], scale=2.0**16)[0].read(0, 3).tolist() == tiny.tolist()


@pytest.mark.parametrize("own", [[40_000.0, 1.0], [-40_000.0, 1.0]])
def test_a_sum_that_float16_cannot_hold_is_refused_on_all_ranks(own: list[float]) -> None:
    ours, theirs = np.array(own), np.array([np.copysign(30_000, own[0]), 1.0])
    for here, there in ((ours, theirs), (theirs, ours)):
        found, _ = summed([here / 4], [there.astype(np.float16)], scale=4.0)
        assert found.refused == {"the gradient": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_what_a_rank_cannot_add_is_refused_on_all_ranks(bad: float) -> None:
    found, own = summed([np.array([1.0, bad, 2.0])])
    assert found.refused
    other, _ = summed([np.ones(3)], [own])
    assert other.refused


def test_a_vector_that_is_cleared_begins_anew() -> None:
    comm = Comm()
    vector = RoundedSum(comm, 2, "the gradient", 8, "float32", lambda: 2.0)
    for values in ([np.inf, 1.0], [3.0, 4.0]):
        vector.clear()
        vector.add("the gradient", 0, np.array(values, np.float32))
        vector.begin()
        vector.finish()
    assert (vector.refused, vector.read(0, 2).tolist()) == ({}, [3.0, 4.0])
