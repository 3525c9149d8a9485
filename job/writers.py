"""Where the records go: ``metrics.jsonl``, TensorBoard, the summary and the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Optional

from job.comm import Comm
from job.console import PlainConsole, TerminalConsole, on_terminal
from job.errors import JobError
from job.records import JsonLines, Summary, Writer
from job.run_dir import METRICS, TENSORBOARD
from job.tensorboard import Subject, TensorBoard


@contextmanager
def open_writers(
    folder: Path, comm: Comm, total_steps: int, last_step: int = 0, subject: Optional[Subject] = None
) -> Iterator[list[Writer]]:
    """The writers of this rank into the run directory ``folder``, closed at the end; none but on rank 0.

    The run goes on after ``last_step``; what an earlier process has written beyond that goes. TensorBoard shows the
    insides of ``subject`` beside the records.

    Raises:
        JobError: something cannot be written, then or in the block.
    """
    with told(folder), ExitStack() as stack:
        writers: list[Writer] = []
        if comm.rank == 0:
            console = TerminalConsole if on_terminal() else PlainConsole
            writers = [
                JsonLines(folder / METRICS, last_step),
                TensorBoard(folder / TENSORBOARD, last_step, subject),
                Summary(folder),
                console(folder, total_steps),
            ]
        for writer in writers:
            stack.callback(writer.close)
        yield writers


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a full or broken disk into a message."""
    try:
        yield
    except BrokenPipeError:  # of the console: nobody reads it any more
        raise
    except OSError as error:
        raise JobError(
            f"run.dir={folder}: cannot be written: {error.strerror or error}; the last checkpoint is as it was, and the"
            " same command goes on from it"
        ) from None
