"""The device path on real ranks, with arrays of the CPU: what a step learns there, and what a lost rank does to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from job.distributed.comm import Comm, HorovodComm
from tests.cuda.queued import counted_waits, queued
from tests.parallel.conftest import ROOT, environment, launcher
from tests.unit.training.test_learner import learner, split, take_step

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float64, two micro-batches": {"dtype": "float64", "micros": 2},
    "float64, groups of three shards": {"dtype": "float64", "model": {"sync_batch_norm_group": 3}},
    "float16": {"dtype": "float32", "model": {"dtype": "float16"}},
}
RANKS = {"host": (4,), "kernels": (1, 2, 3, 4), "graphs": (1, 4)}  # in float32; otherwise none between 1 and 4
STEPS = 2


Trained = dict[str, np.ndarray]  # the weights and running statistics of a network, by their place in it


def network() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(5, 5), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D())
    net.add(nn.Dense(16), nn.BatchNorm(), nn.Activation("relu"), nn.BatchNorm(scale=False), nn.Dense(10))
    return net


def trained(comm: Comm, dtype: str, micros: int = 1, steps: int = STEPS, **options: Any) -> Trained:
    """A few steps on batches of 50 samples, which eight shards do not divide."""
    train = {"accumulate_steps": micros}
    trained = learner(network(), dtype, comm, train, shards=8, learning_rate=0.125, **options)
    data = split(50 * steps)
    for samples in np.array_split(np.arange(50 * steps), steps):
        take_step(trained, data, np.array_split(samples, micros), 0.125)
    return {name: p.data().asnumpy() for name, p in trained.net._collect_params_with_prefix().items()}


def on_some_of_the_ranks(comm: Comm) -> dict[str, dict[str, Trained]]:
    """By setting, and by path and number of ranks: of those that this rank is one of, which are the last ones."""
    import horovod.mxnet as hvd

    sets = {size: hvd.add_process_set(list(range(comm.size - size, comm.size))) for size in (2, 3)}
    found: dict[str, dict[str, Trained]] = {}
    for setting, options in SETTINGS.items():
        for path, sizes in RANKS.items():
            for size in sizes:
                if comm.rank >= comm.size - size and (setting == "float32" or size in (1, 4)):
                    some = {1: Comm(), 4: comm}.get(size) or HorovodComm(60.0, sets[size])
                    found.setdefault(setting, {})[f"{path} on {size}"] = on_path(path, some, options)
    return found


def on_path(path: str, comm: Comm, options: dict[str, Any]) -> Trained:
    if path == "host":
        return trained(comm, **options)
    with queued(path), counted_waits() as counts:
        found = trained(comm, **options)
    runs = len([key for key in found if "running_mean" in key]) * STEPS * options.get("micros", 1)
    assert counts == {"forward": runs, "backward": runs}, counts  # and no waits
    return found


@pytest.fixture(scope="module")
def by_rank(run_ranks: Any) -> list[dict[str, dict[str, Trained]]]:
    return run_ranks(on_some_of_the_ranks, 4)


def bits(found: Trained) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in found.items()}


@pytest.mark.parametrize("path", ["kernels", "graphs"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_two_three_and_four_ranks_learn_the_same_bits(by_rank: Any, setting: str, path: str) -> None:
    runs = {name: bits(found) for name, found in by_rank[3][setting].items() if name.startswith(path)}
    assert set(runs) >= {f"{path} on 1", f"{path} on 4"}
    assert all(found == runs[f"{path} on 1"] for found in runs.values())
    assert all(bits(of_rank[setting][f"{path} on 4"]) == runs[f"{path} on 4"] for of_rank in by_rank)


@pytest.mark.parametrize("path", ["kernels", "graphs"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_device_path_learns_what_the_cpu_learns(by_rank: Any, setting: str, path: str) -> None:
    found, expected = (by_rank[0][setting][f"{one} on 4"] for one in (path, "host"))
    same_path = (setting, path) == ("float16", "graphs")
    assert (bits(found) == bits(expected)) == same_path
    tolerance = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2}[setting.partition(",")[0]]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance, err_msg=name)


class Mortal(HorovodComm):
    """Of which the last rank dies as the second forward of a layer sums its statistics."""

    sums = 0

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str, process_set: Any = None) -> None:
        Mortal.sums += name.endswith("1.forward")
        if Mortal.sums == 2 and self.rank == self.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().allreduce_(arrays, name, process_set)


def train_until_a_rank_dies(kind: str) -> None:
    """The body of a script."""
    from job import command
    from job.distributed.comm import peer_errors

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which may come before what is tested

    def run() -> None:
        comm = Mortal(timeout_seconds=30)
        with peer_errors(), queued(kind), comm.guard("training"):
            trained(comm, "float32")

    command.run(run)


@pytest.mark.fault(1)
def test_a_rank_that_dies_in_a_queued_sum_ends_the_others_with_the_usual_error() -> None:
    script = "from tests.parallel.test_queued_batch_norm import train_until_a_rank_dies as f; f('kernels')"
    done = subprocess.run(
        [*launcher(2), "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    # Which one depends on whether this rank's sum was on its way when Horovod stopped, or came later and was refused.
    assert re.search("stopped, because another rank failed|rank 1 has ended, and this rank would wait", said), said
    assert not re.search(r"^\[\d\].*Traceback", said, re.MULTILINE), said  # of a rank; horovodrun always has one
