"""Convolution in loops of our own, for numbers of channels that MXNet's library has no kernels for.

oneDNN's fast convolutions want channels in multiples of a vector; for others, such as the 20 and 50 of the tutorial's
network, it copies each image out into a matrix and multiplies. These loops read the image where it is: a tile of
results stays in registers while all products that belong to it are added (Georganas et al., "Anatomy of
high-performance deep learning convolutions on SIMD architectures", 2018). Stride 1, no dilation, no groups.

Every result is added up in one order, by itself: no other result, and no other shard, has a part in it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from job.operators.compiled import compiled
from job.operators.vectors import Code, body, copy_piece, pieces, raise_piece

_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
_VECTOR_BYTES = 64 if _WIDE else 32
_VECTORS = 2  # of results side by side in a tile; its height in channels fills the registers
_HEIGHT = 10 if _WIDE else 6
_CHANNELS, _TAPS = (3, 9) if _WIDE else (2, 5)  # of the weight's gradients in a tile, each a vector
_AT_ONCE = 2**17  # numbers of images and gradients that lie side by side: some of the second-level cache


class Packed(NamedTuple):
    """A weight in the order in which tiles read it."""

    weights: np.ndarray  # (blocks of channels out, products, height of a tile); the last block is filled with zeros
    kernel: tuple[int, int]


def pack(weight: np.ndarray) -> Packed:
    """For :func:`forward`: a weight (channels out, channels in, kernel height, kernel width)."""
    channels, _, height, width = weight.shape
    blocks = -(-channels // _HEIGHT)
    filled = np.zeros((blocks * _HEIGHT, weight[0].size), weight.dtype)
    filled[:channels] = weight.reshape(channels, -1)
    return Packed(np.ascontiguousarray(filled.reshape(blocks, _HEIGHT, -1).swapaxes(1, 2)), (height, width))


def turn(weight: np.ndarray) -> Packed:
    """For :func:`backward_data`: the same weight."""
    return pack(weight[:, :, ::-1, ::-1].swapaxes(0, 1))


def forward(x: np.ndarray, weight: Packed, bias: np.ndarray, pad: tuple[int, int], out: np.ndarray) -> None:
    """Convolve images.

    Args:
        x: (n, channels in, height, width), float32 or float64, as all other arrays.
        weight: see :func:`pack`.
        bias: (channels out,).
        pad: rows and columns of zeros around an image.
        out: (n, channels out, height + 2 pad - kernel height + 1, likewise the width), which is filled.
    """
    _forward(x, weight.weights, weight.kernel, bias, pad, out, _cut(x), _cut(out))


def backward_data(dy: np.ndarray, turned: Packed, pad: tuple[int, int], dx: np.ndarray) -> None:
    """Fill ``dx``, like ``x`` of :func:`forward`, from the gradient ``dy`` of its ``out``.

    ``turned`` is of :func:`turn`, ``pad`` is that of forward.
    """
    height, width = turned.kernel
    around = (height - 1 - pad[0], width - 1 - pad[1])
    zeros = np.zeros(dx.shape[1], dx.dtype)
    _forward(dy, turned.weights, turned.kernel, zeros, around, dx, _cut(dy), _cut(dx))


def backward_weight(dy: np.ndarray, x: np.ndarray, pad: tuple[int, int], dweight: np.ndarray) -> None:
    """Fill ``dweight``, like the weight of :func:`forward`, from its ``x`` and the gradient ``dy`` of its ``out``."""
    _backward_weight(dy, x, pad, dweight, _cut(x), _cut(dy))


def backward_bias(dy: np.ndarray, dbias: np.ndarray) -> None:
    """Fill ``dbias`` (channels out,) from the gradient ``dy`` of :func:`forward`'s ``out``."""
    _backward_bias(dy.reshape(*dy.shape[:2], -1), dbias)


def _cut(images: np.ndarray) -> tuple[tuple[None, ...], tuple[None, ...]]:
    return pieces(images.shape[3])


