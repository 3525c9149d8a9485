"""The confusion matrix and the worst mistakes, against numpy on the whole split, however the ranks share it."""

from __future__ import annotations

import threading
from typing import Optional

import numpy as np
import pytest

from job.data.sampler import Span, own_shards
from job.distributed.comm import Comm
from job.training.evaluation import WORST, Evaluation, evaluate


class Thread(Comm):
    """A rank in a thread: sums with the others at a barrier."""

    def __init__(self, rank: int, size: int, table: list[Optional[np.ndarray]], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._table, self._barrier = table, barrier

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        self._table[self.rank] = values
        self._barrier.wait(timeout=30)
        return np.sum(self._table, axis=0)


def outcome(samples: int, accuracy: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions, and losses in 1/256, of which no two are equal and which are no less than log 2 if wrong."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, samples).astype(np.uint8)
    predicted = np.where(random.random(samples) < accuracy, labels, random.integers(0, 10, samples))
    return labels, predicted.astype(np.float64), (random.permutation(samples) + 256) / 256


def on_ranks(
    size: int, labels: np.ndarray, predicted: np.ndarray, losses: np.ndarray, total: int = 7
) -> list[Evaluation]:
    """What each rank gets to know, when the samples are cut into ``total`` chunks."""
    table: list[Optional[np.ndarray]] = [None] * size
    found: list[Optional[Evaluation]] = [None] * size
    barrier = threading.Barrier(size)

    def work(rank: int) -> None:
        own = own_shards(rank, size, total)
        spans = [Span(0, len(labels)).part(number, total) for number in own]
        chunks = [(span.start, losses[slice(*span)], predicted[slice(*span)]) for span in spans]
        found[rank] = evaluate(Thread(rank, size, table, barrier), labels, own, chunks, total, 10)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_rank_knows_the_confusion_of_all_samples(size: int) -> None:
    labels, predicted, losses = outcome(1000, 0.6)
    expected = np.zeros((10, 10), int)
    for true, guess in zip(labels, predicted):
        expected[true, int(guess)] += 1
    for found in on_ranks(size, labels, predicted, losses):
        np.testing.assert_array_equal(found.confusion, expected)
        assert found.confusion.dtype == np.int64
        assert (found.count, found.correct) == (1000, (labels == predicted).sum())
        assert found.loss_sum == losses.sum()


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("accuracy", [0.5, 0.99])
def test_the_worst_mistakes_are_those_of_all_samples_the_worst_first(size: int, accuracy: float) -> None:
    labels, predicted, losses = outcome(1000, accuracy)
    wrong = [index for index in np.argsort(-losses) if labels[index] != predicted[index]][:WORST]
    expected = [(index, labels[index], predicted[index], losses[index]) for index in wrong]
    assert (len(expected) == WORST) == (accuracy == 0.5)
    for found in on_ranks(size, labels, predicted, losses):
        assert list(found.mistakes) == expected


def test_any_number_of_ranks_finds_the_same_to_the_last_bit() -> None:
    labels, predicted, _ = outcome(1000, 0.6)
    losses = np.random.default_rng(1).exponential(size=1000) + 1  # whose sum depends on its order
    chunks = [losses[slice(*Span(0, 1000).part(number, 13))].sum() for number in range(13)]
    assert len({sum(np.random.default_rng(seed).permutation(chunks).tolist()) for seed in range(9)}) > 1
    every = [found for size in (1, 2, 3, 5, 13, 16) for found in on_ranks(size, labels, predicted, losses, total=13)]
    assert {found.loss_sum for found in every} == {sum(map(float, chunks))}
    assert len({found.mistakes for found in every}) == 1
    for found in every:
        np.testing.assert_array_equal(found.confusion, every[0].confusion)


def test_mistakes_that_are_equally_bad_come_in_the_order_of_samples_whoever_found_them() -> None:
    labels = np.zeros(100, np.uint8)
    for size in (1, 2, 7):
        for found in on_ranks(size, labels, np.ones(100), np.full(100, 2.0)):
            assert [mistake.image for mistake in found.mistakes] == list(range(WORST))


def test_more_ranks_than_samples_and_a_network_that_is_always_right() -> None:
    labels = np.array([3, 1], np.uint8)
    for found in on_ranks(4, labels, labels.astype(float), np.array([0.5, 0.25]), total=2):
        assert (found.count, found.accuracy, found.loss, found.mistakes) == (2, 1.0, 0.375, ())


def test_losses_that_are_not_numbers_are_counted_and_are_no_mistake_to_show() -> None:
    labels = np.array([0, 1, 2], np.uint8)
    (found,) = on_ranks(1, labels, np.zeros(3), np.array([0.5, np.nan, 2.0]), total=2)
    assert np.isnan(found.loss) and found.accuracy == 1 / 3
    assert [mistake.image for mistake in found.mistakes] == [2]
