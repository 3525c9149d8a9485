"""The device path on arrays of the CPU: with the GPU's own kernels, run by the stand-in, or with MXNet's operators."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import mxnet as mx
import numpy as np
from mxnet.base import _LIB

from job.operators import batch_norm
from job.operators.cuda_kernels import Kernels
from job.operators.graphs import Graphs
from job.operators.queued_batch_norm import QueuedOp
from job.operators.queued_passes import QueuedPasses
from tests.cuda import stand_in

# What has a thread wait for MXNet's engine, or reads and writes the memory of an array.
WAITS = ["AsyncCopyToCPU", "SyncCopyToCPU", "SyncCopyFromCPU", "SyncCopyFromNDArray", "WaitToRead", "WaitToWrite"]
WAITS += ["WaitAll", "GetData", "Save"]


@functools.cache
def passes_of(kind: str, dtype: str) -> QueuedPasses:
    """``kernels`` or ``graphs``."""
    return kernels(dtype) if kind == "kernels" else Graphs(dtype)


def kernels(dtype: str) -> Kernels:
    """Of the stand-in."""
    real = mx.rtc.CudaModule
    mx.rtc.CudaModule = stand_in.CudaModule
    try:
        return Kernels(dtype)
    finally:
        mx.rtc.CudaModule = real


@contextmanager
def queued(kind: str, change: Callable[[QueuedPasses], Any] = lambda passes: passes) -> Iterator[None]:
    """Let operators that are made in here be those of the device path."""
    whole = batch_norm.queued_passes
    batch_norm.queued_passes = lambda ctx, dtype: change(passes_of(kind, np.dtype(dtype).name))
    try:
        yield
        mx.nd.waitall()
        assert not stand_in.failures
    finally:
        batch_norm.queued_passes = whole


@contextmanager
def counted_waits() -> Iterator[dict[str, int]]:
    """How often the operators of the device path wait for MXNet, by what they call; and how often they run."""
    counts = {"forward": 0, "backward": 0}
    inside = threading.local()
    real = {f"MXNDArray{name}": getattr(_LIB, f"MXNDArray{name}", None) for name in WAITS}
    methods = {name: getattr(QueuedOp, name) for name in ("forward", "backward")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if getattr(inside, "operator", False):
                counts[name] = counts.get(name, 0) + 1
            return real[name](*arguments)

        return call

    def marked(name: str) -> Callable[..., None]:
        def run(self: QueuedOp, *arguments: Any, **named: Any) -> None:
            inside.operator = True
            try:
                methods[name](self, *arguments, **named)
            finally:
                inside.operator = False
            counts[name] += 1

        return run

    for name in [name for name in real if real[name]]:
        setattr(_LIB, name, counting(name))
    for name in methods:
        setattr(QueuedOp, name, marked(name))
    try:
        yield counts
    finally:
        for name, function in real.items():
            if function:
                setattr(_LIB, name, function)
        for name, method in methods.items():
            setattr(QueuedOp, name, method)
