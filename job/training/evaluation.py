"""What a test set says of a network: exact sums over all ranks, and the samples that it is most wrong about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from job.distributed.comm import Comm
from job.training.metrics import Totals

WORST = 24  # mistakes that are kept


class Mistake(NamedTuple):
    """A sample that was classified wrong."""

    image: int  # its index in the split
    true: int
    predicted: int
    loss: float


@dataclass(frozen=True, eq=False)
class Evaluation(Totals):
    """Sums over all samples of a split, and where they come from."""

    confusion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [true class, predicted class]
    mistakes: tuple[Mistake, ...] = ()  # the worst first


def evaluate(
    comm: Comm,
    labels: np.ndarray,
    own: range,
    chunks: Sequence[tuple[int, np.ndarray, np.ndarray]],
    total: int,
    classes: int,
) -> Evaluation:
    """Merge what each rank has found about its own chunks. All ranks call it together; one collective.

    Args:
        comm: the ranks.
        labels: of the whole split.
        own: the numbers of this rank's chunks, in order.
        chunks: of each of them the index of its first sample, the losses (n,) of its samples, and their classes (n,).
        total: how many chunks there are on all ranks.
        classes: how many there are.
    """
    # Rows of one's own in a table of zeros: a sum that is a gather, and exact. Losses are added up in the order of
    # chunks, whoever computed them.
    losses = np.zeros(total)
    confusion = np.zeros(classes**2)
    wrong: list[tuple[float, int, int]] = []
    for number, (first, chunk_losses, predicted) in zip(own, chunks):
        true = labels[first : first + len(predicted)].astype(np.int64)
        predicted = predicted.astype(np.int64)
        losses[number] = chunk_losses.sum(dtype=np.float64)
        confusion += np.bincount(true * classes + predicted, minlength=classes**2)
        places = np.flatnonzero(predicted != true)
        wrong += zip(chunk_losses[places].tolist(), (first + places).tolist(), predicted[places].tolist())
    worst = np.zeros((comm.size, WORST, 3))  # a wrong sample's loss is at least log 2
    chosen = sorted(wrong, key=_worst_first)[:WORST]
    worst[comm.rank, : len(chosen)] = np.array(chosen).reshape(-1, 3)

    packed = comm.sum(np.concatenate([losses, confusion, worst.ravel()]), "test metrics")
    losses, confusion, worst = np.split(packed, [total, total + classes**2])
    confusion = confusion.reshape(classes, classes).astype(np.int64)
    rows = sorted((tuple(row) for row in worst.reshape(-1, 3).tolist() if row[0] > 0), key=_worst_first)
    return Evaluation(
        loss_sum=sum(losses.tolist()),
        correct=float(np.trace(confusion)),
        count=float(confusion.sum()),
        confusion=confusion,
        mistakes=tuple(Mistake(int(i), int(labels[int(i)]), int(p), loss) for loss, i, p in rows[:WORST]),
    )


def _worst_first(row: tuple[float, ...]) -> tuple[float, float]:
    loss, image, _ = row
    return -loss, image
