"""Where the time of a step goes, with a clock that the test turns."""

from __future__ import annotations

import os
from typing import Optional

import mxnet as mx
import numpy as np
import psutil
import pytest

from job.distributed.comm import Comm
from job.training import pace
from job.training.pace import Pace, resident_bytes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Waits(Comm):
    """A rank whose time in sums the test sets, and another rank that adds a row to every table."""

    def __init__(self, other: Optional[list[float]] = None) -> None:
        super().__init__()
        self.size = 1 if other is None else 2
        self._other = other

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        self.blocked_seconds += 1000  # outside of any step
        return values if self._other is None else values + np.array([[0.0] * 6, self._other])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace.time, "perf_counter", clock)
    return clock


def step(pace: Pace, clock: Clock, own: float, in_sums: float = 0.0) -> None:
    clock.now += own + in_sums
    pace._comm.blocked_seconds += in_sums
    pace.done()


def test_what_is_not_waited_for_others_is_the_ranks_own_time(clock: Clock) -> None:
    watched = Pace(Waits(), mx.cpu())
    watched.start()
    step(watched, clock, own=0.5, in_sums=0.375)
    step(watched, clock, own=0.75, in_sums=0.25)
    watched.count(100)
    gathered = watched.gather()
    assert (gathered["compute_seconds"], gathered["wait_seconds"]) == ([0.625], [0.3125])
    assert gathered["images_per_second"] == [80.0]


def test_what_happens_between_steps_is_no_part_of_them(clock: Clock) -> None:
    watched = Pace(Waits(), mx.cpu())
    for _ in range(2):
        clock.now += 50  # an evaluation
        watched.start()
        step(watched, clock, own=0.5)
        gathered = watched.gather()  # which itself waits
    assert (gathered["compute_seconds"], gathered["wait_seconds"]) == ([0.5], [0.0])
    assert (gathered["step_seconds_p50"], gathered["step_seconds_p99"]) == (0.5, 0.5)


def test_the_ranks_lie_side_by_side(clock: Clock) -> None:
    other = [
        4.0,
        8.0,
        2.0,
        400.0,
        7.0,
        0.0,
    ]  # steps, own seconds, seconds waited, images, bytes of its own and of a GPU
    watched = Pace(Waits(other), mx.cpu())
    watched.start()
    step(watched, clock, own=0.5, in_sums=1.5)
    watched.count(10)
    gathered = watched.gather()
    assert gathered["compute_seconds"] == [0.5, 2.0]
    assert gathered["wait_seconds"] == [1.5, 0.5]
    assert gathered["images_per_second"] == [20.0, 50.0]
    assert gathered["rss_bytes"][1] == 7
    assert "gpu_bytes" not in gathered


def test_the_memory_of_each_ranks_gpu_lies_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.context, "gpu_memory_info", lambda number: (300, {2: 1000}[number]))
    gathered = Pace(Waits([0.0] * 5 + [9.0]), mx.gpu(2)).gather()
    assert gathered["gpu_bytes"] == [700, 9]


def test_the_percentiles_are_numpys(clock: Clock) -> None:
    watched = Pace(Waits(), mx.cpu())
    watched.start()
    for own in range(1, 101):
        step(watched, clock, own=own)
    gathered = watched.gather()
    assert gathered["step_seconds_p50"] == pytest.approx(np.percentile(range(1, 101), 50))
    assert gathered["step_seconds_p99"] == pytest.approx(np.percentile(range(1, 101), 99))


def test_without_a_step_there_is_nothing_to_divide_by(clock: Clock) -> None:
    gathered = Pace(Waits(), mx.cpu()).gather()
    assert (gathered["compute_seconds"], gathered["images_per_second"]) == ([0.0], [0.0])


def test_memory_is_what_the_system_says() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.1)
