"""For the benchmarks: training runs, each in a folder of its own, and ranks; both started as a user starts them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
LOCAL = str(ROOT / "launch" / "local.sh")


@dataclass(frozen=True)
class Run:
    """A finished run: its summary and its records, in the order of steps."""

    summary: dict[str, Any]
    records: list[dict[str, Any]]

    def series(self, split: str, key: str) -> list[float]:
        """The values of ``key`` in all records of ``split``."""
        return [record[key] for record in self.records if record["split"] == split]


def run(name: str, ranks: int, overrides: Sequence[str], threads: int | None = None) -> Run:
    """Train with ``launch/local.sh`` into ``runs/benchmarks/<name>``; a run that is already finished there is read.

    Args:
        name: the folder, which must differ for every setting.
        ranks: how many.
        overrides: of the default configuration.
        threads: operators of a rank side by side, to run several runs at once; by default its share of the cores.
    """
    folder = ROOT / "runs" / "benchmarks" / name
    if not (folder / "summary.json").exists():
        arguments = [f"run.dir={folder}", "run.overwrite=true", *overrides]
        environment = {**os.environ, **({"MXNET_CPU_WORKER_NTHREADS": str(threads)} if threads else {})}
        command = [LOCAL, "-np", str(ranks), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{name}: done", flush=True)
    return read(folder)


def read(folder: Path) -> Run:
    """The run of this ``run.dir``."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines])


def launcher_of(ranks: int, options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The command by which ``launch/local.sh`` starts ranks, without what they run."""
    dry_run = [LOCAL, "-np", str(ranks), *options, "--dry-run"]
    shown = subprocess.run(dry_run, env=environment, capture_output=True, text=True, check=True).stdout
    return shlex.split(shown.partition(" python ")[0])


def as_ranks(
    module: str, ranks: int, arguments: Sequence[str], options: Sequence[str] = (), settings: Mapping[str, str] = {}
) -> list[str]:
    """Run ``module`` on ranks that ``launch/local.sh`` starts in the place of ``job/train.py``.

    Args:
        module: of this package.
        ranks: how many.
        arguments: of the module.
        options: of ``launch/local.sh``.
        settings: to be added to the environment.

    Returns:
        What stood after ``row:`` in each line of the output that had it.
    """
    environment = {**os.environ, **settings, "PATH": f"{ROOT}/.venv/bin{os.pathsep}{os.environ['PATH']}"}
    launcher = launcher_of(ranks, options, environment)
    command = [*launcher, sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [line.split("row:")[1] for line in done.stdout.splitlines() if "row:" in line]
    if done.returncode or not rows:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return rows
