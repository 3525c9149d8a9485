"""What a person sees while a run runs, and at its end: on a terminal, or as plain lines in a log."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Optional

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from job.distributed.placement import placement
from job.monitoring.recorder import merit
from job.monitoring.records import Record, Writer

_EXPORT = Path(__file__).resolve().parents[1] / "export.py"


class PlainConsole(Writer):
    """Lines that can be searched, for logs and pipes."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._folder = folder
        self._total_steps = total_steps

    def write(self, record: Record) -> None:
        self._print(f"step {record['step']}/{self._total_steps} {describe(record)}")

    def finish(self, summary: Record) -> None:
        for line in conclude(summary, self._folder):
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, flush=True)


class TerminalConsole(PlainConsole):
    """A progress bar below a table with a row for each evaluation, which stays."""

    _HEADER = "epoch    step  train loss  accuracy {} loss  accuracy  images/s      time"

    def __init__(self, folder: Path, total_steps: int, console: Optional[Console] = None) -> None:
        super().__init__(folder, total_steps)
        self._started = time.monotonic()
        self._images_per_second = 0.0
        self._best = -1.0
        self._split = ""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("starting", total=total_steps)
        self._progress.start()

    def write(self, record: Record) -> None:
        if record["split"] == "train":
            self._images_per_second = record["images_per_second"]
            self._progress.update(self._task, completed=record["step"], description=describe(record))
            return
        if record["split"] == "test" and self._split == "validation":
            return  # the conclusion tells it
        if self._best < 0:
            self._split = record["split"]
            head = self._HEADER.format("valid." if self._split == "validation" else " test")
            self._print(head + "   average" * ("average_accuracy" in record), "bold")
        best = merit(record) > self._best
        self._print(self._row(record) + " *" * best, "green" if best else "")  # the star says it without colours
        self._best = max(self._best, merit(record))

    def close(self) -> None:
        self._progress.stop()

    def _row(self, record: Record) -> str:
        return (
            f"{record['epoch']:5d}{record['step']:8d}{record['train_loss']:12.4f}{record['train_accuracy']:10.4f}"
            f"{record['loss']:11.4f}{record['accuracy']:10.4f}{self._images_per_second:10.0f}"
            f"{clock(time.monotonic() - self._started):>10}"
            + (f"{record['average_accuracy']:10.4f}" if "average_accuracy" in record else "")
        )

    def _print(self, line: str, style: str = "") -> None:
        self._progress.console.print(Text(line, style), soft_wrap=True)  # a path is copied whole


def on_terminal() -> bool:
    """Whether somebody watches who can be shown a line that changes.

    Launchers give their ranks a pseudo-terminal, whatever becomes of the output: a log, or lines with a prefix. Only of
    ``launch/local.sh`` it is known that a terminal shows what rank 0 draws; it says so.
    """
    shown = placement().size == 1 or "JOB_TERMINAL" in os.environ
    return shown and sys.stdout.isatty() and not Console().is_dumb_terminal


def describe(record: Record) -> str:
    """A record in one line, such as ``epoch 1 train loss 0.6860 accuracy 0.7390 21000 images/s``."""
    line = f"epoch {record['epoch']} {record['split']} loss {record['loss']:.4f} accuracy {record['accuracy']:.4f}"
    if record["split"] != "train":
        if "average_loss" in record:
            line += f"; of averaged weights loss {record['average_loss']:.4f} accuracy {record['average_accuracy']:.4f}"
        return f"{line} (train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.4f})"
    return f"{line} {record['images_per_second']:.0f} images/s"


def conclude(summary: Record, folder: Path) -> list[str]:
    """What the run came to, and where to look next. The last line is the result."""
    split = "validation" if "best_validation_accuracy" in summary else "test"
    average = "average_sha256" in summary and (
        f"average of the weights: test accuracy {summary['average_test_accuracy']:.4f}, loss"
        f" {summary['average_test_loss']:.4f}; weights {summary['average_sha256'][:12]}"
    )
    return [
        f"best: {split} accuracy {summary[f'best_{split}_accuracy']:.4f} after step {summary['best_step']}",
        f"time: {clock(summary['train_seconds'])} of training, evaluation not counted",
        f"look: tensorboard --logdir {shlex.quote(str(folder))}",
        f"use: python {shlex.quote(os.path.relpath(_EXPORT))} {shlex.quote(str(folder))}",
        *([average] if average else []),
        f"done: test accuracy {summary['test_accuracy']:.4f}, loss {summary['test_loss']:.4f} after"
        f" {summary['steps']} steps ({summary['images_per_second']:.0f} images/s on {summary['ranks']}"
        f" rank{'s' * (summary['ranks'] > 1)}); weights {summary['weights_sha256'][:12]}; all of it is in {folder}",
    ]


def clock(seconds: float) -> str:
    """A duration, such as ``1:02:07`` or ``0:09``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