@intrinsic
def _results_tile(_, weights, start, steps, image, at, image_steps, results, to):  # type: ignore[no-untyped-def]
    """``results[j, to + v] = sum over k of weights[start + steps[k] + j] * image[at + image_steps[k] + v]``.

    For _HEIGHT j, and v of _VECTORS vectors; ``results`` is (_HEIGHT, anything).
    """

    def write(code: Code) -> None:
        build, lanes = code.builder, _lanes(code)
        sums = code.accumulators(_HEIGHT * _VECTORS, lanes)
        with cgutils.for_range(build, build.extract_value(code.array(2).shape, 0)) as loop:
            k, image_k = (build.load(code.pointer(index, loop.index)) for index in (2, 5))
            columns = [
                code.load(code.pointer(3, _total(build, code.arguments[4], image_k, code.integer(v * lanes))), lanes)
                for v in range(_VECTORS)
            ]
            first = build.add(code.arguments[1], k)
            for j in range(_HEIGHT):
                weight = code.spread(build.load(code.pointer(0, build.add(first, code.integer(j)))), lanes)
                for place, column in zip(sums[j * _VECTORS :], columns):
                    build.store(code.product_sum(weight, column, build.load(place)), place)
        row = build.extract_value(code.array(6).shape, 1)
        for number, place in enumerate(sums):
            j, v = divmod(number, _VECTORS)
            line = build.mul(code.integer(j), row)
            code.store(
                build.load(place), code.pointer(6, _total(build, line, code.arguments[7], code.integer(v * lanes)))
            )

    signature = types.void(weights, types.intp, steps, image, types.intp, image_steps, results, types.intp)
    return signature, body(0, write)


@intrinsic
def _weights_tile(_, dy, start, channel, image, at, steps, plane, images, length, sums):  # type: ignore[no-untyped-def]
    """``sums[j, t]``, the sum over n and p of
    ``dy[start + j * channel + n * length + p] * image[at + steps[t] + n * plane + p]``.

    For _CHANNELS j, _TAPS t, the n of ``images``, and p of ``length``, which is a multiple of a vector. What is added
    up is held in registers, a vector for each sum.
    """

    def write(code: Code) -> None:
        build, lanes = code.builder, _lanes(code)
        _, start, channel, _, at, _, plane, images, length, _ = code.arguments
        places = code.accumulators(_CHANNELS * _TAPS, lanes)
        steps = [build.load(code.pointer(5, code.integer(t))) for t in range(_TAPS)]
        with cgutils.for_range(build, images) as n:
            dy_n = build.add(start, build.mul(n.index, length))
            image_n = build.add(at, build.mul(n.index, plane))
            with cgutils.for_range_slice(build, code.integer(0), length, code.integer(lanes)) as (p, _):
                gradients = [
                    code.load(code.pointer(0, _total(build, dy_n, build.mul(code.integer(j), channel), p)), lanes)
                    for j in range(_CHANNELS)
                ]
                for t, step in enumerate(steps):
                    pixels = code.load(code.pointer(3, _total(build, image_n, step, p)), lanes)
                    for place, gradient in zip(places[t::_TAPS], gradients):
                        build.store(code.product_sum(gradient, pixels, build.load(place)), place)
        for number, place in enumerate(places):
            build.store(code.sum(build.load(place)), code.pointer(9, code.integer(number)))

    signature = types.void(dy, *[types.intp] * 2, image, types.intp, steps, *[types.intp] * 3, sums)
    return signature, body(0, write)


def _lanes(code: Code) -> int:
    return _VECTOR_BYTES * 8 // code.bits


def _total(build: Any, *places: Any) -> Any:
    return functools.reduce(build.add, places)


_compiled = compiled(reorders_sums=False)


