"""How long a step takes each rank, and how much of that it waits for the others: who holds everybody up."""

from __future__ import annotations

import os
import time
from typing import Any

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Pace:
    """Times the steps of this rank, until :meth:`gather` puts those of all ranks side by side.

    A step lasts from when the one before it was done (from its start, if nothing was under way) until it is done. All
    ranks step together, so that a step lasts equally long on all, and only what it is spent on tells them apart: a rank
    *waits* while it is blocked in a collective, and the rest is its *own* time, for samples, arithmetic and Python.
    The slow rank is the one with the most own time; the others wait for it.

    Args:
        comm: the ranks.
        ctx: the device of this rank; all have the same kind.
    """

    def __init__(self, comm: Comm, ctx: mx.Context) -> None:
        self._comm, self._ctx = comm, ctx
        self._seconds: list[float] = []  # of each step
        self._waited = 0.0  # in all of them
        self._images = 0
        self._mark = self._now()

    def start(self) -> None:
        """A step begins, and nothing was under way."""
        self._mark = self._now()

    def done(self) -> None:
        """A step is done."""
        before, self._mark = self._mark, self._now()
        self._seconds.append(self._mark[0] - before[0])
        self._waited += self._mark[1] - before[1]

    def count(self, images: int) -> None:
        """This rank has trained on so many samples more."""
        self._images += images

    def gather(self) -> dict[str, Any]:
        """What each rank did since the last call, in lists by rank. All ranks call it together; it waits for them.

        ``compute_seconds`` and ``wait_seconds`` are means of a step; ``images_per_second`` is what the rank would reach
        if it never waited; ``rss_bytes`` is its memory now, ``gpu_bytes``, if it has a GPU, what is in use there. The
        percentiles are those of this rank's steps.
        """
        total = sum(self._seconds)
        own = max(total - self._waited, 0.0)
        table = np.zeros((self._comm.size, 6))
        memory = resident_bytes(), gpu_bytes(self._ctx)
        table[self._comm.rank] = len(self._seconds), own, self._waited, self._images, *memory
        steps, own_seconds, waited, images, resident, on_gpu = self._comm.sum(table, "pace").T
        p50, p99 = np.percentile(self._seconds or [0.0], [50, 99])
        self._seconds, self._waited, self._images = [], 0.0, 0
        return {
            "step_seconds_p50": float(p50),
            "step_seconds_p99": float(p99),
            "compute_seconds": _ratios(own_seconds, steps),
            "wait_seconds": _ratios(waited, steps),
            "images_per_second": _ratios(images, own_seconds),
            "rss_bytes": resident.astype(int).tolist(),
            **({"gpu_bytes": on_gpu.astype(int).tolist()} if on_gpu.any() else {}),
        }

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), self._comm.blocked_seconds


def resident_bytes() -> int:
    """The memory that this process holds in RAM."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def gpu_bytes(ctx: mx.Context) -> int:
    """The memory of a GPU that is in use, by whichever process; none of a CPU."""
    if ctx.device_type != "gpu":
        return 0
    free, total = mx.context.gpu_memory_info(ctx.device_id)
    return int(total - free)


def _ratios(values: np.ndarray, by: np.ndarray) -> list[float]:
    return [float(value / divisor) if divisor else 0.0 for value, divisor in zip(values, by)]
