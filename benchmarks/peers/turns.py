"""What every contestant of :mod:`benchmarks.compare` does: it trains when told to, and says how long that took.

Needs numpy alone, so that it works in the environment of each library. The environment holds ``BENCH_DATA``, a folder
with the four IDX files of the data set; ``BENCH_GATE``, a named pipe with a byte for each turn; ``BENCH_TURNS``; and
``BENCH_MODE``: ``step``, a turn is some steps on data in memory, or ``epoch``, an epoch as a user runs it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

GLOBAL_BATCH = 256
LEARNING_RATE = 0.2
LOG_EVERY_STEPS = 20
STEPS_A_TURN = 8
MODE = os.environ.get("BENCH_MODE", "step")


def load(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of ``train`` or ``t10k``, uint8."""
    folder = Path(os.environ["BENCH_DATA"])
    labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    return np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28), labels


def steps(step: Callable[[int], None], settle: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """A turn of some calls of ``step`` with the number of the step; ``settle`` waits until all of it is computed."""
    numbers = itertools.count()

    def turn() -> None:
        for _ in range(STEPS_A_TURN):
            step(next(numbers))
        settle()

    return turn


def take_turns(
    turn: Callable[[], object],
    warm_up: Callable[[], object],
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Warm up, then do ``turn`` once for each byte of the gate, all ranks together; rank 0 tells the seconds."""
    warm_up()
    barrier()
    gate = open(os.environ["BENCH_GATE"], "rb", buffering=0) if rank == 0 else None  # noqa: SIM115
    if gate:
        print("\nready:", flush=True)
    for _ in range(int(os.environ["BENCH_TURNS"])):
        if gate:
            gate.read(1)
        barrier()
        started = time.perf_counter()
        turn()
        barrier()
        if gate:
            print(f"\nturn:{time.perf_counter() - started}", flush=True)