@_compiled
def _forward(x, packed, kernel, bias, pad, out, cut_in, cut_out):  # type: ignore[no-untyped-def]
    """A tile is ``_HEIGHT`` channels of results that lie one after the other in memory, over the ends of rows too."""
    piece, rest = cut_out
    images, channels_in, height, width = x.shape
    _, channels, rows, columns = out.shape
    blocks, products, _ = packed.shape
    wide = width + 2 * pad[1]
    plane, edge = (height + 2 * pad[0]) * wide, pad[0] * wide + pad[1]
    length = (rows - 1) * wide + columns
    step = _VECTORS * _VECTOR_BYTES // x.itemsize
    tiles = (length + step - 1) // step
    image = np.zeros(channels_in * plane + tiles * step, x.dtype)  # zeros around it, and behind it to read over the end
    weights = packed.ravel()
    weight_steps = np.arange(products) * _HEIGHT
    image_steps = np.empty(products, np.int64)
    k = 0
    for c in range(channels_in):
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                image_steps[k] = c * plane + i * wide + j
                k += 1
    results = np.empty((_HEIGHT, tiles * step), x.dtype)
    for n in range(images):
        for c in range(channels_in):
            _spread_rows(
                x, (n * channels_in + c) * height * width, height, width, image, c * plane + edge, wide, cut_in
            )
        for block in range(blocks):
            start = block * products * _HEIGHT
            for t in range(tiles):
                _results_tile(weights, start, weight_steps, image, t * step, image_steps, results, t * step)
            for j in range(min(_HEIGHT, channels - block * _HEIGHT)):
                channel = block * _HEIGHT + j
                for row in range(rows):
                    of, to = j * tiles * step + row * wide, ((n * channels + channel) * rows + row) * columns
                    for _ in range(columns // len(piece)):
                        raise_piece(piece, results, of, bias[channel], out, to)
                        of, to = of + len(piece), to + len(piece)
                    raise_piece(rest, results, of, bias[channel], out, to)


@_compiled
def _backward_weight(dy, x, pad, dweight, cut_in, cut_out):  # type: ignore[no-untyped-def]
    """A tile is ``_CHANNELS`` channels of results and ``_TAPS`` places of the kernel, over some images at once."""
    images, channels_in, height, width = x.shape
    _, channels, rows, columns = dy.shape
    _, _, kernel_height, kernel_width = dweight.shape
    wide = width + 2 * pad[1]
    plane, edge = (height + 2 * pad[0]) * wide, pad[0] * wide + pad[1]
    lanes = _VECTOR_BYTES // x.itemsize
    length = (rows * wide + lanes - 1) // lanes * lanes  # of a channel of dy, with zeros up to the width of an image
    blocks = (channels + _CHANNELS - 1) // _CHANNELS
    taps = kernel_height * kernel_width
    groups = (taps + _TAPS - 1) // _TAPS
    steps = np.zeros((groups, _TAPS), np.int64)
    for tap in range(taps):
        steps[tap // _TAPS, tap % _TAPS] = tap // kernel_width * wide + tap % kernel_width
    some = max(1, min(images, _AT_ONCE // (channels_in * plane + blocks * _CHANNELS * length)))
    image = np.zeros(channels_in * some * plane + length, x.dtype)  # and zeros to read over the end
    gradients = np.zeros((blocks * _CHANNELS, some, length), x.dtype)
    sums = np.empty((_CHANNELS, _TAPS), x.dtype)
    dweight[:] = 0
    for first in range(0, images, some):
        now = min(some, images - first)
        for n in range(now):
            for c in range(channels_in):
                of, to = ((first + n) * channels_in + c) * height * width, (c * some + n) * plane + edge
                _spread_rows(x, of, height, width, image, to, wide, cut_in)
            for channel in range(channels):
                of, to = ((first + n) * channels + channel) * rows * columns, (channel * some + n) * length
                _spread_rows(dy, of, rows, columns, gradients, to, wide, cut_out)
        for block in range(blocks):
            start = block * _CHANNELS * some * length
            for c in range(channels_in):
                for group in range(groups):
                    at = c * some * plane
                    _weights_tile(gradients, start, some * length, image, at, steps[group], plane, now, length, sums)
                    for tap in range(group * _TAPS, min(taps, (group + 1) * _TAPS)):
                        for j in range(min(_CHANNELS, channels - block * _CHANNELS)):
                            of = sums[j, tap - group * _TAPS]
                            dweight[block * _CHANNELS + j, c, tap // kernel_width, tap % kernel_width] += of


@_compiled
def _spread_rows(source, start, rows, columns, target, to, step, cut):  # type: ignore[no-untyped-def]
    """Copy ``rows`` rows that lie one after the other so that each begins ``step`` numbers behind the last one."""
    piece, rest = cut
    for row in range(rows):
        of, at = start + row * columns, to + row * step
        for _ in range(columns // len(piece)):
            copy_piece(piece, source, of, target, at)
            of, at = of + len(piece), at + len(piece)
        copy_piece(rest, source, of, target, at)


@compiled(reorders_sums=True)
def _backward_bias(dy, dbias):  # type: ignore[no-untyped-def]
    for channel in range(dy.shape[1]):
        total = np.float64(0)
        for n in range(dy.shape[0]):
            plane = dy.dtype.type(0)
            for i in range(dy.shape[2]):
                plane += dy[n, channel, i]
            total += plane
        dbias[channel] = total
