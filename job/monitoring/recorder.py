"""From the sums that a run produces to the records that it leaves: windows, epochs, speed, and the summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Optional

from job.fitness.facts import versions
from job.monitoring.records import Record, Writer
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
        self._last: dict[str, dict[str, Any]] = {}  # the record of the last evaluation, by split
        self._best: dict[str, Any] = {}
        self._unsafe: list[Record] = []  # that a host may take with it when it dies

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

    def test(
        self, step: int, epoch: int, evaluation: Evaluation, average: Optional[Evaluation] = None, split: str = "test"
    ) -> None:
        """Record an evaluation, beside the training samples of the whole epoch before it.

        Args:
            step: the steps taken.
            epoch: from 0.
            evaluation: with the weights.
            average: with their moving average.
            split: ``validation`` or ``test``. Once there is a validation, the best evaluation is among these.
        """
        if self._last.get("validation", {}).get("step") == step:  # the test set after it
            of_epoch = {key: self._last["validation"][key] for key in ("train_loss", "train_accuracy")}
        else:
            of_epoch = {"train_loss": self._epoch.loss, "train_accuracy": self._epoch.accuracy}
        of_average = {"average_loss": average.loss, "average_accuracy": average.accuracy} if average else {}
        record = self._last[split] = {
            "step": step,
            "epoch": epoch,
            "split": split,
            "loss": evaluation.loss,
            "accuracy": evaluation.accuracy,
            **of_average,
            "examples": int(evaluation.count),
            **of_epoch,
        }
        if split == self._judging and merit(record) > self._best.get(f"best_{split}_accuracy", -1.0):
            self._best = {f"best_{split}_accuracy": merit(record), "best_step": step}
        self._write(
            **record,
            confusion=evaluation.confusion.tolist(),
            mistakes=[mistake._asdict() for mistake in evaluation.mistakes],
        )
        self._epoch = Totals()
        self._window_started = time.perf_counter()

    def finish(self, **facts: Any) -> None:
        """Write the summary: ``facts`` about the run, and what it came to. The speed leaves evaluation out."""
        last = self._last["test"]
        measured = {
            f"{of}{split}_{key}": record[f"{of}{key}"]
            for split, record in sorted(self._last.items())
            for of in ("", "average_")
            for key in ("accuracy", "loss", "examples")
            if f"{of}{key}" in record
        }
        summary = {
            **facts,
            "epochs": last["epoch"] + 1,
            "steps": last["step"],
            **measured,
            **self._best,
            "images_per_second": self._trained / self._train_seconds,
            "train_seconds": self._train_seconds,
            **versions(),
        }
        for writer in self.writers:
            writer.finish(summary)

    def score(self, step: int) -> Optional[float]:
        """How good the run is after ``step`` steps (:func:`merit`), None if it was not measured there."""
        record = self._last.get(self._judging, {})
        return merit(record) if record.get("step") == step else None

    @property
    def _judging(self) -> str:
        """By which split evaluations are compared."""
        return "validation" if "validation" in self._last else "test"

    def sync(self) -> None:
        """Have the records outlive a loss of power: a checkpoint is about to count on them."""
        for writer in self.writers:
            writer.sync()
        self._unsafe = []

    def on_disk(self, step: int) -> int:
        """Up to which step the records of a run that goes on after ``step`` are sure to be on the disk."""
        return self._unsafe[0]["step"] - 1 if self._unsafe else step

    def go_on(self, writers: Sequence[Writer]) -> None:
        """Write to ``writers`` from now on; what may not have reached the disk, anew."""
        self.writers = writers
        for record in self._unsafe:
            for writer in writers:
                writer.rewrite(record)

    def state_dict(self) -> dict[str, Any]:
        """What is not in the records yet, and what the summary will say."""
        return {
            "epoch": [self._epoch.loss_sum, self._epoch.correct, self._epoch.count],
            "trained": self._trained,
            "train_seconds": self._train_seconds,
            "window_seconds": time.perf_counter() - self._window_started,
            **{f"last_{split}": record for split, record in self._last.items()},
            "best": self._best,
            "unsafe": list(self._unsafe),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, as if no time had passed."""
        self._epoch = Totals(*state["epoch"])
        self._trained, self._train_seconds = state["trained"], state["train_seconds"]
        self._window_started = time.perf_counter() - state["window_seconds"]
        self._last = {split: state[f"last_{split}"] for split in ("validation", "test") if state.get(f"last_{split}")}
        self._best = state["best"]
        self._unsafe = list(state.get("unsafe", ()))

    def _write(self, **record: Any) -> None:
        record["ranks"] = self._ranks
        self._unsafe.append(record)
        for writer in self.writers:
            writer.write(record)


def merit(record: Record) -> float:
    """What evaluations are compared by: the accuracy, that of the averaged weights if there are any."""
    accuracy: float = record["average_accuracy" if "average_accuracy" in record else "accuracy"]
    return accuracy
