"""The learning rate of single steps, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from job.config import OptimizerConfig, ScheduleConfig
from job.training.schedule import Schedule, peak_learning_rate


def schedule(peak: float = 0.2, steps_per_epoch: int = 10, total_steps: int = 50, **keys: Any) -> Schedule:
    return Schedule(ScheduleConfig(**keys), peak, steps_per_epoch, total_steps)


@pytest.mark.parametrize("step", [0, 1, 49])
def test_constant_is_the_peak_at_every_step(step: int) -> None:
    assert schedule()(step) == 0.2


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.8), (19, 0.8), (20, 0.4), (34, 0.4), (35, 0.2), (49, 0.2)],
)
def test_step_falls_at_the_start_of_its_epochs(step: int, rate: float) -> None:
    falling = schedule(0.8, name="step", step_epochs=[2, 3.5], step_factor=0.5)
    assert falling(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1.0), (10, (2 + math.sqrt(2)) / 4), (20, 0.5), (30, (2 - math.sqrt(2)) / 4)],  # cos 45 degrees = sqrt(2) / 2
)
def test_cosine_is_a_half_period_over_the_run(step: int, rate: float) -> None:
    assert schedule(1.0, total_steps=40, name="cosine")(step) == pytest.approx(rate, rel=1e-12)


def test_cosine_ends_at_its_final_fraction_of_the_peak() -> None:
    falling = schedule(0.5, total_steps=40, name="cosine", final_fraction=0.2)
    assert falling(0) == 0.5
    assert falling(20) == pytest.approx(0.3, rel=1e-12)  # half way from 0.5 to 0.1
    # The end of the last step is the end of the run; its own rate is 0.1 + 0.4 * (1 - cos(pi / 40)) / 2.
    assert falling(39) == pytest.approx(0.1 + 0.4 * math.sin(math.pi / 80) ** 2, rel=1e-12)
    assert falling(39) == pytest.approx(0.1, rel=0.01)


def test_the_last_step_of_a_cosine_to_zero_still_learns() -> None:
    assert 0 < schedule(1.0, total_steps=40, name="cosine")(39) < 0.002


def test_a_cosine_starts_at_the_end_of_the_warmup() -> None:
    falling = schedule(1.0, total_steps=50, name="cosine", warmup_epochs=1)
    assert falling(9) == falling(10) == 1.0
    assert falling(30) == pytest.approx(0.5, rel=1e-12)  # half of the 40 steps after the warmup


@pytest.mark.parametrize(("step", "rate"), [(0, 0.05), (1, 0.10), (2, 0.15), (3, 0.20), (4, 0.20)])
def test_warmup_rises_from_above_zero_to_the_peak(step: int, rate: float) -> None:
    assert schedule(0.2, steps_per_epoch=8, warmup_epochs=0.5)(step) == pytest.approx(rate, rel=1e-12)


def test_a_warmup_shorter_than_a_step_is_none() -> None:
    assert schedule(warmup_epochs=0.04)(0) == 0.2


def test_a_fall_during_the_warmup_counts_from_its_end() -> None:
    falling = schedule(1.0, name="step", step_epochs=[0.5], step_factor=0.1, warmup_epochs=1)
    assert falling(9) == 1.0
    assert falling(10) == pytest.approx(0.1, rel=1e-12)


def test_a_cosine_run_that_ends_within_its_warmup_only_rises() -> None:
    rising = schedule(1.0, steps_per_epoch=10, total_steps=5, name="cosine", warmup_epochs=1)
    assert [rising(step) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(("scaling", "rate"), [("none", 0.1), ("linear", 0.9), ("sqrt", 0.3)])
def test_the_peak_is_scaled_as_asked(scaling: Any, rate: float) -> None:
    optimizer = OptimizerConfig(learning_rate=0.1, scale_learning_rate=scaling)
    assert peak_learning_rate(optimizer, ranks=9) == pytest.approx(rate, rel=1e-12)
    assert peak_learning_rate(optimizer, ranks=1) == 0.1
