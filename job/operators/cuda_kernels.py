"""The passes of :mod:`job.operators.queued_passes` as CUDA kernels, which MXNet compiles while it runs.

No kernel was ever run on a GPU. What was tested instead: docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.ndarray import NDArray

from job.operators.fused import RELU
from job.operators.queued_passes import Options

_THREADS = 256  # of a block
_BLOCKS = 1024  # of a grid at most, unless there are more channels: enough for the largest GPUs
_VALUES = 4096  # that a block reads at least


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
