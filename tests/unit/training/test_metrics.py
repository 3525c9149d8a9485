"""Metrics are sums over samples: totals in float64, to the last bit."""

from __future__ import annotations

import json
import math

import pytest

from job.training.metrics import Meter, Totals


def test_totals_add_by_samples_so_that_uneven_pieces_weigh_what_they_hold() -> None:
    both = Totals(6.0, 1.0, 2.0) + Totals(2.0, 6.0, 6.0)
    assert (both.loss, both.accuracy, both.count) == (1.0, 7 / 8, 8)


@pytest.mark.parametrize("sizes", [[1], [7, 1, 500, 3, 64]], ids=["one sample", "uneven pieces"])
def test_sums_over_steps_are_those_of_all_samples(sizes: list[int]) -> None:
    losses = [[(17 * place + size) % 2000 / 256 for place in range(size)] for size in sizes]
    right = [[(place + size) % 3 > 0 for place in range(size)] for size in sizes]
    meter = Meter()
    for of_step, hits in zip(losses, right):
        meter.add(Totals(math.fsum(of_step), sum(hits), len(of_step)))
    totals = meter.take()
    every = [loss for of_step in losses for loss in of_step]
    hits = sum(map(sum, right))
    assert totals == Totals(math.fsum(every), hits, len(every))
    assert (totals.loss, totals.accuracy) == (math.fsum(every) / len(every), hits / len(every))


def test_nothing_seen_is_no_loss_and_no_accuracy() -> None:
    totals = Meter().take()
    assert totals == Totals(0.0, 0.0, 0.0)
    assert math.isnan(totals.loss) and math.isnan(totals.accuracy)


def test_a_meter_starts_anew_after_each_taking() -> None:
    meter = Meter()
    for _ in range(2):
        meter.add(Totals(0.5, 1.0, 1.0))
        assert meter.take() == Totals(0.5, 1.0, 1.0)


def test_many_large_losses_lose_no_small_one() -> None:
    meter = Meter()
    for loss in (2.0**24, 1.0, 1.0, 1.0):  # in float32 the sum would stay at 2**24
        meter.add(Totals(loss, 1.0, 1.0))
    assert meter.take().loss_sum == 2.0**24 + 3


def test_a_meter_goes_on_from_json_to_the_last_bit() -> None:
    first, second = Meter(), Meter()
    first.add(Totals(0.1, 1.0, 3.0))
    second.add(Totals(7.0, 7.0, 7.0))  # which is forgotten
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for meter in (first, second):
        meter.add(Totals(0.2, 0.0, 1.0))
    assert first.take() == second.take() == Totals(0.1 + 0.2, 1.0, 4.0)
