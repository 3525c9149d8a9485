"""The passes of synchronized BatchNorm as work that is queued on the device of the arrays, and that nobody waits for.

Two classes have them: :class:`job.operators.cuda_kernels.Kernels` and :class:`job.operators.graphs.Graphs`.
:mod:`job.operators.tried_passes` chooses.

Activations have the shape (N, C, S), as in :mod:`job.operators.kernels`. Whatever has the size of a channel vector
stays on the device too, in float64:

    row of moments     (2C + 1,)  n mean, M2 + n mean^2, n: of a shard
    row of products    (2C,)      sum dy, sum dy (x - mean): of a shard
    table              (shards, width of a row)
    saved              (6, C)     mean, variance, 1 / std, scale, shift, n: what values are normalized by
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mxnet.ndarray import NDArray


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
