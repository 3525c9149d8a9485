"""The collectives that copy, on real ranks; and a collective that never ends."""

from __future__ import annotations

import functools
import os
import signal
import threading
from typing import Any

import mxnet as mx
import numpy as np
import pytest

from job.distributed import watchdog
from job.distributed.comm import Comm, connect
from tests.cuda import stand_in
from tests.parallel.conftest import exit_codes


def exchanged(comm: Comm) -> Any:
    content = os.urandom(100_000) if comm.rank == 0 else b"what other ranks pass does not count"
    same = comm.broadcast_bytes(content, "bytes")
    texts = comm.gather_text(f"ränk {comm.rank}" if comm.rank != 1 else "", "texts")
    long = comm.gather_text("x" * 600, "long")
    return same, comm.broadcast_bytes(b"", "nothing"), texts, [len(text) for text in long]


@pytest.mark.parametrize("size", [1, 3])
def test_bytes_and_text_reach_every_rank(run_ranks: Any, size: int) -> None:
    results = run_ranks(exchanged, size)
    for same, nothing, texts, lengths in results:
        assert len(same) == 100_000
        assert same == results[0][0]
        assert nothing == b""
        assert texts == [f"ränk {rank}" if rank != 1 else "" for rank in range(size)]
        assert lengths == [500] * size


def broadcast(comm: Comm) -> Any:
    odd = [0.1, -3e38, 1e-40, -0.0] if comm.rank == 0 else [float("nan"), float("inf"), 7.0, 1.0]
    arrays = [mx.nd.array(odd, dtype="float32"), mx.nd.full((2, 2), comm.rank + 0.1, dtype="float64")]
    comm.broadcast_(arrays, "arrays")
    return [array.asnumpy() for array in arrays]


def test_a_broadcast_leaves_the_bits_of_rank_0_whatever_the_others_held(run_ranks: Any) -> None:
    expected = [np.array([0.1, -3e38, 1e-40, -0.0], np.float32), np.full((2, 2), 0.1)]
    for arrays in run_ranks(broadcast, 3):
        assert [array.tobytes() for array in arrays] == [array.tobytes() for array in expected]


def wait_on_a_device() -> None:
    """The body of a script: rank 1 dies, and rank 0 waits for what does not end, as a sum of NCCL then."""
    watchdog._CALM_SECONDS = 0.5
    comm = connect(60.0)
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    array = mx.nd.zeros(1)
    stand_in._push(lambda *_: threading.Event().wait(), mx.cpu(), [], [array])
    with comm.guard("step 7"):
        array.wait_to_read()


@pytest.mark.fault(1)
def test_a_rank_that_waits_for_its_device_while_another_one_dies_ends_and_names_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    codes = exit_codes("from tests.parallel.test_comm import wait_on_a_device as f; f()", 2, limit_seconds=50)
    said = capfd.readouterr().err
    assert codes == {0: 1, 1: -signal.SIGKILL}, said
    assert "error: rank 0: step 7: rank 1 has ended, and this rank would wait for ever" in said
    assert "in wait_on_a_device" in said


def rows(rank: int) -> list[np.ndarray]:
    random = np.random.default_rng(rank)
    return [random.normal(size=(4, 5)), random.integers(-(2**60), 2**60, 1000), random.normal(size=(4, 5))]


def sums(comm: Comm) -> Any:
    shares = getattr(comm, "_shared", None) is not None
    return shares, [comm.sum(values, f"sum of {values.size}").tobytes() for values in rows(comm.rank)], begun(comm)


def begun(comm: Comm) -> list[int]:
    """Of three sums, the middle one small, which are waited for in another order on rank 0."""
    values = [np.full(size, 10 * number + comm.rank) for number, size in enumerate((2**20, 3, 2**20))]
    totals = [comm.begin_sum(each, f"begun.{number}") for number, each in enumerate(values)]
    found = {number: int(totals[number]()[-1]) for number in (range(3) if comm.rank else range(2, -1, -1))}
    return [found[number] for number in range(3)]


def test_ranks_of_one_machine_sum_through_memory_in_the_order_of_ranks(run_ranks: Any) -> None:
    expected = [functools.reduce(np.add, of_all).tobytes() for of_all in zip(*map(rows, range(3)))]
    for shares, found, several in run_ranks(sums, 3):
        assert shares
        assert found[1:] == expected[1:], "the first goes through Horovod, whose order is its own"
        assert several == [3, 33, 63], "begun together, and waited for in any order"
