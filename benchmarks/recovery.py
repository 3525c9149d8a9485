"""How long a job with ``--min-np`` stands still when a rank dies: from the death to the end of the next step.

    python -m benchmarks.recovery [--ranks 3] [--kills 12]     on this machine
    python -m benchmarks.recovery --hosts                      on three, which are network namespaces of it; needs root

One run of the tutorial's configuration. Each time the ranks have trained for ``--seconds``, one of them is killed, in
turn. The job itself measures, from the moment in which its supervisor sees the death (``changes.jsonl``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import psutil

from benchmarks.runs import ROOT

Job = tuple["subprocess.Popen[str]", Callable[[int], None]]  # its launcher, and what kills a rank


def main() -> None:
    """Kill, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8.0, help="of training between a recovery and the next death")
    parser.add_argument("--hosts", action="store_true", help="one rank on each of three hosts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch, "run")
        settings = ["train.epochs=1000", "elastic.cooldown_seconds=0", f"run.dir={run_dir}", "--quiet"]
        began = time.monotonic()
        with on_hosts(Path(scratch), settings) if options.hosts else here(options.ranks, settings) as (job, kill):
            wait_for(job, run_dir / "metrics.jsonl", 1)
            started = time.monotonic() - began
            for number in range(options.kills):
                time.sleep(options.seconds)
                kill(number)
                wait_for(job, run_dir / "changes.jsonl", number + 1)
            changes = [json.loads(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
    seconds = [change["lost_seconds"] for change in changes]
    steps = [change["replayed_steps"] for change in changes]
    print(f"{changes[0]['ranks']} ranks, {len(seconds)} deaths")
    print(
        f"from a death to the end of the next step: median {statistics.median(seconds):.1f} s, worst {max(seconds)} s"
    )
    print(f"steps computed again: median {statistics.median(steps):g}, most {max(steps)}")
    print(f"from the command to its first 10 steps: {started:.1f} s")


@contextlib.contextmanager
def here(ranks: int, settings: list[str]) -> Iterator[Job]:
    """A job on this machine."""
    command = [str(ROOT / "launch/local.sh"), "-np", str(ranks), "--min-np", "1", *settings]
    job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        yield job, lambda number: rank_of(job, number % ranks).kill()
    finally:
        job.send_signal(signal.SIGINT)
        job.wait()


@contextlib.contextmanager
def on_hosts(folder: Path, settings: list[str]) -> Iterator[Job]:
    """A job on three hosts."""
    from tests.cluster.conftest import Cluster

    (folder / "cluster").mkdir()
    cluster = Cluster(folder / "cluster")
    try:
        names = sorted(cluster.hosts)
        (folder / "hosts").write_text("".join(f"{name}\n" for name in names))
        job = cluster.start("--min-np", "1", str(folder / "hosts"), *settings)
        yield job.process, lambda number: cluster.ranks()[names[number % len(names)]][0].kill()
        job.signal(signal.SIGINT)
        job.finish()
    finally:
        cluster.close()


def wait_for(job: subprocess.Popen[str], file: Path, lines: int) -> None:
    """Until a file has so many lines."""
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        if job.poll() is not None:
            raise SystemExit(f"the job has ended with {job.returncode}")
        time.sleep(0.05)


def rank_of(job: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process that trains as ``rank``: the oldest, for the others wait to replace it."""
    found = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if process.environ().get("HOROVOD_RANK") == str(rank)
    ]
    return min(found, key=lambda process: process.create_time())


if __name__ == "__main__":
    main()
