"""Sums whose order cannot matter, against Python's exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.distributed.comm import Comm
from job.training.exact import LARGEST, ExactSum

LIMIT = LARGEST / 64
KINDS = ("whole", "half")
NUMBERS = st.one_of(
    st.floats(-LIMIT, LIMIT, width=32),
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([0.0, -0.0, LIMIT, -LIMIT, 2.0**-44, 2.0**-45, -(2.0**-45), 3 * 2.0**-45, 1e-30]),
)
LISTS = st.lists(NUMBERS, min_size=1, max_size=64)


class Others(Comm):
    """Ranks that have handed over a vector of their own."""

    def __init__(self, vectors: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._vectors = vectors
        self.own: Optional[np.ndarray] = None

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        self.own = values
        return np.asarray(np.sum([values, *self._vectors], axis=0))


def on_one_rank(numbers: Sequence[float], dtype: str, others: Sequence[np.ndarray] = ()) -> tuple[ExactSum, Others]:
    """Sums of ``numbers`` and of their halves."""
    comm = Others(others)
    sums = ExactSum(comm, 2, KINDS, 64, dtype)
    for number in numbers:
        sums.add("whole", 0, np.array([number], dtype))
        sums.add("half", 1, np.array([number / 2], dtype))
    sums.begin()
    sums.finish()
    return sums, comm


@settings(deadline=None)
@given(numbers=LISTS, order=st.randoms(), cuts=st.lists(st.integers(0, 64), max_size=4))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_order_and_no_number_of_ranks_changes_a_bit(numbers: list[float], order, cuts: list[int], dtype) -> None:  # type: ignore[no-untyped-def]
    whole, _ = on_one_rank(numbers, dtype)
    mixed = order.sample(numbers, len(numbers))
    first, *others = (part.tolist() for part in np.split(np.array(mixed), sorted(cuts)))
    vectors = [own for part in others if (own := on_one_rank(part, dtype)[1].own) is not None]
    shared, _ = on_one_rank(first, dtype, vectors)
    assert shared.read(0, 2).tobytes() == whole.read(0, 2).tobytes()
    assert shared.refused == whole.refused == {}


@settings(deadline=None)
@given(numbers=LISTS)
@pytest.mark.parametrize(("dtype", "bits"), [("float32", 45), ("float64", 89)])
def test_sums_hold_to_what_is_promised_for_each_addend(numbers: list[float], dtype: str, bits: int) -> None:
    sums, _ = on_one_rank(numbers, dtype)
    expected = sum(map(Fraction, numbers))
    error = abs(Fraction(float(sums.read(0, 1)[0])) - expected)
    # To tell the sum, two words become float64, and are added: each of the three roundings is of 53 bits.
    assert error <= Fraction(len(numbers), 2**bits) + 3 * abs(expected) / 2**53


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, LIMIT * 1.001, -1e30])
def test_what_is_not_finite_or_too_large_is_refused_and_counted_and_never_wraps(bad: float, dtype: str) -> None:
    sums, _ = on_one_rank([1.0, bad, 2.0], dtype, [np.zeros(6 if dtype == "float64" else 4, np.int64)])
    half_too = abs(bad) > 2 * LIMIT or np.isnan(bad)
    assert sums.refused == ({"whole": 1, "half": 1} if half_too else {"whole": 1})
    assert sums.read(0, 1).tolist() == [3.0]
    sums.clear()
    assert sums.refused == {} and sums.read(0, 2).tolist() == [0.0, 0.0]


def test_as_many_of_the_largest_as_are_announced_fit() -> None:
    sums, _ = on_one_rank([LIMIT] * 64, "float32")
    assert sums.read(0, 1).tolist() == [LARGEST] and sums.refused == {}


def test_a_refusal_on_another_rank_is_known_here() -> None:
    sums, _ = on_one_rank([1.0], "float32", [np.array([0, 0, 0, 3])])
    assert sums.refused == {"half": 3}


def test_a_long_vector_is_summed_in_its_own_places() -> None:
    sums = ExactSum(Comm(), 1000, KINDS, 2, "float32")
    sums.add("whole", 10, np.arange(5, dtype=np.float32))
    sums.add("whole", 12, np.arange(5, dtype=np.float32))
    sums.begin()
    sums.finish()
    assert sums.read(8, 19).tolist() == [0, 0, 0, 1, 2, 4, 6, 3, 4, 0, 0]
    assert not sums.read(0, 10).any() and not sums.read(17, 1000).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_written_is_the_sums_times_a_scale_rounded_once_to_the_arrays_type(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(dtype)
    sums = ExactSum(Comm(), 1000, KINDS, 2, dtype)
    sums.add("whole", 0, values)
    for scale in (1.0, 0.3):
        out = np.empty(900, dtype)
        sums.write(100, out, scale)
        np.testing.assert_array_equal(out, (sums.read(100, 1000) * scale).astype(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-10), ("float64", 1e-14)])
def test_a_sum_of_squares_is_numpys(dtype: str, tolerance: float) -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(dtype)
    sums = ExactSum(Comm(), 1000, KINDS, 2, dtype)
    sums.add("whole", 0, values)
    exact = values[10:].astype(np.float64)
    assert sums.sum_of_squares(10, 1000) == pytest.approx(float(exact @ exact), rel=tolerance)
