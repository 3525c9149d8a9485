#!/usr/bin/env python
"""Run by ``launch/local.sh --min-np``: checks, then supervises the ranks of this machine."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import yaml

from job import command
from job.config import Config
from job.distributed.placement import enforce_determinism
from job.errors import UsageError
from launch.elastic.machine import Machine
from launch.elastic.memory import memory
from launch.elastic.supervisor import Supervisor, plan

TRAIN = [sys.executable, str(ROOT / "job" / "train.py")]


def main(arguments: Sequence[str], train: Sequence[str] = TRAIN) -> int:
    """Check the configuration once, and keep the job going. Returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("-np", dest="ranks", type=int, required=True)
    parser.add_argument("--min-np", dest="least", type=int, required=True)
    options, arguments = parser.parse_known_args(arguments)
    if not 1 <= options.least <= options.ranks:
        raise UsageError(f"--min-np takes a number from 1 to that of the ranks, {options.ranks}; not {options.least}")
    os.environ.pop("JOB_PREEMPTED_FILE", None)  # of a launch script around this one, which is not told so
    if sys.stdout.isatty():
        os.environ["JOB_TERMINAL"] = "yes"

    as_rank_0 = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": str(options.ranks), "HOROVOD_CONTROLLER": "gloo"}
    check = [*train, "--check", *arguments]
    checked = subprocess.run(check, env={**os.environ, **as_rank_0}, stdout=subprocess.PIPE, text=True)
    if checked.returncode:
        return checked.returncode if checked.returncode == UsageError.exit_code else 1
    config = Config.model_validate(yaml.safe_load(checked.stdout))
    begin, lasting = plan(arguments, config, options.ranks)
    if config.run.deterministic:
        enforce_determinism()  # of all ranks: one that waits imports MXNet before it reads its configuration
    with memory() as folder:
        ground = Machine([*train, *lasting], options.ranks, folder, config.run.dir)
        return Supervisor(ground, begin, config, options.least, options.ranks).run()


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
