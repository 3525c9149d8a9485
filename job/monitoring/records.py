"""What a run tells while it runs: records, and the writers that receive them side by side.

A record is a dictionary of ``step``, ``epoch``, ``split`` (train or test), ``ranks`` and what was measured. Every rank
produces the same records, up to what its own clock says; only rank 0 has writers, so nobody has to ask for the rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.run_dir import write_summary, write_whole

Record = dict[str, Any]


class Writer:
    """One place to write to. What a place has no use for, it ignores."""

    def write(self, record: Record) -> None:
        """Add a record."""

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
            write_whole(file, "".join(_lines_up_to(last_step, file.read_text(encoding="utf-8"))))
        self._stream = open(file, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed by close)

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
