"""BatchNorm and what follows it as one operator: ReLU, or ReLU and 2x2 max pooling, in the same passes over memory.

Between a BatchNorm and the pooling behind it MXNet writes and reads four arrays of the size of its input; here each
pass reads the input once and writes once. Forward keeps a byte for each result, which says where its gradient goes.

Ties are decided as MXNet does: ReLU has no gradient at 0, and of equal maxima the first one takes it, row by row. NaN
stays NaN, where MXNet's float32 operators turn it into 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mxnet as mx
import numpy as np

from job.operators import windows
from job.operators.compiled import compiled
from job.operators.kernels import CpuPasses, Kept, Passes, Vector, flat_shape
from job.operators.vectors import AVAILABLE, LANES, pieces
from job.operators.windows import NOWHERE

Loop = Callable[..., None]

RELU = "relu"
RELU_MAX_POOL = "relu+max_pool"  # 2x2, stride 2; what does not fill a window is left out


def passes_for(tail: str = "") -> Passes:
    """Those of BatchNorm; with a ``tail``, of what follows it as well."""
    return _PASSES[tail]


def has_loops(ctx: mx.Context, dtype: Any) -> bool:
    """Whether there are compiled loops for arrays of that device and type."""
    return bool(ctx.device_type == "cpu" and np.dtype(dtype) != np.float16)


def can_fuse(ctx: mx.Context, dtype: Any) -> bool:
    """Whether there are passes with a tail among them."""
    return bool(AVAILABLE and has_loops(ctx, dtype))


class FusedPasses(CpuPasses):
    """BatchNorm and what follows it, by loops of which forward's writes ``kept``, and the others read it."""

    def __init__(self, affine: Loop, products: Loop, combine: Loop) -> None:
        self._affine, self._products, self._combine = affine, products, combine

    def affine(self, x: np.ndarray, center: Vector, scale: Vector, shift: Vector, out: np.ndarray) -> Kept:
        kept = np.empty(out.shape, np.uint8)
        self._affine(x, center, scale, shift, out, kept)
        return kept

    def products(self, dy: np.ndarray, x: np.ndarray, kept: Kept, center: Vector) -> tuple[Vector, Vector]:
        sums, products = np.zeros((2, x.shape[1]))
        self._products(dy, x, kept, center, sums, products)
        return sums, products

    def combine(self, dy: np.ndarray, x: np.ndarray, kept: Kept, *vectors_and_out: np.ndarray) -> None:
        self._combine(dy, x, kept, *vectors_and_out)


class FusedPoolPasses(FusedPasses):
    """The same of arrays (N, C, H, W); results are (N, C, H // 2, W // 2)."""

    def view(self, memory: np.ndarray, axis: int) -> np.ndarray:
        return memory

    def moments(self, x: np.ndarray) -> tuple[Vector, Vector]:
        return super().moments(x.reshape(flat_shape(x.shape, 1)))

    def affine(self, x: np.ndarray, *vectors_and_out: np.ndarray) -> Kept:
        kept = np.empty(vectors_and_out[-1].shape, np.uint8)
        self._affine(x, *vectors_and_out, kept, *_pieces(x))
        return kept

    def products(self, dy: np.ndarray, x: np.ndarray, kept: Kept, center: Vector) -> tuple[Vector, Vector]:
        sums, products = np.zeros((2, x.shape[1]))
        self._products(dy, x, kept, center, sums, products, *_pieces(x))
        return sums, products

    def combine(self, dy: np.ndarray, x: np.ndarray, kept: Kept, *vectors_and_out: np.ndarray) -> None:
        self._combine(dy, x, kept, *vectors_and_out, *_pieces(x))


