"""Shards that share statistics, and how their tables are summed over the ranks that hold them."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm
from job.errors import PeerLostError

# MXNet hands a custom operator nothing but strings, so that it finds its group by name. Groups stay: an operator may
# outlive whoever made it.
GROUPS: dict[str, Group] = {}

Fill = Callable[[int, mx.nd.NDArray], None]  # queue what writes the row of one of this rank's shards


class Group:
    """The shards that share statistics, and which of them are this rank's.

    Args:
        comm: the ranks that hold the shards.
        own: this rank's shards.
        shards: how many there are on all ranks.
        size: how many shards, one after the other, share statistics; by default all of them. Nothing is communicated
            of those that one rank holds. Where it is not all, whoever trains updates the running statistics from
            :attr:`moments`. Ranks make their groups in the same order.
        unbiased: whether running_var takes the unbiased estimate of the variance, n / (n - 1) times the biased one by
            which the batch is normalized. MXNet itself takes the biased one on the CPU, the unbiased one with cuDNN.
    """

    def __init__(self, comm: Comm, own: range, shards: int, size: Optional[int] = None, unbiased: bool = False) -> None:
        self.comm = comm
        self.own = own
        self.shards = shards
        self.whole = size is None or size >= shards  # whether the statistics are those of all shards
        self.unbiased = unbiased
        self.key = f"{comm.fresh_name('batch_norm')}.{id(self)}"
        self.moments: dict[str, list[Sequence[Any]]] = {}  # by layer: of each forward and shard (2, C), if not whole
        self.unanswered: dict[str, set[int]] = {}  # by layer: numbers of the forwards whose backward is still to come
        self._name = self.key.rpartition(".")[0]  # the same on all ranks
        self._sharing = [(range(shards), comm)] if self.whole else _sharing(comm, own, shards, size or shards)
        GROUPS[self.key] = self
        # What is still queued when a script ends needs Python and the other ranks: without them it aborts or hangs.
        # This is registered after the hooks of MXNet and of Horovod, and so runs before them.
        atexit.register(mx.nd.waitall)

    def total(self, name: str, rows: np.ndarray) -> np.ndarray:
        """For each of this rank's shards the sum that concerns it, (len(own), width), from ``rows`` of that shape.

        Waits for the other ranks. NaN if one has failed.
        """
        result = np.empty_like(rows)
        for sharing, here, comm, full_name in self._parts(name):
            table = np.zeros((len(sharing), rows.shape[1]))
            mine = slice(here.start - self.own.start, here.stop - self.own.start)
            table[here.start - sharing.start : here.stop - sharing.start] = rows[mine]
            try:
                table = comm.sum(table, full_name)
            except PeerLostError:
                # Raised here, MXNet would print it with a traceback. Nothing is gained by these numbers: the next
                # collective, that of the gradients, fails too and stops the caller, before any weight has changed.
                table = np.full_like(table, np.nan)
            # One after the other: numpy's own sum would be as exact, but in an order that it does not promise.
            result[mine] = functools.reduce(np.add, table)
        return result

    def queue_totals(self, name: str, width: int, ctx: mx.Context, fill: Fill) -> list[mx.nd.NDArray]:
        """For each of this rank's shards the table that concerns it, (shards, width) in float64 on the device.

        Shards that share statistics have one table. ``fill(k, row)`` queues what writes the row of own shard k. Nothing
        waits; if a rank has failed, whoever waits for what is computed from a table is told.
        """
        tables: list[mx.nd.NDArray] = []
        for sharing, here, comm, full_name in self._parts(name):
            table = mx.nd.zeros((len(sharing), width), ctx, np.float64)
            for shard in here:
                fill(shard - self.own.start, table[shard - sharing.start])
            comm.allreduce_([table], full_name)
            tables += [table] * len(here)
        return tables

    def take_moments(self, layer: str) -> list[list[np.ndarray]]:
        """Of each forward since the last call, if statistics are not :attr:`whole`: of each own shard (2, channels)."""
        forwards = self.moments.pop(layer)
        return [[v.asnumpy() if isinstance(v, mx.nd.NDArray) else v for v in shards] for shards in forwards]

    def number_backward(self, layer: str) -> int:
        """A number for the backward of the forward that calls this, which then is in :attr:`unanswered`.

        The backwards of a layer that is used twice may run side by side, and each needs a name for its allreduce that
        is the same on all ranks. Forward writes the running statistics, so MXNet's engine runs the forwards of a layer
        one by one in the program's order, and never beside a backward: the smallest free number is the same.
        """
        unanswered = self.unanswered.setdefault(layer, set())
        number = next(index for index in range(len(unanswered) + 1) if index not in unanswered)
        unanswered.add(number)
        return number

    def _parts(self, name: str) -> Iterator[tuple[range, range, Comm, str]]:
        """Shards that share statistics, those of them that are this rank's, and who sums their table by which name."""
        for sharing, comm in self._sharing:
            here = range(max(sharing.start, self.own.start), min(sharing.stop, self.own.stop))
            yield sharing, here, comm, f"{self._name}.{name}" + ("" if self.whole else f".{sharing.start}")


def _sharing(comm: Comm, own: range, shards: int, size: int) -> list[tuple[range, Comm]]:
    """The groups of shards that a rank has some of, and the ranks that have the others."""
    table = np.zeros((comm.size, 2))
    table[comm.rank] = own.start, own.stop
    held = [range(int(start), int(stop)) for start, stop in comm.sum(table, comm.fresh_name("shards"))]
    found = []
    for start in range(0, shards, size):
        sharing = range(start, min(start + size, shards))
        ranks = [rank for rank, of in enumerate(held) if of.start < sharing.stop and sharing.start < of.stop]
        subset = comm.subset(ranks) if len(ranks) > 1 else Comm()
        if comm.rank in ranks:
            found.append((sharing, subset))
    return found
