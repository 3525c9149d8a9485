"""How long a run takes from the command to its first step, and from its last step to the prompt, by part.

    python -m benchmarks.start_up [--ranks 2] [--rounds 5] [FOLDER ...]

``launch/local.sh`` trains for two steps, as a user starts it. Each Python process of it writes down when it did what
(benchmarks/tracing); the table shows rank 0, and what the launcher does before and after it. A part does not hold the
time of another part within it. With several FOLDERs, checkouts of this project that have been set up, they take turns.
Each value is the median over the rounds. One round goes before and is not counted: it fills the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.runs import ROOT

FIRST, LAST = "= to the end of the first step", "= from the last step to the prompt"


def main() -> None:
    """Take turns, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT], metavar="FOLDER")
    options = parser.parse_args()
    folders = [folder.resolve() for folder in options.folders]
    rounds: list[list[dict[str, float]]] = [[] for _ in folders]
    for turn in range(1 + options.rounds):
        for folder, of_folder in zip(folders, rounds):
            parts = measure(folder, options.ranks)
            of_folder += [parts] * (turn > 0)
    print(f"{options.ranks} ranks, median seconds of {options.rounds} rounds\n")
    print(table([folder.name for folder in folders], [_medians(of_folder) for of_folder in rounds]))


def measure(checkout: Path, ranks: int) -> dict[str, float]:
    """Seconds of each part of one run, in the order of their beginnings."""
    with tempfile.TemporaryDirectory() as scratch:
        traces = Path(scratch, "traces")
        traces.mkdir()
        environment = {**os.environ, "START_UP_TRACE": str(traces), "PYTHONPATH": str(ROOT / "benchmarks/tracing")}
        command = [str(checkout / "launch/local.sh"), "-np", str(ranks), f"run.dir={scratch}/run", "train.max_steps=2"]
        began = _now()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        ended = _now()
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = [json.loads(file.read_text()) for file in traces.glob("*.json")]
    checks = [trace for trace in found if "--check" in trace["arguments"]]
    (rank,) = (trace for trace in found if trace["rank"] == "0" and trace not in checks)
    return _parts(began, ended, checks, rank)


def _parts(began: float, ended: float, checks: list[dict[str, Any]], rank: dict[str, Any]) -> dict[str, float]:
    parts: dict[str, float] = defaultdict(float)
    steps = [event for event in rank["events"] if event[0] == "step"]
    first, last = steps[0][2], steps[-1][2]
    for check in checks:
        parts["launcher, before the check"] += check["started"] - began
        parts["check in a process of its own"] += check["ended"] - check["started"]
    parts["launcher, to the start of rank 0"] = rank["started"] - max([began, *(check["ended"] for check in checks)])
    parts["interpreter"] = rank["ready"] - rank["started"]
    for name, _, end, own in sorted(rank["events"], key=lambda event: event[1]):
        if end < first:
            parts[name] += own
        elif end == first:
            parts["first step"] += own
    before = rank["started"] - began
    parts["what is left"] = first - began - before - sum(parts.values()) + _outside(parts)
    parts[FIRST] = first - began
    ends = {name: 0.0 for name, begin, *_ in rank["events"] if begin >= last}
    for name, begin, _, own in rank["events"]:
        if begin >= last:
            ends[name] += own
    for name, seconds in ends.items():
        parts[f"{name} " if name in parts else name] = seconds
    parts["what is left "] = rank["ended"] - last - sum(ends.values())
    parts["rank and launcher end"] = ended - rank["ended"]
    parts[LAST] = ended - last
    return dict(parts)


def _outside(parts: dict[str, float]) -> float:
    """Seconds before rank 0 had started."""
    return sum(seconds for name, seconds in parts.items() if name.startswith(("launcher", "check in")))


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = max(rounds, key=len)
    return {name: statistics.median(parts.get(name, 0.0) for parts in rounds) for name in names}


def table(titles: list[str], columns: list[dict[str, float]]) -> str:
    """Parts as rows; the first column gives the order, and what only others have comes where they have it."""
    names: list[str] = []
    for column in columns:
        place = 0
        for name in column:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    lines = [f"| part | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for name in names:
        cells = " | ".join(f"{column[name]:.2f}" if name in column else "" for column in columns)
        lines.append(f"| {name.strip()} | {cells} |")
    for total in (FIRST, LAST):
        lines += [f"\n{title}: {columns[0][total] / column[total]:.2f} times as fast as {titles[0]} {total[2:]}"
                  for title, column in zip(titles[1:], columns[1:])]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
