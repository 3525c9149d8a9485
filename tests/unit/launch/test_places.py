"""Which places of a machine ranks may run at."""

from __future__ import annotations

from launch.elastic.places import Places


def test_a_place_whose_rank_failed_once_is_used_again_at_once() -> None:
    places = Places(3, cooldown_seconds=10)
    places.failed([1], now=100)
    assert places.usable(now=100) == [0, 1, 2]


def test_one_that_fails_again_is_left_out_for_a_time_that_doubles() -> None:
    places = Places(2, cooldown_seconds=10)
    now = 0.0
    waits = []
    for _ in range(4):
        places.failed([0], now)
        waits.append(places.next_return(now))
        assert places.usable(now) == ([0, 1] if not waits[-1] else [1])
        now += waits[-1]
        assert places.usable(now) == [0, 1]
    assert waits == [0, 10, 20, 40]


def test_the_time_has_a_bound() -> None:
    places = Places(1, cooldown_seconds=10)
    for _ in range(2000):
        places.failed([0], now=0)
    assert places.next_return(now=0) == 3600


def test_a_place_is_forgiven_when_it_has_not_failed_for_ten_minutes() -> None:
    places = Places(1, cooldown_seconds=10)
    places.failed([0], now=0)
    places.failed([0], now=1)
    places.failed([0], now=1000)
    assert places.usable(now=1000) == [0]
