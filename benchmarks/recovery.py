"""How long a job with ``--min-np`` stands still when a rank dies: from the death to the end of the next step.

    python -m benchmarks.recovery [--ranks 3] [--kills 12]

One run of the tutorial's configuration. Each time the ranks have trained for ``--seconds``, one of them is killed, in
turn. The job itself measures, from the moment in which its supervisor sees the death (``changes.jsonl``).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.runs import ROOT


def main() -> None:
    """Kill, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8.0, help="of training between a recovery and the next death")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch, "run")
        settings = ["train.epochs=1000", "elastic.cooldown_seconds=0", f"run.dir={run_dir}", "--quiet"]
        command = [str(ROOT / "launch/local.sh"), "-np", str(options.ranks), "--min-np", "1", *settings]
        began = time.monotonic()
        job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(job, run_dir / "metrics.jsonl", 1)
            started = time.monotonic() - began
            for kill in range(options.kills):
                time.sleep(options.seconds)
                rank_of(job, kill % options.ranks).kill()
                wait_for(job, run_dir / "changes.jsonl", kill + 1)
            changes = [json.loads(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
        finally:
            job.send_signal(signal.SIGINT)
            job.wait()
    seconds = [change["lost_seconds"] for change in changes]
    steps = [change["replayed_steps"] for change in changes]
    print(f"{options.ranks} ranks, {len(seconds)} deaths")
    print(
        f"from a death to the end of the next step: median {statistics.median(seconds):.1f} s, worst {max(seconds)} s"
    )
    print(f"steps computed again: median {statistics.median(steps):g}, most {max(steps)}")
    print(f"from the command to its first 10 steps: {started:.1f} s")


def wait_for(job: subprocess.Popen[bytes], file: Path, lines: int) -> None:
    """Until a file has so many lines."""
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        if job.poll() is not None:
            raise SystemExit(f"the job has ended with {job.returncode}")
        time.sleep(0.05)


def rank_of(job: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process that trains as ``rank``: the oldest, for the others wait to replace it."""
    found = [
        process
        for process in psutil.Process(job.pid).children(recursive=True)
        if process.environ().get("HOROVOD_RANK") == str(rank)
    ]
    return min(found, key=lambda process: process.create_time())


if __name__ == "__main__":
    main()
