"""Loss and accuracy as sums over samples, so that they mean the same for any number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Totals:
    """Sums over samples."""

    loss_sum: float = 0.0
    correct: float = 0.0
    count: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.loss_sum + other.loss_sum, self.correct + other.correct, self.count + other.count)

    @property
    def loss(self) -> float:
        """The mean loss of a sample."""
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        """The fraction of samples that are classified right."""
        return self.correct / self.count if self.count else math.nan


class Meter:
    """Adds up what the steps have seen until :meth:`take`. What it is given is the same on all ranks, so that it is."""

    def __init__(self) -> None:
        self._totals = Totals()

    def add(self, totals: Totals) -> None:
        """Add the samples of a step."""
        self._totals = self._totals + totals

    def take(self) -> Totals:
        """The sums of what was added since the last call."""
        totals, self._totals = self._totals, Totals()
        return totals

    def state_dict(self) -> dict[str, Any]:
        """What was added since :meth:`take`."""
        return {"totals": [self._totals.loss_sum, self._totals.correct, self._totals.count]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._totals = Totals(*state["totals"])
