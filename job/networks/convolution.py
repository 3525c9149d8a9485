"""Convolution in loops of our own, for numbers of channels that MXNet's library has no kernels for.

oneDNN's fast convolutions want channels in multiples of a vector; for others, such as the 20 and 50 of the tutorial's
network, it copies each image out into a matrix and multiplies. These loops read the image where it is: a tile of
results stays in registers while all products that belong to it are added (Georganas et al., "Anatomy of
high-performance deep learning convolutions on SIMD architectures", 2018). Stride 1, no dilation, no groups.

Every result is added up in one order, by itself: no other result, and no other shard, has a part in it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from job.networks.compiled import compiled

AVAILABLE = not numba.config.DISABLE_JIT  # the inner loop is machine code and nothing else

_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
_VECTOR_BYTES = 64 if _WIDE else 32
_VECTORS = 2  # of results side by side in a tile; its height fills the registers
_HEIGHT, _TAPS = (10, 9) if _WIDE else (6, 5)


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
    _forward(x, weight.weights, weight.kernel, bias, pad, out)


def backward_data(dy: np.ndarray, turned: Packed, pad: tuple[int, int], dx: np.ndarray) -> None:
    """Fill ``dx``, like ``x`` of :func:`forward`, from the gradient ``dy`` of its ``out``.

    ``turned`` is of :func:`turn`, ``pad`` is that of forward.
    """
    height, width = turned.kernel
    around = (height - 1 - pad[0], width - 1 - pad[1])
    _forward(dy, turned.weights, turned.kernel, np.zeros(dx.shape[1], dx.dtype), around, dx)


def backward_weight(dy: np.ndarray, x: np.ndarray, pad: tuple[int, int], dweight: np.ndarray) -> None:
    """Fill ``dweight``, like the weight of :func:`forward`, from its ``x`` and the gradient ``dy`` of its ``out``."""
    _backward_weight(dy, x, pad, dweight)


def backward_bias(dy: np.ndarray, dbias: np.ndarray) -> None:
    """Fill ``dbias`` (channels out,) from the gradient ``dy`` of :func:`forward`'s ``out``."""
    _backward_bias(dy.reshape(*dy.shape[:2], -1), dbias)


def _tile(height: int) -> Any:
    """The inner loop: ``out[j, v] = sum over k of a[a_start + a_steps[k] + j_steps[j]] * b[b_start + b_steps[k] + v]``.

    For ``height`` j, and v of _VECTORS vectors: what is added up is held in registers. ``out`` is (height, anything),
    and is written to from column ``out_start`` on.
    """

    @intrinsic
    def tile(_, a, a_start, a_steps, j_steps, b, b_start, b_steps, out, out_start):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            number = context.get_data_type(signature.args[0].dtype)
            lanes = _VECTOR_BYTES * 8 // signature.args[0].dtype.bitwidth
            vector = ir.VectorType(number, lanes)
            integer = ir.IntType(64)

            def constant(value: int) -> ir.Constant:
                return ir.Constant(integer, value)

            def data(index: int) -> Any:
                return make_array(signature.args[index])(context, builder, arguments[index])

            def as_vector(pointer: Any) -> Any:
                return builder.bitcast(pointer, vector.as_pointer())

            def spread(scalar: Any) -> Any:
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            first = builder.gep(data(0).data, [arguments[1]])
            second = builder.gep(data(4).data, [arguments[5]])
            steps, second_steps, target = data(2), data(6).data, data(7)
            across = [builder.load(builder.gep(data(3).data, [constant(j)])) for j in range(height)]
            sums = [
                [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(_VECTORS)]
                for _ in range(height)
            ]
            for row in sums:
                for place in row:
                    builder.store(ir.Constant(vector, None), place)
            with cgutils.for_range(builder, builder.extract_value(steps.shape, 0)) as loop:
                a_k = builder.gep(first, [builder.load(builder.gep(steps.data, [loop.index]))])
                b_k = builder.gep(second, [builder.load(builder.gep(second_steps, [loop.index]))])
                columns = []
                for v in range(_VECTORS):
                    columns.append(builder.load(as_vector(builder.gep(b_k, [constant(v * lanes)])), align=4))
                for row, step in zip(sums, across):
                    scalar = spread(builder.load(builder.gep(a_k, [step])))
                    for place, column in zip(row, columns):
                        product = builder.fmul(scalar, column, flags=("contract",))
                        builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)
            for j, row in enumerate(sums):
                for v, place in enumerate(row):
                    line = builder.mul(constant(j), builder.extract_value(target.shape, 1))
                    place_out = builder.add(builder.add(line, arguments[8]), constant(v * lanes))
                    builder.store(builder.load(place), as_vector(builder.gep(target.data, [place_out])), align=4)
            return context.get_dummy_value()

        return types.void(a, types.intp, a_steps, j_steps, b, types.intp, b_steps, out, types.intp), generate

    return tile


