"""Real Horovod ranks for tests: a test hands a function to ``run_ranks``, which runs it on every rank."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.elastic.gang import LocalGang
from launch.elastic.places import Place

ROOT = Path(__file__).resolve().parents[2]
HOROVODRUN = Path(sys.executable).with_name("horovodrun")


def launcher(size: int, controller: str = "gloo") -> list[str]:
    """The command that starts ``size`` ranks; one rank is a process on its own, as for a user."""
    if size == 1:
        return [sys.executable]
    mpi_arguments = ["--mpi-args=--mca mpi_yield_when_idle 1"] if controller == "mpi" else []
    return [str(HOROVODRUN), "--disable-cache", f"--{controller}", *mpi_arguments, "-np", str(size), sys.executable]


def environment() -> dict[str, str]:
    """The environment of a rank: the project importable, mpirun found, Open MPI content with a container's root."""
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{HOROVODRUN.parent}{os.pathsep}{os.environ['PATH']}"  # pytest may have been started without an activate
    return {**os.environ, **as_root, "PATH": path, "PYTHONPATH": str(ROOT)}


def exit_codes(script: str, size: int, limit_seconds: float) -> dict[int, int]:
    """Of each rank that has ended by then, with no launcher that would end those that live."""
    gang = LocalGang([sys.executable, "-c", script], [Place("", rank) for rank in range(size)], environment())
    codes: dict[int, int] = {}
    end = time.monotonic() + limit_seconds
    try:
        while not gang.over and time.monotonic() < end:
            codes.update((ended.rank, ended.code) for ended in gang.ended())
            time.sleep(0.1)  # between two looks
    finally:
        gang.end()
    return codes


def free_port() -> int:
    """A TCP port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """``run_ranks(function, size, **arguments)``: what the function returned on each rank, in the order of ranks."""

    def run(function: Callable[..., Any], size: int, controller: str = "gloo", **arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
        target = [function.__module__, function.__name__, str(folder)]
        done = subprocess.run(
            [*launcher(size, controller), "-m", "tests.parallel.rank", *target],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]

    return run
