"""Which device a rank computes on."""

from __future__ import annotations

import ctypes
import os
import random
import socket
from contextlib import suppress

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm
from job.distributed.numa import Cores, near
from job.distributed.placement import bind
from job.errors import UsageError


def choose_device(wanted: str, comm: Comm) -> mx.Context:
    """The GPU of this local rank, or the CPU. All ranks call it together, and all compute on the same kind of device.

    A rank that sees one GPU alone takes that: Slurm and containers may hand out GPUs one a rank. From here on the
    process stays on the cores that are near its device, see :mod:`job.distributed.numa`.

    Args:
        wanted: ``auto`` (a GPU if the node has any), ``cpu`` or ``gpu``.
        comm: whose local rank chooses among the GPUs of the node.

    Raises:
        UsageError: a GPU is wanted and there is none; some ranks have a GPU, and others none; or there are fewer than
            ranks on this node: two ranks on one GPU would be slower than one, and share its memory unseen.
    """
    gpus = 0 if wanted == "cpu" else mx.context.num_gpus()
    own = 0 if gpus == 1 else comm.local_rank
    cores = sum(1 << core for core in os.sched_getaffinity(0))
    told = comm.gather_text(f"{socket.gethostname()} {cores:x} {_bus_id(own) if own < gpus else ''}", "devices")
    nodes, allowed, cards = zip(*(text.split(" ", 2) for text in told))
    if gpus == 0 and wanted == "gpu":
        raise UsageError("run.device=gpu, but MXNet sees no GPU on this node; set run.device=cpu or mend the driver")
    here = [rank for rank, node in enumerate(nodes) if node == nodes[comm.rank]]
    if gpus and (own >= gpus or [cards[rank] for rank in here].count(cards[comm.rank]) > 1):
        raise UsageError(
            f"{comm.local_size} ranks on a node with {gpus} GPU{'s' * (gpus > 1)}; start at most one rank per GPU,"
            " or set run.device=cpu"
        )
    without = sorted({node for node, card in zip(nodes, cards) if not card})
    if without and any(cards):
        raise UsageError(
            f"some ranks have a GPU, and on {', '.join(without)} some have none; mend the driver there, start at most"
            " one rank per GPU, or set run.device=cpu"
        )
    masks = [_cores_of(int(allowed[rank], 16)) for rank in here]
    bind(near(here.index(comm.rank), [cards[rank] for rank in here], masks))
    return mx.gpu(own) if gpus else mx.cpu()


def _cores_of(mask: int) -> Cores:
    return Cores(core for core in range(mask.bit_length()) if mask >> core & 1)


def _bus_id(index: int) -> str:
    """Which card of its node a GPU is, whatever number it has for this process: its place on the PCI bus.

    Where CUDA's library does not tell, its number among those that this process was given.
    """
    name = ctypes.create_string_buffer(32)
    with suppress(OSError, AttributeError):
        if ctypes.CDLL("libcudart.so.11.0").cudaDeviceGetPCIBusId(name, len(name), index) == 0:
            return name.value.decode()
    return f"{index} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and MXNet, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)
