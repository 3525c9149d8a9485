"""Sums whose order cannot matter: numbers are rounded to integers once, and integers add up exactly.

A number x becomes the integer nearest to x * 2^44. So a sum holds, whatever its order and however it is shared out over
ranks, to 2^-45 (3e-14) for each addend. Sums of float64 numbers have a second word for what the first one rounds away,
and hold to 2^-89. An addend that is not finite, or so large that the sum could leave 64 bits, is not added but counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from job.distributed.comm import Comm
from job.operators.compiled import compiled

SCALE = 2.0**44
LARGEST = 2.0**18  # of the sum: 2^62 as an integer


class ExactSum:
    """A vector that all ranks add to, and that is then the same on all, to the bit.

    Args:
        comm: the ranks.
        size: of the vector.
        kinds: what is added, in words, for :attr:`refused`.
        addends: how many numbers are added to each place at most, over all ranks; none may exceed LARGEST / addends.
        dtype: float32 or float64: what is added.
    """

    def __init__(self, comm: Comm, size: int, kinds: Sequence[str], addends: int, dtype: str) -> None:
        self._comm = comm
        self._name = comm.fresh_name("exact sum")
        self.limit = LARGEST / addends
        self._kinds = kinds
        self._words = words(dtype)
        self._size = size
        self._integers = np.zeros(self._words * size + len(kinds), np.int64)

    def clear(self) -> None:
        """Begin anew, from zeros."""
        self._integers[:] = 0

    def add(self, kind: str, start: int, values: np.ndarray) -> None:
        """Add ``values`` (n,), float32 or float64, to the places from ``start`` on."""
        counter = self._words * self._size + self._kinds.index(kind)
        self._integers[counter] += _add(*self._words_of(start, start + values.size), values, self.limit)

    def begin(self) -> None:
        """Begin to add up what all ranks have added. Nothing is added or read before :meth:`finish`."""
        self._total = self._comm.begin_sum(self._integers, self._name)

    def finish(self) -> None:
        """Wait for the others, and for the sum that was begun."""
        self._integers = self._total()

    @property
    def refused(self) -> dict[str, int]:
        """Of which kinds addends were not finite, or larger than ``limit``, and how many."""
        counts = self._integers[self._words * self._size :].tolist()
        return {kind: count for kind, count in zip(self._kinds, counts) if count}

    def read(self, start: int, stop: int) -> np.ndarray:
        """The sums of these places, float64 of shape (stop - start,)."""
        sums = np.empty(stop - start)
        self.write(start, sums)
        return sums

    def write(self, start: int, out: np.ndarray, scale: float = 1.0) -> None:
        """Fill ``out`` (n,), float32 or float64, with the sums of the places from ``start`` on, times ``scale``."""
        _write(*self._words_of(start, start + out.size), scale, out)

    def sum_of_squares(self, start: int, stop: int) -> float:
        """Of the sums of these places: in float64 and in the order of the places, on every machine."""
        return float(_sum_of_squares(*self._words_of(start, stop)))

    def _words_of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        second = self._integers[self._size + start : self._size + stop] if self._words == 2 else self._integers[:0]
        return self._integers[start:stop], second


def words(dtype: str) -> int:
    """How many int64 numbers hold a sum of numbers of this type."""
    return 2 if dtype == "float64" else 1


@compiled(reorders_sums=False)
def _add(first, second, values, limit):  # type: ignore[no-untyped-def]
    refused = 0
    for i in range(values.size):
        value = np.float64(values[i])
        if not abs(value) <= limit:  # NaN is not either
            refused += 1
            continue
        scaled = value * SCALE
        whole = np.rint(scaled)
        first[i] += np.int64(whole)
        if second.size:
            second[i] += np.int64(np.rint((scaled - whole) * SCALE))
    return refused


@compiled(reorders_sums=False)
def _write(first, second, scale, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        whole = np.float64(first[i]) + np.float64(second[i]) / SCALE if second.size else np.float64(first[i])
        out[i] = whole / SCALE * scale


@compiled(reorders_sums=False)
def _sum_of_squares(first, second):  # type: ignore[no-untyped-def]
    total = np.float64(0.0)
    for i in range(first.size):
        whole = np.float64(first[i]) + np.float64(second[i]) / SCALE if second.size else np.float64(first[i])
        total += (whole / SCALE) * (whole / SCALE)
    return total
