"""The collectives that copy, on real ranks."""

from __future__ import annotations

import os
from typing import Any

import mxnet as mx
import numpy as np
import pytest

from job.distributed.comm import Comm


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
