"""Sums of gradients over ranks in float16: a quarter of the bytes, at the price of the bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from job.distributed.comm import Comm
from job.training.exact import ExactSum


class RoundedSum(ExactSum):
    """What a rank adds is summed exactly. Then it is scaled and rounded to float16 once, and Horovod sums float16.

    What comes of it depends on how many ranks there are, and with more than two on the order in which Horovod adds up.
    It is the same on all ranks.

    Args:
        comm, size, addends, dtype: see :class:`ExactSum`.
        kind: of what is added.
        scale: that of the step: a power of two, by which numbers are multiplied before they are rounded.
    """

    def __init__(self, comm: Comm, size: int, kind: str, addends: int, dtype: str, scale: Callable[[], float]) -> None:
        super().__init__(comm, size, (kind,), addends, dtype)
        self._kind, self._scale = kind, scale
        self._name = comm.fresh_name("rounded sum")

    def begin(self) -> None:
        own = self.read(0, self._size) * self._scale()
        if self.refused:
            own[0] = math.nan  # for all ranks to see
        with np.errstate(over="ignore"):
            self._total = self._comm.begin_sum(own.astype(np.float16), self._name)

    def finish(self) -> None:
        """Likewise; what float16 cannot hold is refused now."""
        total = self._total().astype(np.float64) / self._scale()
        self.clear()
        self.add(self._kind, 0, total)
