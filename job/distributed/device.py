"""Which device a rank computes on."""

from __future__ import annotations

import random

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm
from job.errors import UsageError


def choose_device(wanted: str, comm: Comm) -> mx.Context:
    """The GPU of this local rank, or the CPU.

    Args:
        wanted: ``auto`` (a GPU if the node has any), ``cpu`` or ``gpu``.
        comm: whose local rank chooses among the GPUs of the node.

    Raises:
        UsageError: a GPU is wanted and there is none, or there are fewer than ranks on this node: two ranks on one GPU
            would be slower than one, and share its memory unseen.
    """
    gpus = 0 if wanted == "cpu" else mx.context.num_gpus()
    if gpus == 0 and wanted == "gpu":
        raise UsageError("run.device=gpu, but MXNet sees no GPU on this node; set run.device=cpu or mend the driver")
    if gpus == 0:
        return mx.cpu()
    if gpus < comm.local_size:
        raise UsageError(
            f"{comm.local_size} ranks on a node with {gpus} GPU{'s' * (gpus > 1)}; start at most one rank per GPU,"
            " or set run.device=cpu"
        )
    return mx.gpu(comm.local_rank)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and MXNet, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)
