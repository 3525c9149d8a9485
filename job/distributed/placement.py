"""Where the launcher put this process: its rank, and its share of the machine's cores.

Read from the environment that horovodrun, mpirun or a Horovod cluster sets, so that it is known before MXNet and
Horovod are imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection
from typing import NamedTuple, NoReturn, Optional

from job.distributed.cgroup import cpu_quota

_HOROVOD = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_BOUND = "OMPI_MCA_orte_bound_at_launch"  # Open MPI tells so that each rank has cores of its own
_ASKED_THREADS = "JOB_ASKED_OMP_NUM_THREADS"
_ALLOWED = "JOB_ALLOWED_CORES"  # how many there were before this process was bound to some of them
_TENSOR_CORES = "MXNET_CUDA_ALLOW_TENSOR_CORE"
# What has a GPU compute the same bits each time, as far as MXNet's, cuDNN's and cuBLAS's documentation goes.
DETERMINISTIC = {
    "MXNET_ENFORCE_DETERMINISM": "1",  # of cuDNN only algorithms that are
    "MXNET_CUDNN_AUTOTUNE_DEFAULT": "0",  # or each rank takes what a clock says is the fastest
    _TENSOR_CORES: "0",
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # with several streams
}
MEETING = "HOROVOD_GLOO_RENDEZVOUS_ADDR"  # without it no rank over Gloo finds the others


class Placement(NamedTuple):
    """This process among all of the job (``rank`` of ``size``) and among those of its node (``local_*``)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def placement() -> Placement:
    """The placement that the launcher announced; one process on its own if there was no launcher.

    Horovod's own variables, where they are left over from another job, do not count beside those of mpirun.
    """
    for names in (_HOROVOD, _MPI) if os.environ.get(MEETING) or not os.environ.get(_MPI[1]) else (_MPI,):
        if os.environ.get(names[1]):
            return Placement(*(_number(name, default) for name, default in zip(names, Placement())))
    return Placement()


def launched() -> bool:
    """Whether a launcher that can bring ranks together has started this process, or it is on its own."""
    return bool(placement().size == 1 or os.environ.get(MEETING) or os.environ.get(_MPI[1]))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"\d{1,7}", text):
        _refuse(f"{name}={text} is not a number; a launcher sets it: unset it")
    return int(text)


def _refuse(message: str) -> NoReturn:
    """End this process as bad usage does. For what is read before anything that could tell it is imported."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


def cores() -> int:
    """How many cores the ranks of this node may use together: those that this process may run on, or fewer if a
    container grants less time. Where mpirun has bound each rank to some (--bind-to), those that mpirun itself may use.
    """
    allowed, quota = int(os.environ.get(_ALLOWED) or len(os.sched_getaffinity(0))), cpu_quota()
    if os.environ.get(_BOUND) == "1":
        with contextlib.suppress(OSError):
            allowed = max(allowed, len(os.sched_getaffinity(os.getppid())))
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def share_cores() -> None:
    """Give each rank of this node its part of the cores. To be called before MXNet and Horovod are imported.

    An operator is computed by one thread, so that its bits do not depend on how many cores a rank has; the rank's
    cores compute operators of several shards side by side. Another OMP_NUM_THREADS, such as a site's module sets, is
    not obeyed; :func:`asked_threads` has it, for a warning.
    """
    ranks = placement().local_size
    os.environ[_ASKED_THREADS] = os.environ.get("OMP_NUM_THREADS", "")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("MXNET_OMP_MAX_THREADS", None)  # it would count more
    share = min(len(os.sched_getaffinity(0)), max(1, cores() // ranks))  # fewer, if it is bound to fewer
    os.environ.setdefault("MXNET_CPU_WORKER_NTHREADS", str(share))
    os.environ.setdefault("MXNET_CPU_TEMP_COPY", "64")  # or operators wait for one another's scratch memory
    if ranks >= cores():  # over MPI a rank that waits would spin, on a core that another one needs
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


def bind(own: Collection[int]) -> None:
    """Keep all threads of this process, and those that they will start, on these cores; :func:`cores` stays the same.

    Where the system does not let it, as where a container's cores have just changed, nothing happens.
    """
    allowed = os.sched_getaffinity(0)
    if own != allowed:
        os.environ[_ALLOWED] = str(len(allowed))
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # some have ended meanwhile
                os.sched_setaffinity(int(thread), own)


def enforce_determinism(tensor_cores: bool = False) -> None:
    """Ask for GPUs that repeat their bits. What the user has set in the environment stands. Not tested on a GPU.

    ``tensor_cores`` are left to whoever computes in float16, who gains little without them.
    """
    for name, value in DETERMINISTIC.items():
        if not (tensor_cores and name == _TENSOR_CORES):
            os.environ.setdefault(name, value)


def asked_threads() -> Optional[str]:
    """The user's OMP_NUM_THREADS, before :func:`share_cores` or after it; None if there was none."""
    return os.environ.get(_ASKED_THREADS, os.environ.get("OMP_NUM_THREADS")) or None
