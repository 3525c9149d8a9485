"""Where the records go: ``metrics.jsonl``, TensorBoard, the summary and the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Optional

from job.distributed.comm import Comm
from job.errors import JobError
from job.monitoring.console import PlainConsole, TerminalConsole, on_terminal
from job.monitoring.records import JsonLines, Record, Summary, Writer
from job.monitoring.tensorboard import Subject, TensorBoard
from job.run_dir import METRICS, TENSORBOARD


@contextmanager
def open_writers(
    folder: Path, comm: Comm, total_steps: int, last_step: int = 0, subject: Optional[Subject] = None
) -> Iterator[list[Writer]]:
    """The writers of this rank into the run directory ``folder``, closed at the end; none but on rank 0.

    The run goes on after ``last_step``; what an earlier process has written beyond that goes. TensorBoard shows the
    insides of ``subject`` beside the records.

    Raises:
        JobError: a file cannot be written, then or when a writer is called.
    """
    with ExitStack() as stack:
        writers: list[Writer] = []
        if comm.rank == 0:
            console = TerminalConsole if on_terminal() else PlainConsole
            with told(folder):
                files = [
                    JsonLines(folder / METRICS, last_step),
                    TensorBoard(folder / TENSORBOARD, last_step, subject),
                    Summary(folder),
                ]
            writers = [*(OnDisk(writer, folder) for writer in files), console(folder, total_steps)]
        for writer in writers:
            stack.callback(writer.close)
        yield writers


class OnDisk(Writer):
    """A writer of files in ``folder``, which may be full or broken: then each method raises :class:`JobError`."""

    def __init__(self, writer: Writer, folder: Path) -> None:
        self._writer = writer
        self._folder = folder

    def write(self, record: Record) -> None:
        with told(self._folder):
            self._writer.write(record)

    def rewrite(self, record: Record) -> None:
        self.write(record)

    def sync(self) -> None:
        with told(self._folder):
            self._writer.sync()

    def finish(self, summary: Record) -> None:
        with told(self._folder):
            self._writer.finish(summary)

    def close(self) -> None:
        with told(self._folder):
            self._writer.close()


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a full or broken disk into a message."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"run.dir={folder}: cannot be written: {error.strerror or error}; the last checkpoint is as it was, and the"
            " same command goes on from it"
        ) from None
