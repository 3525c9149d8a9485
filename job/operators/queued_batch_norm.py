"""Synchronized BatchNorm as work that is queued on a GPU: neither forward nor backward waits for anything.

The mathematics is in :mod:`job.operators.batch_norm`; this is the same with all numbers on the device, summed over
ranks there.

MXNet takes the operator for done when everything that is written into its outputs is done. It does not know what is
only read, and may overwrite an input that a queued pass has yet to read. So one rule holds here: **what follows from
the last reading of an input is written to an output, or waited for.** An array waits for those that it is computed
from, so each loop below ends with such a write for each shard, or else waits.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Optional

import mxnet as mx
import numpy as np

from job.operators.group import Fill, Group
from job.operators.kernels import flat_shape
from job.operators.queued_passes import Options, QueuedPasses


class QueuedOp(mx.operator.CustomOp):
    """One use of a layer in a forward pass, and its backward. Its arrays: :mod:`job.operators.queued_passes`."""

    def __init__(
        self, group: Group, layer: str, shards: int, axis: int, options: Options, passes: QueuedPasses
    ) -> None:
        super().__init__()
        self._group, self._layer, self._shards, self._axis = group, layer, shards, axis
        self._options, self._passes = options, passes
        self._saved: list[mx.nd.NDArray] = []  # of each shard; those that share statistics have one
        self._answer: Optional[int] = None  # the number of the allreduce of backward; none after inference

    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        n = self._shards
        xs, ys, gamma, beta = self._flat(in_data[:n]), self._flat(out_data), in_data[n], in_data[2 * n]
        if is_train:
            self._saved = self._synchronized(xs, gamma, beta, aux)
            self._answer = self._group.number_backward(self._layer)
        else:
            self._saved = [self._passes.given(gamma, beta, aux, self._options)] * n
            self._answer = None
        for x, saved, y, how in zip(xs, self._saved, ys, req):
            if how == "null":
                self.wait(saved)
            else:
                self._passes.affine(x, saved, y, how, self._options)

    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        n = self._shards
        xs, dys, dxs = self._flat(in_data[:n]), self._flat(out_grad), self._flat(in_grad[:n])
        gradients = [[(in_grad[place], req[place]) for place in (n + k, 2 * n + k)] for k in range(n)]

        def fill(k: int, row: mx.nd.NDArray) -> None:
            self._passes.products(dys[k], xs[k], self._saved[k], row, gradients[k], self._options)

        tables = self._totals(2 * xs[0].shape[1], xs[0].context, fill)
        for k, table in enumerate(tables):
            if req[k] == "null":
                self.wait(table)  # also, because the next backward gives its allreduce the same name
            else:
                self._passes.combine(dys[k], xs[k], table, self._saved[k], dxs[k], req[k], self._options)

    def wait(self, array: mx.nd.NDArray) -> None:
        """For that from which no output follows. It keeps a thread of MXNet's that has nothing else to do."""
        with suppress(mx.MXNetError):  # of a rank that has failed, the training loop is told by its next sum
            array.wait_to_read()

    def _synchronized(self, xs: list[Any], gamma: Any, beta: Any, aux: list[Any]) -> list[mx.nd.NDArray]:
        def fill(k: int, row: mx.nd.NDArray) -> None:
            self._passes.moments(xs[k], row)

        width = 2 * xs[0].shape[1] + 1
        tables = self._group.queue_totals(f"{self._layer}.forward", width, xs[0].context, fill)
        found = {
            id(table): self._passes.statistics(table, gamma, beta, aux, self._options)
            for table in {id(table): table for table in tables}.values()
        }
        saved = [found[id(table)] for table in tables]
        if not self._group.whole:
            self._group.moments.setdefault(self._layer, []).append([of_shard[:2] for of_shard in saved])
        return saved

    def _totals(self, width: int, ctx: mx.Context, fill: Fill) -> list[mx.nd.NDArray]:
        """The table of each shard."""
        if self._answer is not None:
            name = f"{self._layer}.backward.{self._answer}"
            self._group.unanswered[self._layer].discard(self._answer)
            return self._group.queue_totals(name, width, ctx, fill)
        tables = [mx.nd.zeros((1, width), ctx, np.float64) for _ in range(self._shards)]
        for k, table in enumerate(tables):
            fill(k, table[0])
            table[:] = 0  # nothing flows through statistics that were given; after the reading: see the rule above
        return tables

    def _flat(self, arrays: list[mx.nd.NDArray]) -> list[mx.nd.NDArray]:
        return [array.reshape(flat_shape(array.shape, self._axis)) for array in arrays]
