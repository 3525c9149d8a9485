"""Which places ranks may run at."""

from __future__ import annotations

from launch.elastic.places import Place, Places

FIRST, SECOND, OTHER = ALL = [Place("a", 0), Place("a", 1), Place("b", 0)]


def test_a_place_whose_rank_failed_once_is_used_again_at_once() -> None:
    places = Places(cooldown_seconds=10)
    places.failed([SECOND], now=100)
    assert places.usable(ALL, now=100) == ALL


def test_one_that_fails_again_is_left_out_for_a_time_that_doubles() -> None:
    places = Places(cooldown_seconds=10)
    now = 0.0
    waits = []
    for _ in range(4):
        places.failed([FIRST], now)
        waits.append(places.next_return(now))
        assert places.usable(ALL, now) == (ALL if not waits[-1] else [SECOND, OTHER])
        now += waits[-1]
        assert places.usable(ALL, now) == ALL
    assert waits == [0, 10, 20, 40]


def test_the_time_has_a_bound() -> None:
    places = Places(cooldown_seconds=10)
    for _ in range(2000):
        places.failed([FIRST], now=0)
    assert places.next_return(now=0) == 3600


def test_a_place_is_forgiven_when_it_has_not_failed_for_ten_minutes() -> None:
    places = Places(cooldown_seconds=10)
    places.failed([FIRST], now=0)
    places.failed([FIRST], now=1)
    places.failed([FIRST], now=1000)
    assert places.usable([FIRST], now=1000) == [FIRST]


def test_only_what_is_there_is_usable() -> None:
    assert Places(cooldown_seconds=10).usable([OTHER], now=0) == [OTHER]
