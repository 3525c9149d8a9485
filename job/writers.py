"""Where the metrics go: ``metrics.jsonl``, TensorBoard, the summary and the console, side by side.

A record is a dictionary of ``step``, ``epoch``, ``split`` (train or test) and what was measured. Every rank produces
the same records; only rank 0 has writers, so nobody has to ask for the rank.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from job.comm import Comm
from job.run_dir import METRICS, TENSORBOARD, write_summary, write_whole

Record = dict[str, Any]


class Writer:
    """One place to write to. What a place has no use for, it ignores."""

    def write(self, record: Record) -> None:
        """Add a record."""

    def finish(self, summary: Record) -> None:
        """The run is complete."""

    def close(self) -> None:
        """The run is over, complete or not."""


class JsonLines(Writer):
    """One JSON object a line, flushed as it is written. Records after ``last_step`` are removed: they come again."""

    def __init__(self, file: Path, last_step: int = 0) -> None:
        if file.exists():
            write_whole(file, "".join(_lines_up_to(last_step, file.read_text(encoding="utf-8"))))
        self._stream = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        # JSON has no NaN: a loss that is not finite is written as null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._stream.write(json.dumps(finite, allow_nan=False) + "\n")

    def close(self) -> None:
        self._stream.close()


def _lines_up_to(last_step: int, text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:  # a killed writer may leave half a line
            return
        yield line


class Summary(Writer):
    """``summary.json``, whose presence says that the run is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finish(self, summary: Record) -> None:
        write_summary(self._folder, summary)


_GROUPS = {"learning_rate": "optimizer", "images_per_second": "throughput"}  # others go to train/ or test/


class TensorBoard(Writer):
    """Scalars, in groups that fold well. Readers forget what is there after ``last_step``: it comes again."""

    def __init__(self, folder: Path, last_step: int = 0) -> None:
        goes_on = folder.exists()
        # A name of its own: the default one is that of any other file made within the same second, and replaces it.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1 if goes_on else None, filename_suffix=suffix)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in ("step", "split"):
                self._writer.add_scalar(f"{_GROUPS.get(name, record['split'])}/{name}", value, record["step"])
        self._writer.flush()  # it would keep the last two minutes to itself, and lose them with the process

    def close(self) -> None:
        self._writer.close()


class PlainConsole(Writer):
    """Lines that can be searched, for logs and pipes."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        self._folder = folder
        self._total_steps = total_steps

    def write(self, record: Record) -> None:
        self._print(f"step {record['step']}/{self._total_steps} {describe(record)}")

    def finish(self, summary: Record) -> None:
        self._print(
            f"done: test accuracy {summary['test_accuracy']:.4f}, loss {summary['test_loss']:.4f} after"
            f" {summary['steps']} steps ({summary['images_per_second']:.0f} images/s on {summary['ranks']}"
            f" rank{'s' * (summary['ranks'] > 1)}); all of it is in {self._folder}"
        )

    def _print(self, line: str) -> None:
        print(line, flush=True)


class TerminalConsole(PlainConsole):
    """A progress bar, with a line above it for each evaluation."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        super().__init__(folder, total_steps)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(None), TimeRemainingColumn(compact=True))
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("starting", total=total_steps)
        self._progress.start()

    def write(self, record: Record) -> None:
        if record["split"] == "test":
            super().write(record)
        else:
            self._progress.update(self._task, completed=record["step"], description=describe(record))

    def close(self) -> None:
        self._progress.stop()

    def _print(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def describe(record: Record) -> str:
    """A record in one line, such as ``epoch 1 train loss 0.6860 accuracy 0.7390 21000 images/s``."""
    line = f"epoch {record['epoch']} {record['split']} loss {record['loss']:.4f} accuracy {record['accuracy']:.4f}"
    if record["split"] == "test":
        return f"{line} (train loss {record['train_loss']:.4f} accuracy {record['train_accuracy']:.4f})"
    return f"{line} {record['images_per_second']:.0f} images/s"


@contextmanager
def open_writers(folder: Path, comm: Comm, total_steps: int, last_step: int = 0) -> Iterator[list[Writer]]:
    """The writers of this rank into the run directory ``folder``, closed at the end; none but on rank 0.

    The run goes on after ``last_step``; what an earlier process has written beyond that goes.
    """
    with ExitStack() as stack:
        writers = _writers(folder, comm, total_steps, last_step) if comm.rank == 0 else []
        for writer in writers:
            stack.callback(writer.close)
        yield writers


def _writers(folder: Path, comm: Comm, total_steps: int, last_step: int) -> list[Writer]:
    # horovodrun gives its ranks a pseudo-terminal and prefixes each line, which no progress bar survives.
    console = TerminalConsole if sys.stdout.isatty() and comm.size == 1 else PlainConsole
    return [
        JsonLines(folder / METRICS, last_step),
        TensorBoard(folder / TENSORBOARD, last_step),
        Summary(folder),
        console(folder, total_steps),
    ]
