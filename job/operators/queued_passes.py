"""The passes of synchronized BatchNorm as work that is queued on the device of the arrays, and that nobody waits for.

Two classes do the same. :class:`Kernels` are those of ``batch_norm.cu``, compiled by MXNet while it runs, on GPUs.
:class:`Graphs` are MXNet's own operators, for any device: where kernels cannot be compiled, and for float16 on a CPU.

Activations have the shape (N, C, S), as in :mod:`job.operators.kernels`. Whatever has the size of a channel vector
stays on the device too, in float64:

    row of moments     (2C + 1,)  n mean, M2 + n mean^2, n: of a shard
    row of products    (2C,)      sum dy, sum dy (x - mean): of a shard
    table              (shards, width of a row)
    saved              (6, C)     mean, variance, 1 / std, scale, shift, n: what values are normalized by

No kernel was ever run on a GPU. What was tested instead: docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.ndarray import NDArray
from mxnet.symbol import Symbol

from job.operators.fused import RELU, has_loops

_THREADS = 256  # of a block
_BLOCKS = 1024  # of a grid at most, unless there are more channels: enough for the largest GPUs
_VALUES = 4096  # that a block reads at least
_TOLERANCE = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-10}  # of kernels against operators


class Options(NamedTuple):
    """Of one layer."""

    eps: float
    momentum: float
    fix_gamma: bool
    unbiased: bool
    updates_running: bool
    relu: bool


class QueuedPasses(Protocol):
    """What the operator needs of a device. Everything is queued; nothing waits."""

    tails: tuple[str, ...]  # what can be done behind BatchNorm in the same pass

    def moments(self, x: NDArray, row: NDArray) -> None:
        """Write a shard's row of moments."""

    def statistics(
        self, table: NDArray, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options
    ) -> NDArray:
        """``saved`` from the rows of a table, added up in their order; and update ``running``, mean and variance."""

    def given(self, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options) -> NDArray:
        """``saved`` from running statistics."""

    def affine(self, x: NDArray, saved: NDArray, y: NDArray, req: str, options: Options) -> None:
        """Normalize."""

    def products(
        self,
        dy: NDArray,
        x: NDArray,
        saved: NDArray,
        row: NDArray,
        gradients: Sequence[tuple[NDArray, str]],
        options: Options,
    ) -> None:
        """Write a shard's row of products, and the gradients of its gamma and beta, each as its request says."""

    def combine(
        self, dy: NDArray, x: NDArray, table: NDArray, saved: NDArray, dx: NDArray, req: str, options: Options
    ) -> None:
        """The gradient of ``x``; with a table of zeros none flows through the statistics."""


def queued_passes(ctx: mx.Context, dtype: Any) -> Optional[QueuedPasses]:
    """The fastest passes there are for arrays of that device and type; none where the CPU's compiled loops are faster.

    At its first call for a GPU it compiles and tries the kernels, and waits for that.
    """
    if has_loops(ctx, dtype):
        return None
    kernels = _tried_kernels(ctx, np.dtype(dtype).name) if ctx.device_type == "gpu" else None
    return kernels or Graphs(dtype)


@functools.cache
def _tried_kernels(ctx: mx.Context, dtype: str) -> Optional[Kernels]:
    """The kernels, if they can be compiled and loaded, and say what MXNet's operators say.

    Each of them is launched here, once: MXNet looks a kernel up at its first launch, which only one thread may do.
    Where they cannot be, neither can the operators that MXNet fuses itself, and compiles and loads in the same way: it
    is kept from that, or training would end in its first step.
    """
    try:
        kernels = Kernels(dtype)
        require_agreement(kernels, Graphs(dtype), ctx, dtype)
        return kernels
    except (mx.MXNetError, ValueError) as error:  # no CUDA_RTC in this MXNet; a driver older than 520.61
        os.environ.setdefault("MXNET_USE_FUSION", "0")  # which MXNet reads whenever it makes a graph
        reason = str(error).strip().splitlines()[-1]
        print(
            f"warning: {ctx}: the kernels of SyncBatchNorm cannot be used ({reason}); MXNet's operators do the same,"
            " slower",
            file=sys.stderr,
            flush=True,
        )
        return None


@contextlib.contextmanager
def locale_kept() -> Iterator[None]:
    """NVRTC leaves its thread with the locale C, in which Python takes text files for ASCII."""
    use = ctypes.CDLL(None).uselocale
    use.restype, use.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = use(None)
    try:
        yield
    finally:
        use(before)


