"""What training checks by itself before it starts: the part of the doctor that costs nothing."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from job.config import Config
from job.distributed.placement import asked_threads, cores, placement
from job.errors import JobError, UsageError
from job.fitness import checks, facts
from job.fitness.checks import Check


def check(config: Config) -> list[Check]:
    """Look at this node, once for all of its ranks. Returns what may go badly.

    Raises:
        UsageError: ``run.device`` cannot be had here.
        JobError: the driver is too old, Gloo cannot connect this host, or there is no room where rank 0 writes.
    """
    ranks, device = placement().local_size, config.run.device
    gpus = facts.Gpus() if device == "cpu" else facts.gpus()
    gpu = checks.gpu(gpus, checks.has_gpu_wheel(facts.packages()), device)
    on_gpus = bool(gpus.cards) and gpu.status == "ok"
    threads = checks.threads(asked_threads(), ranks, cores())
    compiler = checks.compiler(os.environ.get("NUMBA_DISABLE_JIT"))
    found = [gpu, checks.cores(ranks, cores()), threads, compiler]
    if on_gpus:
        found.append(checks.driver(gpus))
    if placement().rank == 0:
        found.append(checks.disk(facts.disk(config.run.dir), config))
    if placement().size > 1 and os.environ.get("HOROVOD_CONTROLLER") == "gloo":
        name = socket.gethostname()
        found.append(checks.hostname(name, facts.address_error(name), over_gloo=True))
    if ranks > 1:
        found.append(checks.shared_memory(facts.disk(Path("/dev/shm")), ranks, on_gpus))
    for failed in (check for check in found if check.status == "fail"):
        raise (UsageError if failed is gpu else JobError)(failed.sentence)
    return [check for check in found if check.status == "warn"]


def tell(warnings: list[Check]) -> None:
    """Say what :func:`check` found, on stderr."""
    for warning in warnings:
        print(f"warning: {warning.sentence}", file=sys.stderr, flush=True)
