"""Sums as integers: exact in any order, near the true sum, and honest about what they cannot hold."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.distributed.comm import Comm
from job.training.exact import LARGEST, ExactSum, sum_of_squares

ADDENDS = 8
numbers = {
    "float32": st.floats(-LARGEST / ADDENDS, LARGEST / ADDENDS, width=32),
    "float64": st.floats(-LARGEST / ADDENDS, LARGEST / ADDENDS),
}


def total(values: list[float], dtype: str) -> float:
    sums = ExactSum(Comm(), 1, ADDENDS, dtype)
    for value in values:
        sums.add(0, np.array([value], dtype))
    sums.reduce()
    assert sums.refused == 0
    return float(sums.read(0, 1)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_cannot_matter(dtype: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(numbers[dtype], min_size=1, max_size=ADDENDS))
    shuffled = data.draw(st.permutations(values))
    assert total(values, dtype) == total(shuffled, dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2.0**-45), ("float64", 2.0**-89)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_is_the_sum_of_rational_numbers_to_the_promised_bound(dtype: str, bound: float, data: st.DataObject) -> None:
    values = data.draw(st.lists(numbers[dtype], min_size=1, max_size=ADDENDS))
    true = sum((Fraction(float(np.dtype(dtype).type(value))) for value in values), Fraction(0))
    error = abs(Fraction(total(values, dtype)) - true)
    rounding = Fraction(float(np.spacing(abs(float(true))))) * 2  # of what is read, a float64
    assert error <= len(values) * Fraction(bound) + rounding


def test_a_sum_in_floats_would_depend_on_the_order() -> None:
    values = np.array([1e4, 1e-5, -1e4], np.float32)
    assert (values[0] + values[1]) + values[2] != (values[0] + values[2]) + values[1]
    assert total(values.tolist(), "float32") == total(values[[0, 2, 1]].tolist(), "float32") != 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2 * LARGEST / ADDENDS])
def test_what_is_not_finite_or_too_large_is_counted_and_not_added(bad: float) -> None:
    sums = ExactSum(Comm(), 3, ADDENDS, "float32")
    sums.add(0, np.array([1.0, bad, 2.0], np.float32))
    sums.reduce()
    assert sums.refused == 1
    assert sums.read(0, 3).tolist() == [1.0, 0.0, 2.0]
    sums.clear()
    assert sums.refused == 0


def test_as_many_of_the_largest_as_are_allowed_do_not_overflow() -> None:
    largest = LARGEST / ADDENDS
    assert total([largest] * ADDENDS, "float64") == LARGEST
    assert total([-largest] * ADDENDS, "float32") == -LARGEST


def test_the_sum_of_squares_is_float64s_in_order() -> None:
    values = np.random.default_rng(0).normal(size=1001)
    expected = 0.0
    for value in values.tolist():
        expected += value * value
    assert sum_of_squares(values) == pytest.approx(expected, rel=1e-15)
