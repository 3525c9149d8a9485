"""The places where a rank can run, and which of them are left out for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_LONGEST_SECONDS = 3600.0
_MOST_DOUBLINGS = 100  # beyond any bound, and still a number
_FORGIVEN_SECONDS = 600.0  # without a failure, after which a place counts as one that never failed


class Place(NamedTuple):
    """Where one rank can run."""

    host: str  # empty on this machine
    slot: int  # of the host


class Places:
    """A place whose rank failed is used again at once; if it fails again, only after a growing time.

    Args:
        cooldown_seconds: that a place is left out after its second failure; after the next twice as long, and so on.
    """

    def __init__(self, cooldown_seconds: float) -> None:
        self._cooldown_seconds = cooldown_seconds
        self._failures: dict[Place, int] = {}
        self._left_out_until: dict[Place, float] = {}

    def failed(self, places: Iterable[Place], now: float) -> None:
        """The ranks that ran there have failed, at time ``now`` in seconds."""
        for place in places:
            if now > self._left_out_until.get(place, now) + _FORGIVEN_SECONDS:
                self._failures[place] = 0
            self._failures[place] = self._failures.get(place, 0) + 1
            doublings = min(self._failures[place] - 2, _MOST_DOUBLINGS)
            seconds = self._cooldown_seconds * 2.0**doublings if doublings >= 0 else 0.0
            self._left_out_until[place] = now + min(seconds, _LONGEST_SECONDS)

    def forget(self, place: Place) -> None:
        """Its failures count no more."""
        self._failures.pop(place, None)
        self._left_out_until.pop(place, None)

    def usable(self, places: Iterable[Place], now: float) -> Sequence[Place]:
        """Those of ``places`` that are not left out."""
        return [place for place in places if self._left_out_until.get(place, now) <= now]

    def next_return(self, now: float) -> float:
        """Seconds until the next of those left out can be used; 0 if none is."""
        return min((until - now for until in self._left_out_until.values() if until > now), default=0.0)
