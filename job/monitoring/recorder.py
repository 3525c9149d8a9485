"""From the sums that a run produces to the records that it leaves: windows, epochs, speed, and the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Optional

from job.fitness.facts import versions
from job.monitoring.records import Writer
from job.training.evaluation import Evaluation
from job.training.metrics import Totals


class Recorder:
    """Turns totals into records and hands them to the writers. The same on every rank; only rank 0 has writers."""

    def __init__(self, writers: Sequence[Writer] = (), ranks: int = 1) -> None:
        self.writers = writers
        self._ranks = ranks
        self._epoch = Totals()
        self._trained = 0.0
        self._train_seconds = 0.0
        self._window_started = time.perf_counter()
        self._last_test: dict[str, Any] = {}
        self._best: dict[str, Any] = {}

    def train(self, step: int, epoch: int, totals: Totals, learning_rate: float, **vitals: Any) -> None:
        """Record the training samples since the last call, after ``step`` steps of the run, and what else is known.

        What a clock has measured, and no two runs have alike, is in ``images_per_second`` and ``pace`` alone.
        """
        seconds = time.perf_counter() - self._window_started
        self._trained += totals.count
        self._train_seconds += seconds
        self._epoch += totals
        self._write(
            step=step,
            epoch=epoch,
            split="train",
            loss=totals.loss,
            accuracy=totals.accuracy,
            learning_rate=learning_rate,
            images_per_second=totals.count / seconds,
            **vitals,
        )
        self._window_started = time.perf_counter()

    def test(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        """Record an evaluation, beside the training samples of the whole epoch before it."""
        self._last_test = {
            "step": step,
            "epoch": epoch,
            "split": "test",
            "loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            "examples": int(evaluation.count),
            "train_loss": self._epoch.loss,
            "train_accuracy": self._epoch.accuracy,
        }
        if not self._best or evaluation.accuracy > self._best["best_test_accuracy"]:
            self._best = {"best_test_accuracy": evaluation.accuracy, "best_step": step}
        self._write(
            **self._last_test,
            confusion=evaluation.confusion.tolist(),
            mistakes=[mistake._asdict() for mistake in evaluation.mistakes],
        )
        self._epoch = Totals()
        self._window_started = time.perf_counter()

    def finish(self, **facts: Any) -> None:
        """Write the summary: ``facts`` about the run, and what it came to. The speed leaves evaluation out."""
        last = self._last_test
        summary = {
            **facts,
            "epochs": last["epoch"] + 1,
            "steps": last["step"],
            "test_accuracy": last["accuracy"],
            "test_loss": last["loss"],
            "test_examples": last["examples"],
            **self._best,
            "images_per_second": self._trained / self._train_seconds,
            "train_seconds": self._train_seconds,
            **versions(),
        }
        for writer in self.writers:
            writer.finish(summary)

    def score(self, step: int) -> Optional[float]:
        """The test accuracy after ``step`` steps, None if it was not measured there."""
        return self._last_test["accuracy"] if self._last_test.get("step") == step else None

    def state_dict(self) -> dict[str, Any]:
        """What is not in the records yet, and what the summary will say. What is in them is on disk from now on."""
        for writer in self.writers:
            writer.sync()
        return {
            "epoch": [self._epoch.loss_sum, self._epoch.correct, self._epoch.count],
            "trained": self._trained,
            "train_seconds": self._train_seconds,
            "window_seconds": time.perf_counter() - self._window_started,
            "last_test": self._last_test,
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, as if no time had passed."""
        self._epoch = Totals(*state["epoch"])
        self._trained, self._train_seconds = state["trained"], state["train_seconds"]
        self._window_started = time.perf_counter() - state["window_seconds"]
        self._last_test, self._best = state["last_test"], state["best"]

    def _write(self, **record: Any) -> None:
        for writer in self.writers:
            writer.write({**record, "ranks": self._ranks})
