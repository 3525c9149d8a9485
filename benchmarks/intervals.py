"""Medians, their ratios, and how far both can be believed, from turns that were taken one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value, and where it would lie nine times in ten if other turns had been drawn."""

    value: float
    low: float
    high: float


def _drawn(turns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(turns, size=(2000, turns))


def median(seconds: np.ndarray) -> Interval:
    """The median of turns (n,), with its 90% interval by the bootstrap (Efron, 1979)."""
    low, high = np.percentile(np.median(seconds[_drawn(len(seconds))], axis=1), [5, 95])
    return Interval(float(np.median(seconds)), float(low), float(high))


def ratio(of: np.ndarray, to: np.ndarray) -> Interval:
    """The median of ``of`` over that of ``to``, both (n,), whose turns of one index were neighbours in time."""
    draws = _drawn(len(of))
    low, high = np.percentile(np.median(of[draws], axis=1) / np.median(to[draws], axis=1), [5, 95])
    return Interval(float(np.median(of) / np.median(to)), float(low), float(high))
