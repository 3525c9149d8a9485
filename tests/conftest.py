"""The matrix of faults: which test breaks what, and ``--fault-matrix``, which prints it as a table."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

UNIT = Path(__file__).parent / "unit"

# What is broken, and what must hold.
MATRIX = {
    1: (
        "a rank is killed: at start, in a step, an allreduce, a save, evaluation",
        "exit 1 in time, nothing left, named",
    ),
    2: ("the launcher is killed or terminated", "no orphan"),
    3: ("SIGTERM or SIGUSR1, to one rank or to all", "one step for all, checkpoint in 5 s, exit 75"),
    4: ("a rank sleeps, or is stopped", "noticed within the limit, the rank named"),
    5: ("cut off at mid epoch and at its end, 1, 2, 4 ranks", "resumed bit for bit as never stopped"),
    6: ("resumed with another number of ranks", "every sample once, the same bits"),
    7: ("a writer is killed at every write, fsync, rename", "the old or the new checkpoint loads"),
    8: ("checkpoints truncated, flipped, empty, missing", "found by checksum, told, the one before used"),
    9: ("disk full, read-only, not permitted", "last good one kept, no leftovers, all ranks say why"),
    10: ("checkpoint of another model, config, data or format", "refused, with the difference"),
    11: ("two runs in one directory", "the second refused, the first named"),
    12: ("killed, then resumed", "no step repeated or backward in the metrics"),
    13: ("elastic: ranks killed anywhere, one or two, rank 0, in a recovery", "same bits and records, nothing left"),
    14: ("a malicious pickle as a checkpoint", "never executed"),
    15: ("NaN or infinity in the loss or gradient", "stopped with the step named, or skipped and counted"),
    16: ("data truncated, wrong, out of range, cut", "a clear error, no half file"),
}


# A shell that starts the tests in the background has them ignore SIGINT, and every process that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-matrix", action="store_true", help="print what was broken and what held, as a table")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``-n 2 --dist loadgroup``, what starts ranks runs one after the other, and beside it the unit tests."""
    for item in items:
        group = item.path.name if UNIT in item.path.parents else "whatever starts ranks"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    outcome.get_result().rows = [row for marker in item.iter_markers("fault") for row in marker.args]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--fault-matrix"):
        return
    counts: dict[int, Counter[str]] = {row: Counter() for row in MATRIX}
    for verdict in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(verdict, ()):
            for row in getattr(report, "rows", ()):
                counts[row][verdict] += 1
    terminalreporter.section("faults")
    for row, (broken, holds) in MATRIX.items():
        said = ", ".join(f"{number} {verdict}" for verdict, number in counts[row].items()) or "not run"
        terminalreporter.write_line(f"{row:>3}  {broken:<76} {holds:<52} {said}")
