#!/usr/bin/env python
"""Run by ``launch/local.sh --min-np``: checks, then supervises the ranks of this machine."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

import yaml

from job import command
from job.config import Config
from job.distributed.placement import enforce_determinism
from job.errors import UsageError
from launch.elastic.supervisor import Supervisor

TRAIN = [sys.executable, str(ROOT / "job" / "train.py")]
_MEMORY = Path("/dev/shm")
_PREFIX = "horovod-gluon-job."
_BEGIN = ("run.resume=", "run.overwrite=")


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
    if config.data.global_batch is None:
        raise UsageError(
            "--min-np needs data.global_batch: with data.batch_per_rank each change of the ranks would change what is"
            " learned"
        )
    if config.run.deterministic:
        enforce_determinism()  # of all ranks: one that waits imports MXNet before it reads its configuration
    begin = [argument for argument in arguments if argument.startswith(_BEGIN)]
    lasting = [argument for argument in arguments if argument not in begin]
    if options.ranks > config.data.shards:
        lasting.append(f"data.shards={options.ranks}")  # fewer ranks would go on with fewer
    with memory() as folder:
        return Supervisor([*train, *lasting], begin, config, options.ranks, options.least, folder).run()


@contextmanager
def memory() -> Iterator[Path]:
    """A folder for commits that outlives ranks, and not this process; those that dead ones have left are removed."""
    where = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for left in where.glob(f"{_PREFIX}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=where))
    try:
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    try:
        with open(folder / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use, or another user's
        pass


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
