"""Loss and accuracy as exact sums, so that they mean the same for any number of ranks and any split of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm


@dataclass(frozen=True)
class Totals:
    """Sums over samples."""

    loss_sum: float = 0.0
    correct: float = 0.0
    count: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.loss_sum + other.loss_sum, self.correct + other.correct, self.count + other.count)

    @property
    def loss(self) -> float:
        """The mean loss of a sample."""
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        """The fraction of samples that are classified right."""
        return self.correct / self.count if self.count else math.nan


class Meter:
    """Collects sums on the device, without waiting for it, until :meth:`reduce` asks for them."""

    def __init__(self, comm: Comm, name: str) -> None:
        self._comm = comm
        self._name = name
        self._pending: list[tuple[mx.nd.NDArray, int]] = []
        self._local = np.zeros(3)  # loss, correct, count on this rank, of what is no longer pending

    def add(self, losses: mx.nd.NDArray, logits: mx.nd.NDArray, labels: mx.nd.NDArray) -> None:
        """Add samples: losses (n,), logits (n, classes) and labels (n,), on this rank."""
        correct = (logits.argmax(axis=1) == labels).sum()
        self._pending.append((mx.nd.concat(losses.sum(), correct, dim=0), len(labels)))

    def drop(self, additions: int) -> None:
        """Forget the last so many additions."""
        del self._pending[len(self._pending) - additions :]

    def reduce(self) -> Totals:
        """The sums over all ranks of what was added since the last call, in float64. Waits for the device."""
        self._settle()
        totals = Totals(*self._comm.sum(self._local, self._name))
        self._local = np.zeros(3)
        return totals

    def state_dict(self) -> dict[str, Any]:
        """What each rank has added since :meth:`reduce`. All ranks call it; it waits for the device."""
        self._settle()
        by_rank = np.zeros((self._comm.size, 3))
        by_rank[self._comm.rank] = self._local
        return {"by_rank": self._comm.sum(by_rank, f"{self._name} by rank").tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what the ranks had; if their number is another now, rank 0 takes it all."""
        by_rank = np.array(state["by_rank"])
        if len(by_rank) != self._comm.size:
            others = np.zeros((self._comm.size - 1, 3))
            by_rank = np.concatenate([by_rank.sum(axis=0, keepdims=True), others])
        self._pending, self._local = [], by_rank[self._comm.rank]

    def _settle(self) -> None:
        rows = mx.nd.stack(*(sums for sums, _ in self._pending)).asnumpy() if self._pending else []
        # One after the other: the same to the last bit, whether a checkpoint has settled some of them before or not.
        for row, (_, count) in zip(rows, self._pending):
            self._local = self._local + np.append(row, count)
        self._pending = []
