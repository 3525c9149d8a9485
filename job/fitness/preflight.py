"""What training checks by itself before it starts: the part of the doctor that costs nothing."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
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
    found = [gpu, checks.cores(ranks, cores()), threads, compiler, checks.dtype(config.model.dtype, on_gpus)]
    if on_gpus:
        found += [checks.driver(gpus), checks.deterministic(os.environ, config.run.deterministic)]
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


def conditions() -> str:
    """What ranks must have alike for the same bits, a line each, the processor first."""
    versions = facts.packages(facts.ARITHMETIC)
    return "\n".join([facts.processor(), *(f"{name} {version}" for name, version in versions.items())])


def compare(found: Sequence[str]) -> list[Check]:
    """What differs between ranks, a warning for all that differ in the same way.

    Args:
        found: the :func:`conditions` of each rank, in their order.
    """
    processors, packages = zip(*(text.partition("\n")[::2] for text in found))
    unlike = {rank: [message] for rank, message in checks.unlike_processors(processors).items()}
    for rank, own in enumerate(packages):
        if own != packages[0]:
            theirs, ours = (", ".join(text.splitlines()) for text in (packages[0], own))
            unlike.setdefault(rank, []).append(f"{ours}, where rank 0 has {theirs}")
    ranks_by_message: dict[str, list[int]] = {}
    for rank, messages in unlike.items():
        ranks_by_message.setdefault("; ".join(messages), []).append(rank)
    remedy = "bits may depend on which rank computes what: use one kind of machine, see docs/bit_for_bit.md#conditions"
    return [
        Check("alike", "warn", f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {message}", remedy)
        for message, ranks in ranks_by_message.items()
    ]


def require_same_data(found: Sequence[str]) -> None:
    """Refuse to train on several data sets at once.

    Args:
        found: what each rank's data is, in their order.

    Raises:
        UsageError: ranks have other data than rank 0.
    """
    others = [str(rank) for rank, own in enumerate(found) if own != found[0]]
    if others:
        raise UsageError(
            f"data.dir: rank{'s' * (len(others) > 1)} {', '.join(others)} and rank 0 have different data, under the"
            " same name on their nodes: bring the same files to every node"
        )


def tell(warnings: list[Check]) -> None:
    """Say what :func:`check` found, on stderr."""
    for warning in warnings:
        print(f"warning: {warning.sentence}", file=sys.stderr, flush=True)