class Kernels:
    """Launches what ``batch_norm.cu`` has, on arrays of a type.

    Raises:
        mxnet.MXNetError: it cannot be compiled here.
    """

    tails: tuple[str, ...] = (RELU,)

    def __init__(self, dtype: Any) -> None:
        data, wide = {"float16": ("__half", "float"), "float32": ("float",) * 2, "float64": ("double",) * 2}[
            np.dtype(dtype).name
        ]
        source = Path(__file__).with_name("batch_norm.cu").read_text()
        # The oldest GPUs that MXNet has code for; the driver compiles for the one that is there.
        options = ["--gpu-architecture=compute_50", "--std=c++14"]
        options += [f"-DDATA={data}", f"-DWIDE={wide}", f"-DTHREADS={_THREADS}"]
        with locale_kept():
            module = mx.rtc.CudaModule(source, options)
        self._kernels = {
            name: module.get_kernel(name, signature.replace("DATA", data).replace("WIDE", wide))
            for name, signature in re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', source)
        }

    def moments(self, x: NDArray, row: NDArray) -> None:
        channels, parts = _grid(x)
        partial = mx.nd.empty((channels, parts, 3), x.context, np.float64)
        self._over_values("moments", x, x, partial, *x.shape)
        self._over_channels("row_of_moments", channels, partial, row, channels, parts)

    def statistics(
        self, table: NDArray, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options
    ) -> NDArray:
        channels, saved = gamma.size, _new_saved(gamma)
        flags = (options.fix_gamma, options.unbiased, options.updates_running)
        numbers = (channels, len(table), options.eps, options.momentum, *map(int, flags))
        self._over_channels("statistics", channels, table, gamma, beta, *running, saved, *numbers)
        return saved

    def given(self, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options) -> NDArray:
        channels, saved = gamma.size, _new_saved(gamma)
        numbers = (channels, options.eps, int(options.fix_gamma))
        self._over_channels("given", channels, *running, gamma, beta, saved, *numbers)
        return saved

    def affine(self, x: NDArray, saved: NDArray, y: NDArray, req: str, options: Options) -> None:
        self._over_values("affine", x, x, saved, y, *x.shape, int(options.relu), int(req == "add"))

    def products(
        self,
        dy: NDArray,
        x: NDArray,
        saved: NDArray,
        row: NDArray,
        gradients: Sequence[tuple[NDArray, str]],
        options: Options,
    ) -> None:
        channels, parts = _grid(x)
        partial = mx.nd.empty((channels, parts, 2), x.context, np.float64)
        self._over_values("products", x, dy, x, saved, partial, *x.shape, int(options.relu))
        # One that nobody wants goes where nobody looks.
        targets = [
            mx.nd.empty(array.shape, x.context, array.dtype) if req == "null" else array for array, req in gradients
        ]
        numbers = (channels, parts, int(options.fix_gamma), *(int(req == "add") for _, req in gradients))
        self._over_channels("row_of_products", channels, partial, saved, row, *targets, *numbers)

    def combine(
        self, dy: NDArray, x: NDArray, table: NDArray, saved: NDArray, dx: NDArray, req: str, options: Options
    ) -> None:
        numbers = (*x.shape, len(table), int(options.relu), int(req == "add"))
        self._over_values("combine", x, dy, x, table, saved, dx, *numbers)

    def _over_values(self, name: str, x: NDArray, *arguments: Any) -> None:
        self._kernels[name].launch(arguments, x.context, (*_grid(x), 1), (_THREADS, 1, 1))

    def _over_channels(self, name: str, channels: int, *arguments: Any) -> None:
        blocks = -(-channels // _THREADS)
        self._kernels[name].launch(arguments, arguments[0].context, (blocks, 1, 1), (_THREADS, 1, 1))


def _grid(x: NDArray) -> tuple[int, int]:
    """Blocks for the channels of an array, and for the parts of each: from the shape alone, so that sums repeat."""
    rows, channels, length = x.shape
    return channels, max(1, min(_BLOCKS // channels, rows * length // _VALUES))


def _new_saved(gamma: NDArray) -> NDArray:
    return mx.nd.empty((6, gamma.size), gamma.context, np.float64)


class Graphs:
    """MXNet's operators, those of each pass as one graph: one call from Python, not forty."""

    tails: tuple[str, ...] = ()

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype).name
        self._wide = "float32" if self._dtype == "float16" else self._dtype
        self._graph = functools.cache(_Graph)

    def moments(self, x: NDArray, row: NDArray) -> None:
        count = x.shape[0] * x.shape[2]
        self._graph(_row_of_moments, wide=self._wide, count=count)(x, out=row)

    def statistics(
        self, table: NDArray, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options
    ) -> NDArray:
        graph = self._graph(_statistics, wide=self._wide, channels=gamma.size, options=options)
        saved, *updated = graph(table, gamma, beta, *running)
        for array, values in zip(running, updated if options.updates_running else ()):
            values.copyto(array)
        return saved

    def given(self, gamma: NDArray, beta: NDArray, running: Sequence[NDArray], options: Options) -> NDArray:
        return self._graph(_given, wide=self._wide, options=options)(gamma, beta, *running)

    def affine(self, x: NDArray, saved: NDArray, y: NDArray, req: str, options: Options) -> None:
        _put(self._graph(_affine, wide=self._wide, narrow=self._dtype), (x, saved), y, req)

    def products(
        self,
        dy: NDArray,
        x: NDArray,
        saved: NDArray,
        row: NDArray,
        gradients: Sequence[tuple[NDArray, str]],
        options: Options,
    ) -> None:
        graph = self._graph(_products, wide=self._wide, fix_gamma=options.fix_gamma)
        found, *slopes = graph(dy, x, saved)
        found.copyto(row)
        for (array, req), values in zip(gradients, slopes):
            if req == "add":
                array += values
            elif req != "null":
                values.copyto(array)

    def combine(
        self, dy: NDArray, x: NDArray, table: NDArray, saved: NDArray, dx: NDArray, req: str, options: Options
    ) -> None:
        _put(self._graph(_combine, wide=self._wide, narrow=self._dtype), (dy, x, table, saved), dx, req)


class _Graph:
    """What a function makes of symbols, as an operator on arrays; they are its positional arguments."""

    def __init__(self, build: Callable[..., Any], **constants: Any) -> None:
        parameters = inspect.signature(build).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
        built = build(*map(mx.sym.var, names), **constants)
        symbol = mx.sym.Group(built) if isinstance(built, list) else built
        self._order = [names.index(name) for name in symbol.list_inputs()]  # those that it uses, in its own order
        self._op = mx.nd.CachedOp(symbol)

    def __call__(self, *arrays: NDArray, out: Optional[NDArray] = None) -> Any:
        return self._op(*(arrays[place] for place in self._order), out=out)


def _put(graph: _Graph, arrays: Sequence[NDArray], target: NDArray, req: str) -> None:
    if req == "add":
        target += graph(*arrays)
    else:
        graph(*arrays, out=target)


def _row_of_moments(x: Symbol, *, wide: str, count: int) -> Symbol:
    x = x.astype(wide)
    rough = (_channel_sum(x) / count).astype(wide)
    deviation = mx.sym.broadcast_sub(x, _across(rough))
    # What rounding to the array's precision took from the mean is the mean of what is left.
    rest = _channel_sum(deviation) / count
    mean, m2 = rough.astype("float64") + rest, _channel_sum(deviation.square()) - count * rest.square()
    counts = mx.sym.ones_like(mean.slice_axis(axis=0, begin=0, end=1)) * count
    return mx.sym.concat(count * mean, m2 + count * mean.square(), counts, dim=0)


def _statistics(
    table: Symbol,
    gamma: Symbol,
    beta: Symbol,
    running_mean: Symbol,
    running_var: Symbol,
    *,
    wide: str,
    channels: int,
    options: Options,
) -> list[Symbol]:
    total = table.sum(axis=0)
    bounds = (0, channels, 2 * channels, 2 * channels + 1)
    first, second, count = (total.slice_axis(axis=0, begin=a, end=b) for a, b in zip(bounds, bounds[1:]))
    mean = mx.sym.broadcast_div(first, count)
    var = mx.sym.broadcast_div(second, count) - mean.square()
    var = mx.sym.where(var < 0, mx.sym.zeros_like(var), var)  # rounding may leave a constant channel there; NaN stays
    unbiased = mx.sym.broadcast_mul(var, count / mx.sym.broadcast_maximum(count - 1, mx.sym.ones_like(count)))
    estimate = unbiased if options.unbiased else var
    counts = mx.sym.broadcast_mul(mx.sym.ones_like(mean), count)
    saved = _saved(mean, var, estimate, counts, gamma, beta, wide, options)
    keep, take = options.momentum, 1 - options.momentum
    updated = [
        (keep * old.astype("float64") + take * new).astype(wide)
        for old, new in ((running_mean, mean), (running_var, estimate))
    ]
    return [saved, *updated]


def _given(
    gamma: Symbol, beta: Symbol, running_mean: Symbol, running_var: Symbol, *, wide: str, options: Options
) -> Symbol:
    mean, var = running_mean.astype("float64"), running_var.astype("float64")
    return _saved(mean, var, var, mx.sym.ones_like(mean), gamma, beta, wide, options)


def _saved(
    mean: Symbol,
    var: Symbol,
    estimate: Symbol,
    counts: Symbol,
    gamma: Symbol,
    beta: Symbol,
    wide: str,
    options: Options,
) -> Symbol:
    inverse_std = 1 / (var + options.eps).sqrt()
    scale = inverse_std if options.fix_gamma else gamma.astype("float64") * inverse_std
    shift = beta.astype("float64") - (mean - mean.astype(wide).astype("float64")) * scale
    return mx.sym.stack(mean, estimate, inverse_std, scale, shift, counts, axis=0)


def _affine(x: Symbol, saved: Symbol, *, wide: str, narrow: str) -> Symbol:
    mean, scale, shift = (_across(_saved_row(saved, name).astype(wide)) for name in ("mean", "scale", "shift"))
    deviation = mx.sym.broadcast_sub(x.astype(wide), mean)
    return mx.sym.broadcast_add(mx.sym.broadcast_mul(deviation, scale), shift).astype(narrow)


def _products(dy: Symbol, x: Symbol, saved: Symbol, *, wide: str, fix_gamma: bool) -> list[Symbol]:
    mean = _saved_row(saved, "mean")
    center = mean.astype(wide)
    dy, deviation = dy.astype(wide), mx.sym.broadcast_sub(x.astype(wide), _across(center))
    dbeta = _channel_sum(dy)
    product = _channel_sum(dy * deviation) - (mean - center.astype("float64")) * dbeta
    dgamma = mx.sym.zeros_like(product) if fix_gamma else product * _saved_row(saved, "inverse_std")
    return [mx.sym.concat(dbeta, product, dim=0), dgamma.astype(wide), dbeta.astype(wide)]


def _combine(dy: Symbol, x: Symbol, table: Symbol, saved: Symbol, *, wide: str, narrow: str) -> Symbol:
    dbeta, product = (half for half in table.sum(axis=0).split(axis=0, num_outputs=2))
    mean, inverse_std, scale, count = (_saved_row(saved, name) for name in ("mean", "inverse_std", "scale", "count"))
    center = mean.astype(wide)
    b = -scale * inverse_std.square() * product / count
    c = -scale * dbeta / count - (mean - center.astype("float64")) * b
    a, b, c, center = (_across(vector.astype(wide)) for vector in (scale, b, c, center))
    deviation = mx.sym.broadcast_sub(x.astype(wide), center)
    dx = mx.sym.broadcast_mul(dy.astype(wide), a) + mx.sym.broadcast_mul(deviation, b)
    return mx.sym.broadcast_add(dx, c).astype(narrow)


_SAVED = ("mean", "variance", "inverse_std", "scale", "shift", "count")


def _saved_row(saved: Symbol, name: str) -> Symbol:
    place = _SAVED.index(name)
    return saved.slice_axis(axis=0, begin=place, end=place + 1).reshape((-1,))


def _across(vector: Symbol) -> Symbol:
    return vector.reshape((1, -1, 1))


def _channel_sum(x: Symbol) -> Symbol:
    """(C,) in float64."""
    return x.sum(axis=2).astype("float64").sum(axis=0)


def require_agreement(passes: QueuedPasses, reference: QueuedPasses, ctx: mx.Context, dtype: str) -> None:
    """Compare what two implementations make of a small batch of two shards. Waits for both.

    Raises:
        ValueError: they differ by more than rounding.
    """
    with autograd.pause():
        pairs = zip(_trial(passes, ctx, dtype), _trial(reference, ctx, dtype))
    for name, (found, expected) in zip(("y", "dx", "inference", "dgamma", "dbeta", "mean", "variance"), pairs):
        if not np.allclose(found, expected, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]):
            raise ValueError(f"their {name} of a trial is off by {np.abs(found - expected).max():.1g}")


def _trial(passes: QueuedPasses, ctx: mx.Context, dtype: str) -> list[np.ndarray]:
    wide = "float32" if dtype == "float16" else dtype
    draw = np.random.default_rng(0).normal
    options = Options(1e-5, 0.5, fix_gamma=False, unbiased=True, updates_running=True, relu=False)
    xs, dys = ([mx.nd.array(draw(1, 2, (n, 3, 1500)), ctx, dtype) for n in (5, 2)] for _ in range(2))
    gamma, beta, *running = (mx.nd.array(draw(1, 0.3, 3), ctx, wide) for _ in range(4))
    dgamma, dbeta = (mx.nd.zeros(3, ctx, wide) for _ in range(2))

    table = mx.nd.zeros((2, 7), ctx, np.float64)
    for k, x in enumerate(xs):
        passes.moments(x, table[k])
    saved = passes.statistics(table, gamma, beta, running, options)
    table, out = mx.nd.zeros((2, 6), ctx, np.float64), [mx.nd.ones_like(xs[k]) for k in (0, 0, 1)]
    for k, (x, dy) in enumerate(zip(xs, dys)):
        passes.products(dy, x, saved, table[k], [(dgamma, "add"), (dbeta, "add")], options)
    passes.affine(xs[0], saved, out[0], "write", options)
    passes.combine(dys[0], xs[0], table, saved, out[1], "write", options)
    passes.affine(xs[1], passes.given(gamma, beta, running, options), out[2], "add", options)
    return [array.asnumpy().astype(np.float64) for array in (*out, dgamma, dbeta, *running)]
