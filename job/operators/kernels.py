"""The passes of BatchNorm over whole arrays on the CPU, which are its cost; the rest has the size of a channel vector.

Every array has the shape (N, C, S): all axes before the channel axis, the channels, all axes after it.
:class:`CpuPasses` does them in compiled loops over the arrays' own memory; :mod:`job.operators.fused` has passes that
do what follows a BatchNorm as well. Per-channel vectors (C,) go in as numpy arrays of the type that is computed in, and
come out as float64. What a GPU does instead: :mod:`job.operators.queued_passes`.

The passes subtract a ``center`` (C,) before they multiply, in the arrays' own precision: with values around 1e4, x * a
+ b would round away what (x - center) * a + b keeps.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Optional, Protocol

import mxnet as mx
import numpy as np

from job.operators.compiled import compiled

Vector = np.ndarray
Kept = Optional[np.ndarray]


class Passes(Protocol):
    """What the operator of BatchNorm needs. Arrays are as :meth:`view` returns them."""

    def view(self, memory: np.ndarray, axis: int) -> np.ndarray:
        """An array whose channels are on ``axis``, as the passes take it: (N, C, S)."""

    def moments(self, x: np.ndarray) -> tuple[Vector, Vector]:
        """The mean of each channel, and the sum of squared deviations from it."""

    def affine(self, x: np.ndarray, center: Vector, scale: Vector, shift: Vector, out: np.ndarray) -> Kept:
        """``out = (x - center) * scale + shift``. Returns what ``products`` and ``combine`` need to know of it."""

    def products(self, dy: np.ndarray, x: np.ndarray, kept: Kept, center: Vector) -> tuple[Vector, Vector]:
        """The sums over each channel of ``dy`` and of ``dy * (x - center)``."""

    def combine(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        kept: Kept,
        center: Vector,
        a: Vector,
        b: Vector,
        c: Vector,
        out: np.ndarray,
    ) -> None:
        """``out = a * dy + b * (x - center) + c``."""


class CpuPasses:
    """One compiled loop a pass, over float32 or float64 arrays in main memory, as numpy sees them."""

    def view(self, memory: np.ndarray, axis: int) -> np.ndarray:
        return memory.reshape(flat_shape(memory.shape, axis))

    def moments(self, x: np.ndarray) -> tuple[Vector, Vector]:
        mean, m2 = np.empty(x.shape[1]), np.empty(x.shape[1])
        loop = _moments_of_columns if x.shape[2] == 1 else _moments_of_rows
        loop(x, mean, m2)
        return mean, m2

    def affine(self, x: np.ndarray, center: Vector, scale: Vector, shift: Vector, out: np.ndarray) -> Kept:
        _affine(x, center, scale, shift, out)
        return None

    def products(self, dy: np.ndarray, x: np.ndarray, kept: Kept, center: Vector) -> tuple[Vector, Vector]:
        sums, products = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        _products(dy, x, center, sums, products)
        return sums, products

    def combine(
        self,
        dy: np.ndarray,
        x: np.ndarray,
        kept: Kept,
        center: Vector,
        a: Vector,
        b: Vector,
        c: Vector,
        out: np.ndarray,
    ) -> None:
        _combine(dy, x, center, a, b, c, out)


def flat_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(N, C, S): what is before the channel axis, the channels, what is after it."""
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def host_view(array: mx.nd.NDArray) -> np.ndarray:
    """The memory of a CPU array as a numpy array, without a copy.

    Only for arrays on which no operator is pending, as inside a custom operator, and as long as ``array`` lives.
    """
    shape, dtype = array.shape, np.dtype(array.dtype)
    memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(_address(array))
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


class HostViews:
    """:func:`host_view` of arrays that come again in each step: as a rule they are where they were, and so is the view.

    What is asked for by one name has one shape and one type. MXNet needs longer to tell these than to tell the address.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def __call__(self, name: str, arrays: Iterable[mx.nd.NDArray]) -> list[np.ndarray]:
        """The memory of arrays, in the order in which they come by this name."""
        return [self.one(name, place, array) for place, array in enumerate(arrays)]

    def one(self, name: str, place: int, array: mx.nd.NDArray) -> np.ndarray:
        """The memory of the array that comes by this name at this place."""
        address = _address(array)
        known = self._known.get((name, place))
        if known is None or known[0] != address:
            known = self._known[name, place] = address, host_view(array)
        return known[1]


def _address(array: mx.nd.NDArray) -> int:
    pointer = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(pointer)))
    return pointer.value or 0


# Sums reordered for vector units: in another order than they are written in, but in the same one each time.
_compiled = compiled(reorders_sums=True)


@_compiled
def _moments_of_rows(x, mean, m2):  # type: ignore[no-untyped-def]
    """Two passes over a row while it is in the first-level cache, then Chan's merge of the rows of a channel.

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    rows, _, length = x.shape
    for c in range(x.shape[1]):
        mean_c, m2_c = 0.0, 0.0
        for n in range(rows):
            row = x[n, c]
            origin = row[0]  # near the mean, so that the sum of what is left is small and exact
            total = origin - origin
            for i in range(length):
                total += row[i] - origin
            row_mean = origin + total / x.dtype.type(length)
            rest = origin - origin
            squares = origin - origin
            for i in range(length):
                deviation = row[i] - row_mean
                rest += deviation
                squares += deviation * deviation
            residue = np.float64(rest) / length
            delta = np.float64(row_mean) + residue - mean_c
            mean_c += delta / (n + 1)
            m2_c += squares - length * residue * residue + delta * delta * length * n / (n + 1)
        mean[c], m2[c] = mean_c, m2_c


@_compiled
def _moments_of_columns(x, mean, m2):  # type: ignore[no-untyped-def]
    """Welford's update in float64, all channels at once: for arrays whose last axis is the channel axis."""
    rows = x.shape[0]
    mean[:] = 0.0
    m2[:] = 0.0
    for n in range(rows):
        weight = 1.0 / (n + 1)
        for c in range(x.shape[1]):
            delta = x[n, c, 0] - mean[c]
            mean[c] += delta * weight
            m2[c] += delta * (x[n, c, 0] - mean[c])


@_compiled
def _affine(x, center, scale, shift, out):  # type: ignore[no-untyped-def]
    rows, _, length = x.shape
    for n in range(rows):
        for c in range(x.shape[1]):
            center_c, scale_c, shift_c = center[c], scale[c], shift[c]
            for i in range(length):
                out[n, c, i] = (x[n, c, i] - center_c) * scale_c + shift_c


@_compiled
def _products(dy, x, center, sums, products):  # type: ignore[no-untyped-def]
    rows, _, length = x.shape
    for n in range(rows):
        for c in range(x.shape[1]):
            center_c = center[c]
            total = center_c - center_c
            product = center_c - center_c
            for i in range(length):
                total += dy[n, c, i]
                product += dy[n, c, i] * (x[n, c, i] - center_c)
            sums[c] += total
            products[c] += product


@_compiled
def _combine(dy, x, center, a, b, c0, out):  # type: ignore[no-untyped-def]
    rows, _, length = x.shape
    for n in range(rows):
        for c in range(x.shape[1]):
            center_c, a_c, b_c, c_c = center[c], a[c], b[c], c0[c]
            for i in range(length):
                out[n, c, i] = a_c * dy[n, c, i] + b_c * (x[n, c, i] - center_c) + c_c
