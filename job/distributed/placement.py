"""Where the launcher put this process: its rank, and its share of the machine's cores.

Read from the environment that horovodrun, mpirun or a Horovod cluster sets, so that it is known before MXNet and
Horovod are imported.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from job.distributed.cgroup import cpu_quota

_LAUNCHERS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)


class Placement(NamedTuple):
    """This process among all of the job (``rank`` of ``size``) and among those of its node (``local_*``)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def placement() -> Placement:
    """The placement that the launcher announced; one process on its own if there was no launcher."""
    for names in _LAUNCHERS:
        if names[1] in os.environ:
            return Placement(*(int(os.environ.get(name, default)) for name, default in zip(names, Placement())))
    return Placement()


def cores() -> int:
    """How many cores this process may use: those that it may run on, or fewer if a container grants less time."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def share_cores() -> None:
    """Give each rank of this node its part of the cores. To be called before MXNet and Horovod are imported.

    An operator is computed by one thread, so that its bits do not depend on how many cores a rank has; the rank's
    cores compute operators of several shards side by side. A value that the user has set stands.
    """
    ranks = placement().local_size
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MXNET_CPU_WORKER_NTHREADS", str(max(1, cores() // ranks)))
    os.environ.setdefault("MXNET_CPU_TEMP_COPY", "64")  # or operators wait for one another's scratch memory
    if ranks >= cores():  # over MPI a rank that waits would spin, on a core that another one needs
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
