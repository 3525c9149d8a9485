"""What a test set says of a network: exact sums over all ranks, and the samples that it is most wrong about."""

from __future__ import annotations

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
    comm: Comm, labels: np.ndarray, first: int, losses: np.ndarray, predicted: np.ndarray, classes: int
) -> Evaluation:
    """Merge what each rank has found about its own samples. All ranks call it together; one collective.

    Args:
        comm: the ranks.
        labels: of the whole split.
        first: index of this rank's first sample; its others follow.
        losses: of this rank's samples, (n,).
        predicted: their classes, (n,).
        classes: how many there are.
    """
    true = labels[first : first + len(predicted)].astype(np.int64)
    predicted = predicted.astype(np.int64)
    confusion = np.bincount(true * classes + predicted, minlength=classes**2)
    # A row of each rank's own in a table of zeros: a sum that is a gather. A wrong sample's loss is at least log 2.
    worst = np.zeros((comm.size, WORST, 3))
    wrong = np.flatnonzero(predicted != true)
    chosen = wrong[np.argsort(-losses[wrong], kind="stable")][:WORST]
    worst[comm.rank, : len(chosen)] = np.stack([losses[chosen], first + chosen, predicted[chosen]], axis=1)

    packed = np.concatenate([[losses.sum(dtype=np.float64)], confusion, worst.ravel()])
    packed = comm.sum(packed, "test metrics")
    confusion = packed[1 : 1 + classes**2].reshape(classes, classes).astype(np.int64)
    rows = sorted((row for row in packed[1 + classes**2 :].reshape(-1, 3) if row[0] > 0), key=lambda row: -row[0])
    return Evaluation(
        loss_sum=float(packed[0]),
        correct=float(np.trace(confusion)),
        count=float(confusion.sum()),
        confusion=confusion,
        mistakes=tuple(Mistake(int(i), int(labels[int(i)]), int(p), float(loss)) for loss, i, p in rows[:WORST]),
    )
