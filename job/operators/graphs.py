"""The passes of :mod:`job.operators.queued_passes` as MXNet's own operators, for any device.

They are for where kernels cannot be compiled, and for float16 on a CPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Optional

import mxnet as mx
import numpy as np
from mxnet.ndarray import NDArray
from mxnet.symbol import Symbol

from job.operators.queued_passes import Options


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
