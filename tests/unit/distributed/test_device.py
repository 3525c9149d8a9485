"""The device of each rank, on nodes with as many GPUs as the test says."""

from __future__ import annotations

import random

import mxnet as mx
import numpy as np
import pytest

from job.distributed.comm import Comm
from job.distributed.device import choose_device, seed_everything
from job.errors import UsageError


class Local(Comm):
    def __init__(self, local_rank: int, local_size: int) -> None:
        super().__init__()
        # Of a second node, so that the global rank must not be taken for the local one.
        self.rank, self.size = local_size + local_rank, 2 * local_size
        self.local_rank, self.local_size = local_rank, local_size


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(mx.context, "num_gpus", lambda: count)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert choose_device("auto", Local(1, 2)) == mx.cpu()


@pytest.mark.parametrize("wanted", ["auto", "gpu"])
@pytest.mark.parametrize("local_rank", [0, 1, 3])
def test_each_rank_of_a_node_has_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, wanted: str, local_rank: int
) -> None:
    with_gpus(monkeypatch, 4)
    assert choose_device(wanted, Local(local_rank, 4)) == mx.gpu(local_rank)


def test_a_node_may_have_more_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 8)
    assert choose_device("auto", Local(1, 2)) == mx.gpu(1)


def test_the_cpu_is_taken_when_wanted_though_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 4)
    assert choose_device("cpu", Local(0, 8)) == mx.cpu()


def test_the_cpu_can_be_had_where_counting_gpus_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_driver() -> int:
        raise mx.MXNetError("CUDA: unknown error")

    monkeypatch.setattr(mx.context, "num_gpus", broken_driver)
    assert choose_device("cpu", Local(0, 1)) == mx.cpu()


def test_a_gpu_that_is_wanted_and_missing_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(UsageError, match=r"run\.device=gpu.*no GPU.*run\.device=cpu"):
        choose_device("gpu", Local(0, 1))


@pytest.mark.parametrize("wanted", ["auto", "gpu"])
@pytest.mark.parametrize(("gpus", "told"), [(1, "1 GPU;"), (3, "3 GPUs;")])
def test_fewer_gpus_than_ranks_is_a_usage_error_on_every_rank_that_names_both(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, told: str
) -> None:
    with_gpus(monkeypatch, gpus)
    for local_rank in range(4):
        with pytest.raises(UsageError, match=rf"4 ranks.*{told}.*run\.device=cpu"):
            choose_device(wanted, Local(local_rank, 4))


def draws() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.random()), mx.nd.random.uniform(shape=3).asnumpy().tolist()


def test_a_seed_fixes_all_three_generators() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert all(one != other for one, other in zip(draws(), first))
