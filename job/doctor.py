#!/usr/bin/env python
"""Is this machine fit for this run? ``make doctor``, ``python job/doctor.py [--json] [-np N] [arguments of train.py]``.

Exit codes: 0 nothing failed; 1 something did; 2 bad configuration or usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: find the package from any directory, and keep job/ itself off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

try:
    import psutil  # noqa: F401
    import pydantic  # noqa: F401
    import rich  # noqa: F401
    import yaml  # noqa: F401
except ImportError as missing:
    sys.exit(
        f"error: {sys.executable} cannot import {missing.name}; `make setup` makes an environment, then `make doctor`"
    )

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from typing import Any, NoReturn, Optional

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job import command
from job.config import DEFAULT_FILE, Config, from_home, load_config
from job.distributed import search_path
from job.distributed.placement import asked_threads, cores
from job.errors import JobError, UsageError
from job.fitness import checks, facts
from job.fitness.checks import Check
from job.run_dir import finite

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows the usage")


def examine(config: Config, ranks: Optional[int]) -> tuple[dict[str, Any], list[Check]]:
    """The facts to compare hosts by, and all checks. Takes some seconds: MXNet and Horovod are imported elsewhere.

    Args:
        config: of the run that the machine is to be fit for.
        ranks: on this machine; None for what launch/local.sh would start.
    """
    clocks = [(time.time(), time.monotonic())]
    gpus = facts.Gpus() if config.run.device == "cpu" else facts.gpus()
    ranks = ranks or len(gpus.cards) or 2
    disk, data = facts.disk(config.run.dir), facts.data(config.data)
    known = facts.collect(disk, data)
    packages, horovod = known["packages"], facts.horovod()
    gpu = checks.gpu(gpus, checks.has_gpu_wheel(packages), config.run.device)
    on_gpus = bool(gpus.cards) and gpu.status == "ok"
    found = [
        checks.python(known["python"], f"{platform.system()} {platform.machine()}"),
        checks.hiding(search_path.hiding(os.environ.get("PYTHONPATH", ""), os.environ.get("LD_LIBRARY_PATH", ""))),
        checks.numpy(packages),
        checks.wheels(packages),
        checks.mxnet(facts.mxnet()),
        checks.horovod(horovod),
        checks.mpirun(facts.mpirun()),
        checks.horovodrun(
            _resolved(shutil.which("horovodrun")), str(Path(sys.prefix).resolve() / "bin" / "horovodrun")
        ),
        checks.processor(known["processor"]),
        checks.cores(ranks, cores()),
        checks.threads(asked_threads(), ranks, cores()),
        checks.shared_memory(facts.disk(Path("/dev/shm")), ranks, on_gpus),
        checks.left_over(facts.left_in_shared_memory()),
        checks.memory(facts.memory_bytes(), ranks),
        checks.open_files(facts.open_files()),
        checks.disk(disk, config),
        checks.run_dir(facts.write_error(config.run.dir), config),
        checks.data(data),
        checks.hostname(known["hostname"], facts.address_error(known["hostname"])),
        checks.network(known["interfaces"]),
        gpu,
    ]
    if on_gpus:
        found += [checks.gpu_per_rank(ranks, gpus), checks.driver(gpus), checks.gpu_computes(facts.mxnet_on_gpus())]
        found.append(checks.deterministic(os.environ, config.run.deterministic))
        found += [] if horovod.error else [checks.nccl(horovod)]
    clocks.append((time.time(), time.monotonic()))
    found += [checks.clock(*zip(*clocks)), checks.environment(os.environ)]
    return known, found


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Parse, look, print.

    Raises:
        UsageError: the command line or the configuration is wrong.
        JobError: a check failed.
    """
    parser = _Parser(prog="doctor.py", description="Check this machine for a run. Say what is wrong, and what to do.")
    parser.add_argument("--json", action="store_true", help="print facts and checks as one JSON object")
    parser.add_argument(
        "-np", type=_positive, metavar="N", help="ranks on this machine (default: one for each GPU, or 2)"
    )
    parser.add_argument(
        "--config", type=from_home, metavar="FILE", help=f"as for train.py (default: configs/{DEFAULT_FILE.name})"
    )
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)  # for train.py
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as for train.py")
    options = parser.parse_intermixed_args(arguments)
    known, found = examine(load_config(options.config, options.overrides), options.np)
    if options.json:
        said = {"facts": known, "checks": [check._asdict() for check in found]}
        print(json.dumps(finite(said), indent=2, allow_nan=False))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(found))
    failed = [check.name for check in found if check.status == "fail"]
    if failed:
        raise JobError(f"not fit for this run: {', '.join(failed)}")


def table(found: Sequence[Check]) -> Table:
    """The checks, a row each, with the remedy under what was found."""
    result = Table("check", "", "found", expand=False)
    for check in found:
        message = Text(check.message)
        if check.remedy:
            message.append(f"\n-> {check.remedy}", style=_STYLES[check.status])
        result.add_row(check.name, Text(check.status, style=_STYLES[check.status]), message)
    return result


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"takes a number of ranks, 1 or more, not {text!r}")
    return int(text)


def _resolved(path: Optional[str]) -> Optional[str]:
    return path and os.path.realpath(path)


if __name__ == "__main__":
    command.run(main)
