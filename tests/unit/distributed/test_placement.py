"""Rank and cores, as each launcher announces them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.distributed import placement as placement_module
from job.distributed.comm import connect
from job.distributed.placement import (
    DETERMINISTIC,
    Placement,
    asked_threads,
    cores,
    enforce_determinism,
    placement,
    share_cores,
)
from job.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]

HOROVODRUN = {"HOROVOD_RANK": 5, "HOROVOD_SIZE": 8, "HOROVOD_LOCAL_RANK": 1, "HOROVOD_LOCAL_SIZE": 4}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": 2,
    "OMPI_COMM_WORLD_SIZE": 3,
    "OMPI_COMM_WORLD_LOCAL_RANK": 0,
    "OMPI_COMM_WORLD_LOCAL_SIZE": 2,
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*HOROVODRUN, *MPIRUN, "HOROVOD_GLOO_RENDEZVOUS_ADDR"]:
        monkeypatch.delenv(name, raising=False)


def announce(monkeypatch: pytest.MonkeyPatch, variables: dict[str, int]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def with_cores(monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None = None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(placement_module, "cpu_quota", lambda: quota)
    monkeypatch.setenv("JOB_ASKED_OMP_NUM_THREADS", "to be restored")
    for name in ("OMP_NUM_THREADS", "MXNET_CPU_WORKER_NTHREADS", "MXNET_CPU_TEMP_COPY", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def threads() -> tuple[str, str]:
    """In an operator, and operators side by side."""
    return os.environ["OMP_NUM_THREADS"], os.environ["MXNET_CPU_WORKER_NTHREADS"]


def test_a_process_without_a_launcher_is_alone() -> None:
    assert placement() == Placement(rank=0, size=1, local_rank=0, local_size=1)


def test_horovodrun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, HOROVODRUN)
    assert placement() == Placement(rank=5, size=8, local_rank=1, local_size=4)


def test_mpirun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, MPIRUN)
    assert placement() == Placement(rank=2, size=3, local_rank=0, local_size=2)


def test_horovods_own_variables_stand_before_mpis_only_if_they_are_no_leftovers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announce(monkeypatch, {**HOROVODRUN, **MPIRUN})
    assert placement() == Placement(rank=2, size=3, local_rank=0, local_size=2)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "n1")
    assert placement() == Placement(rank=5, size=8, local_rank=1, local_size=4)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", "")
    monkeypatch.setenv("HOROVOD_RANK", "")
    assert placement() == Placement()


def test_variables_left_over_from_another_job_are_refused_and_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_RANK", "1")
    with pytest.raises(UsageError, match="rank 1 of 2, but no launcher started it: unset them"):
        connect(1.0)


@pytest.mark.parametrize(("own", "workers"), [(1, "1"), (2, "2"), (32, "8")], ids=["core", "hyperthreads", "socket"])
def test_cores_that_mpirun_has_bound_a_rank_to_are_not_those_of_all(
    monkeypatch: pytest.MonkeyPatch, own: int, workers: str
) -> None:
    announce(monkeypatch, {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": 8})
    with_cores(monkeypatch, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64 if pid == os.getppid() else own)))
    monkeypatch.setenv("OMPI_MCA_orte_bound_at_launch", "1")
    assert cores() == 64
    share_cores()
    assert os.environ["MXNET_CPU_WORKER_NTHREADS"] == workers


def first_words(**variables: str) -> tuple[int, str]:
    """How ``share_cores`` ends a process with these variables, and what is said."""
    program = "import os; from job.distributed.placement import share_cores; share_cores(); print('went on')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_a_launchers_variable_that_is_no_number_is_refused_with_its_name() -> None:
    code, said = first_words(HOROVOD_SIZE="two")
    assert (code, said) == (2, "error: HOROVOD_SIZE=two is not a number; a launcher sets it: unset it\n")


@pytest.mark.parametrize("setting", ["8", "4,2", "", "auto", "0", "-1", "99999999"])
def test_an_operator_takes_one_thread_whatever_the_environment_says_and_what_it_says_is_known(
    monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with_cores(monkeypatch, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setenv("MXNET_OMP_MAX_THREADS", "2")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "1" and "MXNET_OMP_MAX_THREADS" not in os.environ
    assert asked_threads() == (setting or None)


@pytest.mark.parametrize(("cores", "own"), [(16, "4"), (6, "1"), (2, "1")], ids=["even", "uneven", "too few"])
def test_the_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch, cores: int, own: str) -> None:
    announce(monkeypatch, HOROVODRUN)
    with_cores(monkeypatch, cores)
    share_cores()
    assert threads() == ("1", own)  # one thread an operator, so that its bits do not depend on the share
    assert os.environ["MXNET_CPU_TEMP_COPY"] == "64"


@pytest.mark.parametrize(("cores", "yields"), [(16, False), (5, False), (4, True), (2, True)])
def test_ranks_that_have_no_core_to_spare_do_not_spin_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, cores: int, yields: bool
) -> None:
    announce(monkeypatch, HOROVODRUN)
    with_cores(monkeypatch, cores)
    share_cores()
    assert (("OMPI_MCA_mpi_yield_when_idle", "1") in os.environ.items()) == yields


def test_determinism_is_asked_of_gpus_and_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MXNET_CUDNN_AUTOTUNE_DEFAULT": "1"})
    enforce_determinism()
    assert os.environ == {**DETERMINISTIC, "MXNET_CUDNN_AUTOTUNE_DEFAULT": "1"}


def test_float16_keeps_the_tensor_cores_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    enforce_determinism(tensor_cores=True)
    assert {*DETERMINISTIC} - {*os.environ} == {"MXNET_CUDA_ALLOW_TENSOR_CORE"}


def test_a_process_alone_takes_all_cores_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cores(monkeypatch, 6)
    share_cores()
    assert threads() == ("1", "6")


@pytest.mark.parametrize(("quota", "usable"), [(None, 64), (8.0, 8), (2.5, 2), (0.5, 1), (128.0, 64)])
def test_a_containers_share_of_the_cores_counts_not_those_of_its_host(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int
) -> None:
    with_cores(monkeypatch, 64, quota)
    assert cores() == usable
    share_cores()
    assert threads() == ("1", str(usable))


def test_the_users_own_number_of_workers_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, HOROVODRUN)
    with_cores(monkeypatch, 16)
    monkeypatch.setenv("MXNET_CPU_WORKER_NTHREADS", "5")
    monkeypatch.setenv("MXNET_CPU_TEMP_COPY", "7")
    share_cores()
    assert threads() == ("1", "5")
    assert os.environ["MXNET_CPU_TEMP_COPY"] == "7"
