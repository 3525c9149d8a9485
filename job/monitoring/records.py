"""What a run tells while it runs: records, and the writers that receive them side by side.

A record is a dictionary of ``step``, ``epoch``, ``split`` (train, validation or test), ``ranks`` and what was measured.
Every rank produces the same records, up to what its own clock says; only rank 0 has writers, so nobody has to ask for
the rank.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional

from job.errors import JobError
from job.run_dir import finite, write_summary, write_whole

Record = dict[str, Any]


class Writer:
    """One place to write to. What a place has no use for, it ignores."""

    def write(self, record: Record) -> None:
        """Add a record."""

    def rewrite(self, record: Record) -> None:
        """Add a record that an earlier process may have lost. Who has seen it need not see it again."""

    def sync(self) -> None:
        """Have what was written outlive a loss of power: a checkpoint is about to count on it."""

    def finish(self, summary: Record) -> None:
        """The run is complete."""

    def close(self) -> None:
        """The run is over, complete or not."""


class JsonLines(Writer):
    """One JSON object a line, flushed as it is written. Records after ``last_step`` are removed: they come again."""

    def __init__(self, file: Path, last_step: int = 0) -> None:
        if file.exists():
            write_whole(file, _up_to(last_step, file))
        self._stream = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _up_to(last_step: int, file: Path) -> str:
    """The records that stay.

    Raises:
        JobError: a line before the last one is damaged; what it held, nobody can say.
    """
    kept = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # a killed writer may leave half a line
            break
        step = _step_of(line)
        if step is None:
            raise JobError(
                f"{file}, line {number}: damaged, not a record: {line[:60]!r}; mend or delete that line, and the same"
                " command goes on"
            )
        if step > last_step:
            break
        kept.append(line.decode())
    return "".join(kept)


def _step_of(line: bytes) -> Optional[int]:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


class Summary(Writer):
    """``summary.json``, whose presence says that the run is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finish(self, summary: Record) -> None:
        write_summary(self._folder, summary)
