"""Which queued passes there are for a device: kernels, if they can be compiled and say what MXNet's operators say."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, Optional

import mxnet as mx
import numpy as np
from mxnet import autograd

from job.operators.cuda_kernels import Kernels
from job.operators.fused import has_loops
from job.operators.graphs import Graphs
from job.operators.queued_passes import Options, QueuedPasses

_TOLERANCE = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-10}  # of kernels against operators


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
