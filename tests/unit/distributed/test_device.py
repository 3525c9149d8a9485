"""The device of each rank, on nodes with as many GPUs as the test says."""

from __future__ import annotations

import os
import random
from typing import Optional

import mxnet as mx
import numpy as np
import pytest

from job.distributed import device
from job.distributed.comm import Comm
from job.distributed.device import choose_device, seed_everything
from job.errors import UsageError


class Local(Comm):
    """A rank of the second of two nodes, so that the global rank must not be taken for the local one."""

    def __init__(self, local_rank: int, local_size: int, cards: Optional[list[str]] = None) -> None:
        super().__init__()
        self.rank, self.size = local_size + local_rank, 2 * local_size
        self.local_rank, self.local_size = local_rank, local_size
        self._cards = cards

    def gather_text(self, text: str, name: str) -> list[str]:
        node, cores, own = text.split(" ", 2)
        cards = self._cards or [own and str(place) for place in range(self.local_size)]
        cards[self.local_rank] = own
        return [f"{host} {cores} {card}" for host in ("first", node) for card in cards]


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this process would have been bound to."""
    found: list[object] = []
    monkeypatch.setattr(device, "bind", found.append)
    return found


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(mx.context, "num_gpus", lambda: count)
    monkeypatch.setattr(device, "_bus_id", str)


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
def test_fewer_gpus_than_ranks_is_a_usage_error_on_the_rank_that_has_none(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    with_gpus(monkeypatch, 3)
    with pytest.raises(UsageError, match=r"4 ranks.*3 GPUs;.*run\.device=cpu"):
        choose_device(wanted, Local(3, 4, cards=["0", "1", "2", ""]))
    with pytest.raises(UsageError, match=r"some ranks have a GPU.*first.*some have none;.*run\.device=cpu"):
        choose_device(wanted, Local(1, 4, cards=["0", "1", "2", ""]))


@pytest.mark.parametrize("wanted", ["auto", "gpu"])
def test_ranks_that_see_one_gpu_each_take_it_if_it_is_not_the_same_one(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    with_gpus(monkeypatch, 1)
    monkeypatch.setattr(device, "_bus_id", lambda index: "0000:3B:00.0")
    others = ["0000:1A:00.0", "", "0000:5E:00.0", "0000:86:00.0"]
    assert choose_device(wanted, Local(1, 4, cards=[*others])) == mx.gpu(0)
    others[3] = "0000:3B:00.0"
    with pytest.raises(UsageError, match=r"4 ranks.*1 GPU;.*run\.device=cpu"):
        choose_device(wanted, Local(1, 4, cards=[*others]))


def test_where_cuda_does_not_tell_a_gpu_is_its_number_among_those_that_are_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device._bus_id(3) == "3 of all"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert device._bus_id(1) == "1 of 2,5"


@pytest.mark.parametrize("gpus", [0, 2])
def test_ranks_with_and_without_a_gpu_do_not_start_together_and_the_nodes_are_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(UsageError, match=r"some ranks have a GPU, and on first.*some have none"):
        choose_device("auto", Local(0, 2, cards=["", "" if gpus else "1"]))


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_a_rank_is_bound_to_what_is_near_its_device_among_the_ranks_of_its_node(
    monkeypatch: pytest.MonkeyPatch, bound: list[object], wanted: str
) -> None:
    with_gpus(monkeypatch, 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 70})
    monkeypatch.setattr(device, "near", lambda *arguments: arguments)
    choose_device(wanted, Local(2, 3))
    cards = ["0", "1", "2"] if wanted == "auto" else [""] * 3
    assert bound == [(2, cards, [{0, 3, 70}] * 3)]


def draws() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.random()), mx.nd.random.uniform(shape=3).asnumpy().tolist()


def test_a_seed_fixes_all_three_generators() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert all(one != other for one, other in zip(draws(), first))