_results_tile = _tile(_HEIGHT)
_weights_tile = _tile(_TAPS)
_compiled = compiled(reorders_sums=False)


@_compiled
def _forward(x, packed, kernel, bias, pad, out):  # type: ignore[no-untyped-def]
    """A tile is ``_HEIGHT`` channels of results that lie one after the other in memory, over the ends of rows too."""
    images, channels_in, height, width = x.shape
    _, channels, rows, columns = out.shape
    blocks, products, _ = packed.shape
    wide = width + 2 * pad[1]
    plane = (height + 2 * pad[0]) * wide
    length = (rows - 1) * wide + columns
    step = _VECTORS * _VECTOR_BYTES // x.itemsize
    tiles = (length + step - 1) // step
    image = np.zeros(channels_in * plane + tiles * step, x.dtype)  # zeros around it, and behind it to read over the end
    weights = packed.ravel()
    weight_steps = np.arange(products) * _HEIGHT
    across = np.arange(_HEIGHT)
    image_steps = np.empty(products, np.int64)
    k = 0
    for c in range(channels_in):
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                image_steps[k] = c * plane + i * wide + j
                k += 1
    results = np.empty((_HEIGHT, tiles * step), x.dtype)
    for n in range(images):
        _frame(x[n], pad, image)
        for block in range(blocks):
            for t in range(tiles):
                start = block * products * _HEIGHT
                _results_tile(weights, start, weight_steps, across, image, t * step, image_steps, results, t * step)
            for j in range(min(_HEIGHT, channels - block * _HEIGHT)):
                channel = block * _HEIGHT + j
                for row in range(rows):
                    for column in range(columns):
                        out[n, channel, row, column] = results[j, row * wide + column] + bias[channel]


@_compiled
def _backward_weight(dy, x, pad, dweight):  # type: ignore[no-untyped-def]
    """A tile is ``_TAPS`` places of the kernel, for some channels of results; images are added one by one."""
    images, channels_in, height, width = x.shape
    _, channels, rows, columns = dy.shape
    _, _, kernel_height, kernel_width = dweight.shape
    wide = width + 2 * pad[1]
    plane = (height + 2 * pad[0]) * wide
    step = _VECTORS * _VECTOR_BYTES // x.itemsize
    blocks = (channels + step - 1) // step
    taps = kernel_height * kernel_width
    image = np.zeros(channels_in * plane, x.dtype)
    turned = np.zeros(rows * columns * blocks * step, x.dtype)  # dy with the channels last, and filled up
    image_steps = np.empty(rows * columns, np.int64)
    turned_steps = np.arange(rows * columns) * (blocks * step)
    for row in range(rows):
        for column in range(columns):
            image_steps[row * columns + column] = row * wide + column
    groups = (taps + _TAPS - 1) // _TAPS
    across = np.zeros((groups, _TAPS), np.int64)
    for tap in range(taps):
        across[tap // _TAPS, tap % _TAPS] = tap // kernel_width * wide + tap % kernel_width
    sums = np.zeros((blocks, channels_in, groups, _TAPS, step), x.dtype)
    results = np.empty((_TAPS, step), x.dtype)
    for n in range(images):
        _frame(x[n], pad, image)
        for row in range(rows):
            for column in range(columns):
                place = (row * columns + column) * blocks * step
                for channel in range(channels):
                    turned[place + channel] = dy[n, channel, row, column]
        for block in range(blocks):
            for c in range(channels_in):
                for group in range(groups):
                    _weights_tile(
                        image, c * plane, image_steps, across[group], turned, block * step, turned_steps, results, 0
                    )
                    for i in range(_TAPS):
                        for j in range(step):
                            sums[block, c, group, i, j] += results[i, j]
    for channel in range(channels):
        for c in range(channels_in):
            for tap in range(taps):
                total = sums[channel // step, c, tap // _TAPS, tap % _TAPS, channel % step]
                dweight[channel, c, tap // kernel_width, tap % kernel_width] = total


@_compiled
def _frame(x, pad, image):  # type: ignore[no-untyped-def]
    """Copy an image (channels, height, width) into one with zeros around it."""
    channels, height, width = x.shape
    wide = width + 2 * pad[1]
    plane = (height + 2 * pad[0]) * wide
    for c in range(channels):
        for i in range(height):
            place = c * plane + (i + pad[0]) * wide + pad[1]
            for j in range(width):
                image[place + j] = x[c, i, j]


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
