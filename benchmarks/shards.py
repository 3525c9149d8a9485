"""What the number of shards costs: ``python -m benchmarks.shards [--turns N] [--before CHECKOUT]``.

One rank on all cores and two ranks, the global batch of 256 in 1 to 16 shards, in turns of 8 steps on data in memory
(benchmarks/compare.py). With ``--before``, also 200 steps on two ranks as a user runs them, in turns with those of
another checkout that is set up, such as one from before there were shards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.compare import GLOBAL_BATCH, STEPS_A_TURN, Contestant, measure
from benchmarks.intervals import Interval, median, ratio
from benchmarks.runs import ROOT

SHARDS = (1, 2, 4, 8, 16)
USUAL = "2 ranks, 8 shards"
STEPS = 200


def contestants() -> list[Contestant]:
    """One and two ranks, with each number of shards that they can have."""
    return [
        Contestant(f"{ranks} rank{'s' * (ranks > 1)}, {n} shard{'s' * (n > 1)}", "ours", (f"data.shards={n}",), ranks)
        for ranks in (1, 2)
        for n in SHARDS
        if n >= ranks
    ]


def steps_of_runs(checkouts: Sequence[Path], turns: int) -> list[list[float]]:
    """Milliseconds a step of a run of each checkout in turns: the median over what the second half of it records."""
    found: list[list[float]] = [[] for _ in checkouts]
    for turn in range(turns):
        for place, checkout in enumerate(checkouts):
            with tempfile.TemporaryDirectory() as folder:
                arguments = [f"train.max_steps={STEPS}", f"run.dir={folder}/run", "--quiet"]
                environment = {**os.environ, "PATH": f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}"}
                command = [str(checkout / "launch" / "local.sh"), "-np", "2", *arguments]
                subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)
                lines = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
                speeds = [line["images_per_second"] for line in lines if line["split"] == "train"]
                found[place].append(GLOBAL_BATCH * 1e3 / float(np.median(speeds[len(speeds) // 2 :])))
        print(f"run {turn + 1} of {turns}", flush=True)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12, help="of each number of shards (default: 12)")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="to compare whole runs with")
    options = parser.parse_args()
    seconds = {name: np.array(turns) for name, turns in measure("step", options.turns, contestants()).items()}
    print("\n| | ms a step | 90% interval | of 2 ranks with 8 shards | 90% interval |\n|---|---|---|---|---|")
    for name, turns in seconds.items():
        print(f"| {name} | {_row(median(turns * 1e3 / STEPS_A_TURN), 1)} | {_row(ratio(turns, seconds[USUAL]), 2)} |")
    if options.before:
        now, before = map(np.array, steps_of_runs([ROOT, options.before.resolve()], max(3, options.turns // 3)))
        print(f"\nnow {np.median(now):.1f} ms a step, before {np.median(before):.1f}: {_row(ratio(now, before), 2)}")


def _row(of: Interval, digits: int) -> str:
    return f"{of.value:.{digits}f} | {of.low:.{digits}f} to {of.high:.{digits}f}"


if __name__ == "__main__":
    main()
