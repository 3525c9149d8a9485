"""Writes down when a Python process of a run does what. For benchmarks/start_up.py, which puts it on PYTHONPATH.

Python imports a module of this name by itself at its start. So the user's own command is measured, in any checkout, and
nothing in it knows. Times are seconds since the boot of the machine, which all processes share.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

FOLDER = "START_UP_TRACE"  # the variable that says where to write

# What is timed beside the imports: functions by module, and the part of the start or the end that each is.
CALLS = {
    "job.cli": {"parse": "check of the configuration"},
    "job.run_dir": {"claim": "run.dir claimed"},
    "job.distributed.comm": {"connect": "ranks joined (hvd.init)", "HorovodComm.close": "leave (hvd.shutdown)"},
    "job.data.idx": {"load": "data verified and mapped"},
    "job.networks.models": {"initialize": "first weights"},
    "job.training.learner": {
        "Learner.__init__": "graph rewritten, weights broadcast",
        "Learner.step": "step",
        "Learner.evaluate": "evaluation",
    },
    "job.checkpoints.resume": {
        "Checkpoints.resume": "first checkpoint",
        "Checkpoints.save": "last checkpoint",
        "Checkpoints.finish": "last checkpoint",
    },
    "job.monitoring.tensorboard": {
        "TensorBoard.__init__": "TensorBoard opened",
        "TensorBoard.write": "TensorBoard written",
        "TensorBoard.finish": "TensorBoard's projector",
        "TensorBoard.close": "TensorBoard closed",
    },
}
PACKAGES = {
    "mxnet", "numpy", "numba", "llvmlite", "horovod", "tensorboardX", "tensorboard", "PIL", "rich", "pydantic", "yaml",
    "psutil", "matplotlib", "requests", "setuptools", "job",
}  # fmt: skip

_events: list[tuple[str, float, float, float]] = []  # part, begin, end, seconds that are not in a part within it
_within: list[float] = []  # seconds of the parts within each one that is open


def now() -> float:
    """Seconds since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """The block is ``name``, but for the parts within it."""
    began = now()
    _within.append(0.0)
    try:
        yield
    finally:
        ended = now()
        own = ended - began - _within.pop()
        if _within:
            _within[-1] += ended - began
        _events.append((name, began, ended, own))


class _Finder(PathFinder):
    """Finds what Python would find, and has the execution of the packages' modules timed."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        spec = super().find_spec(fullname, path, target)
        package = fullname.partition(".")[0]
        if spec and spec.loader and package in PACKAGES:
            execute = spec.loader.exec_module

            def timed(module: ModuleType) -> None:
                with part(f"import {package}"):
                    execute(module)
                for name, told in CALLS.get(fullname, {}).items():
                    _time(module, name, told)

            spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec


def _time(module: ModuleType, name: str, told: str) -> None:
    """Replace a function of a module, or of a class of it, by one that is timed. Not there in every checkout."""
    *owner, function = name.split(".")
    holder: Any = getattr(module, owner[0], None) if owner else module
    whole = getattr(holder, function, None)
    if whole is None:
        return

    @wraps(whole)
    def timed(*arguments: Any, **options: Any) -> Any:
        with part(told):
            return whole(*arguments, **options)

    setattr(holder, function, timed)


def _started() -> float:
    with open("/proc/self/stat", encoding="utf-8") as stream:
        ticks = int(stream.read().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


def _write(folder: str, leave: Callable[[int], Any], *code: int) -> None:
    trace = {"arguments": sys.argv, "started": _started(), "ready": _ready, "ended": now(), "events": _events}
    trace["rank"] = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK"))
    with open(f"{folder}/{os.getpid()}.json", "w", encoding="utf-8") as stream:
        json.dump(trace, stream)
    leave(*code)


if os.environ.get(FOLDER):
    _ready = now()
    _folder, _exit = os.environ[FOLDER], os._exit
    sys.meta_path.insert(next(i for i, finder in enumerate(sys.meta_path) if finder is PathFinder), _Finder)
    os._exit = lambda code: _write(_folder, _exit, code)  # type: ignore[assignment, return-value]
    atexit.register(_write, _folder, lambda: None)