def _pieces(x: np.ndarray) -> tuple[tuple[None, ...], tuple[None, ...]]:
    return pieces(x.shape[3] // 2)


_compiled = compiled(reorders_sums=True)


@_compiled
def _affine_relu(x, center, scale, shift, out, kept):  # type: ignore[no-untyped-def]
    rows, channels, length = x.shape
    zero = x.dtype.type(0)
    for n in range(rows):
        for c in range(channels):
            center_c, scale_c, shift_c = center[c], scale[c], shift[c]
            for i in range(length):
                y = (x[n, c, i] - center_c) * scale_c + shift_c
                kept[n, c, i] = NOWHERE if y <= zero else 0
                out[n, c, i] = zero if y <= zero else y


@_compiled
def _products_relu(dy, x, kept, center, sums, products):  # type: ignore[no-untyped-def]
    rows, channels, length = x.shape
    zero = x.dtype.type(0)
    for n in range(rows):
        for c in range(channels):
            center_c, total, product = center[c], zero, zero
            for i in range(length):
                gradient = dy[n, c, i] if kept[n, c, i] == 0 else zero
                total += gradient
                product += gradient * (x[n, c, i] - center_c)
            sums[c] += total
            products[c] += product


@_compiled
def _combine_relu(dy, x, kept, center, a, b, c0, out):  # type: ignore[no-untyped-def]
    rows, channels, length = x.shape
    zero = x.dtype.type(0)
    for n in range(rows):
        for c in range(channels):
            center_c, a_c, b_c, c_c = center[c], a[c], b[c], c0[c]
            for i in range(length):
                gradient = dy[n, c, i] if kept[n, c, i] == 0 else zero
                out[n, c, i] = a_c * gradient + b_c * (x[n, c, i] - center_c) + c_c


@_compiled
def _affine_pool(x, center, scale, shift, out, kept, piece, rest):  # type: ignore[no-untyped-def]
    images, channels, height, width = x.shape
    rows, columns = out.shape[2:]
    for plane in range(images * channels):
        c = plane % channels
        for i in range(rows):
            start, to = (plane * height + 2 * i) * width, (plane * rows + i) * columns
            for _ in range(columns // len(piece)):
                windows.affine(piece, x, start, width, center[c], scale[c], shift[c], out, kept, to)
                start, to = start + 2 * len(piece), to + len(piece)
            windows.affine(rest, x, start, width, center[c], scale[c], shift[c], out, kept, to)


@_compiled
def _products_pool(dy, x, kept, center, sums, products, piece, rest):  # type: ignore[no-untyped-def]
    images, channels, height, width = x.shape
    rows, columns = dy.shape[2:]
    lanes = np.empty((2, LANES), x.dtype)
    for plane in range(images * channels):
        c = plane % channels
        lanes[:] = 0
        for i in range(rows):
            start, at = (plane * height + 2 * i) * width, (plane * rows + i) * columns
            for _ in range(columns // len(piece)):
                windows.products(piece, x, start, width, center[c], dy, kept, at, lanes)
                start, at = start + 2 * len(piece), at + len(piece)
            windows.products(rest, x, start, width, center[c], dy, kept, at, lanes)
        for lane in range(LANES):
            sums[c] += lanes[0, lane]
            products[c] += lanes[1, lane]


@_compiled
def _combine_pool(dy, x, kept, center, a, b, c0, out, piece, rest):  # type: ignore[no-untyped-def]
    images, channels, height, width = x.shape
    rows, columns = dy.shape[2:]
    for plane in range(images * channels):
        n, c = divmod(plane, channels)
        for i in range(rows):
            start, at = (plane * height + 2 * i) * width, (plane * rows + i) * columns
            for _ in range(columns // len(piece)):
                windows.combine(piece, x, start, width, center[c], a[c], b[c], c0[c], dy, kept, at, out)
                start, at = start + 2 * len(piece), at + len(piece)
            windows.combine(rest, x, start, width, center[c], a[c], b[c], c0[c], dy, kept, at, out)
        for h in range(height):  # the edge that no window holds
            for w in range(2 * columns if h < 2 * rows else 0, width):
                out[n, c, h, w] = b[c] * (x[n, c, h, w] - center[c]) + c0[c]


_PASSES: dict[str, Passes] = {
    "": CpuPasses(),
    RELU: FusedPasses(_affine_relu, _products_relu, _combine_relu),
    RELU_MAX_POOL: FusedPoolPasses(_affine_pool, _products_pool, _combine_pool),
}
