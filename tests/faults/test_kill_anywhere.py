"""A hundred runs, each killed at a random moment and resumed to the end with another number of ranks: all end with the
bits of the run never killed.

``KILL_SEED=7 KILLS=1`` repeats the kill of seed 7; the seed of each kill is printed with what it chose.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.conftest import Run


def kill_and_resume(run: Run, seed: int, longest: float) -> str:
    """What was killed and when, in words; the run in the end is complete."""
    chance = random.Random(seed)
    before, after = chance.sample([1, 2, 3], 2)
    rank, moment = chance.choice([*map(str, range(before)), "all"]), chance.uniform(0.01, longest)
    killed = run.train(before, "run.resume=auto", fault=f"alarm:{moment:.3f}:{rank}:0")
    run.assert_nothing_left()
    held = run.checkpoints()[-1] if (run.folder / "checkpoints").exists() and run.checkpoints() else "no checkpoint"
    resumed = run.train(after, "run.resume=auto") if killed.code else killed
    who = f"rank {rank} of {before}"
    said = f"seed {seed}: {who} killed after {moment:.3f} s, exit {killed.code}, {held}; then {after} ranks"
    assert resumed.code == 0, f"{said}\n{killed.output}\n{resumed.output}"
    return said


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.fault(1, 6, 7, 12)
def test_a_run_killed_anywhere_and_resumed_with_other_ranks_ends_with_the_bits_of_the_run_never_killed(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = Run(tmp_path / "timed").train(2, fault="time:all:0:0")
    longest = float(timed.output.partition("from connecting to the end: ")[2].split()[0])
    first = int(os.environ.get("KILL_SEED", "0"))
    for seed in range(first, first + int(os.environ.get("KILLS", "100"))):
        run = Run(tmp_path / str(seed))
        said = kill_and_resume(run, seed, longest)
        with capsys.disabled():
            print(said, flush=True)
        assert run.weights() == whole.weights(), said
        assert run.records() == whole.records(), said
