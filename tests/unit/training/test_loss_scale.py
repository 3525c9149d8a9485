"""The rule of the dynamic loss scale, worked out by hand from what GradScaler's documentation says."""

from __future__ import annotations

import math

import pytest

from job.training.loss_scale import GROWTH_INTERVAL, LARGEST, LossScale


def after(steps: list[tuple[str, int]]) -> LossScale:
    scale = LossScale()
    for verdict, count in steps:
        for _ in range(count):
            scale.grow() if verdict == "good" else scale.shrink()
    return scale


@pytest.mark.parametrize(
    ("steps", "exponent"),
    [
        ([], 16),
        ([("good", 1999)], 16),
        ([("good", 2000)], 17),
        ([("good", 3999)], 17),
        ([("good", 4000)], 18),
        ([("overflow", 1)], 15),
        ([("overflow", 3)], 13),
        ([("good", 1999), ("overflow", 1), ("good", 1999)], 15),  # an overflow begins the count anew
        ([("good", 1999), ("overflow", 1), ("good", 2000)], 16),
        ([("good", 2000), ("overflow", 1), ("good", 1999)], 16),
        ([("good", 100_000)], 24),  # and no larger
        ([("overflow", 100)], 0),  # and no smaller
        ([("overflow", 100), ("good", 2000)], 1),
    ],
)
def test_the_scale_doubles_after_2000_good_steps_in_a_row_and_halves_at_each_overflow(
    steps: list[tuple[str, int]], exponent: int
) -> None:
    assert after(steps).value == 2.0**exponent


def test_at_its_smallest_an_overflow_is_not_the_scales_fault() -> None:
    scale = LossScale()
    assert [scale.shrink() for _ in range(18)] == [True] * 16 + [False] * 2


def test_it_is_a_power_of_two_whatever_happens() -> None:
    scale = after([("good", 7000), ("overflow", 5), ("good", 9000), ("overflow", 40), ("good", 2100)])
    assert math.frexp(scale.value)[0] == 0.5 and scale.value <= LARGEST


def test_it_goes_on_where_it_was() -> None:
    scale, other = after([("overflow", 2), ("good", GROWTH_INTERVAL - 1)]), LossScale()
    other.load_state_dict(scale.state_dict())
    assert other.value == 2.0**14
    other.grow()
    assert other.value == 2.0**15
    other.load_state_dict(None)  # a run that was in another type so far
    assert other.value == 2.0**15
