"""Sums through shared memory, by processes that have nothing else in common but a hub that sums slowly."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Callable, Optional

import numpy as np
import pytest

from job.distributed import shared_sums
from job.distributed.shared_sums import SharedSums
from job.errors import PeerLostError

PROCESSES = multiprocessing.get_context("spawn")
PATIENCE = 60.0
SHAPES = {"table": (8, 41), "number": (1,), "odd": (3, 7), "gradient": (1001,)}
ROUNDS = 300

Body = Callable[[Any, int, int], Any]


def given(name: str, number: int, rank: int) -> np.ndarray:
    """What a rank puts into its sum ``number`` of this name; sums of such numbers depend on their order."""
    random = np.random.default_rng([number, rank, len(name)])
    if name == "gradient":
        return random.integers(-(2**60), 2**60, SHAPES[name])
    return random.normal(size=SHAPES[name]) * 10.0 ** random.integers(-9, 9)


def expected(name: str, number: int, size: int) -> np.ndarray:
    return functools.reduce(np.add, [given(name, number, rank) for rank in range(size)])


def process(body: Body, rank: int, size: int, hub: Connection, blind: Optional[int]) -> None:
    if rank == blind:  # as where a container forbids it
        shared_sums._made = lambda token: None
        shared_sums._opened = lambda where, token: None

    def slow(values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        hub.send(values)
        return lambda: np.asarray(hub.recv())

    def tell(text: str) -> list[str]:
        hub.send(text)
        texts: list[str] = hub.recv()
        return texts

    sums = shared_sums.meet(rank, size, tell, slow)
    hub.send(("done", body(sums, rank, size)))


def run(body: Body, size: int, blind: Optional[int] = None) -> list[Any]:
    """What each rank returns; None of one that ended without."""
    pairs = [PROCESSES.Pipe() for _ in range(size)]
    ranks = [PROCESSES.Process(target=process, args=(body, rank, size, pairs[rank][1], blind)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for _, theirs in pairs:
        theirs.close()
    results: list[Any] = [None] * size
    waiting = set(range(size))
    try:
        while waiting:
            said = {rank: heard(pairs[rank][0]) for rank in sorted(waiting)}
            for rank, what in said.items():
                if what is None or (isinstance(what, tuple) and what[0] == "done"):
                    results[rank] = what and what[1]
                    waiting.discard(rank)
            if asked := {rank: what for rank, what in said.items() if rank in waiting}:
                values = list(asked.values())
                answer = values if isinstance(values[0], str) else functools.reduce(np.add, values)
                for rank in asked:
                    pairs[rank][0].send(answer)
    finally:
        for one in ranks:
            one.join(PATIENCE)
            one.kill()
    return results


def heard(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE), "a rank hangs"
    try:
        return pipe.recv()
    except EOFError:
        return None


def sum_in_turns(sums: SharedSums, rank: int, size: int) -> int:
    wrong = 0
    for number in range(ROUNDS):
        for name in SHAPES:
            total = sums.begin(given(name, number, rank), name)()
            wrong += total.tobytes() != expected(name, number, size).tobytes() or total.shape != SHAPES[name]
    return wrong


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_sum_in_the_order_of_ranks_to_the_bit(size: int) -> None:
    assert run(sum_in_turns, size) == [0] * size


def sum_ahead(sums: SharedSums, rank: int, size: int) -> list[float]:
    """Three sums. Rank 1 reads the first of them only when rank 0 has begun the second."""
    sums.begin(np.zeros(1), "numbers")()
    if rank == 1:
        (part,), add = sums._parts.values(), functools.reduce

        def late(*arguments: Any) -> Any:
            end = time.monotonic() + PATIENCE
            while part._done == 1 and part._counts[0] < 2 and time.monotonic() < end:
                os.sched_yield()
            return add(*arguments)

        shared_sums.functools = SimpleNamespace(reduce=late)
    return [float(sums.begin(np.full(1, 10.0**number), "numbers")()[0]) for number in range(3)]


def test_a_rank_that_is_one_sum_ahead_does_not_disturb_another() -> None:
    assert run(sum_ahead, 2) == [[2.0, 20.0, 200.0]] * 2


def sum_in_threads(sums: SharedSums, rank: int, size: int) -> int:
    for name in SHAPES:  # first here, by one thread, for the hub hears but one at a time
        sums.begin(given(name, 0, rank), name)()

    def all_of(name: str) -> int:
        totals = [sums.begin(given(name, number, rank), name)() for number in range(1, ROUNDS)]
        return sum(total.tobytes() != expected(name, 1 + i, size).tobytes() for i, total in enumerate(totals))

    with ThreadPoolExecutor(len(SHAPES)) as threads:
        return sum(threads.map(all_of, sorted(SHAPES, reverse=bool(rank))))


def test_names_do_not_wait_for_one_another() -> None:
    assert run(sum_in_threads, 2) == [0, 0]


def begin_all_first(sums: SharedSums, rank: int, size: int) -> int:
    wrong = 0
    for number in range(ROUNDS):
        begun = [(name, sums.begin(given(name, number, rank), name)) for name in SHAPES]
        in_turn = sorted(begun, key=lambda pair: pair[0], reverse=bool(rank)) if number else begun
        wrong += sum(finish().tobytes() != expected(name, number, size).tobytes() for name, finish in in_turn)
    return wrong


def test_sums_of_several_names_are_begun_before_one_is_waited_for() -> None:
    assert run(begin_all_first, 2) == [0, 0]


def sum_without_the_last(sums: SharedSums, rank: int, size: int) -> str:
    sums.begin(np.ones(3), "first")()
    sums.begin(np.ones(3), "first")()
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        sums.begin(np.ones(3), "first")()
    except PeerLostError as error:
        sums._slow(np.zeros(1), "both that live know")()
        return str(error)
    return "it returned"


def test_a_rank_that_dies_is_told_to_all_that_wait_for_it() -> None:
    told = run(sum_without_the_last, 3)
    assert told == ["stopped, because another rank failed; its message says why"] * 2 + [None]


def slow_sums(sums: SharedSums, rank: int, size: int) -> tuple[list[str], bool]:
    """Which sums went the slow way, and whether all were right."""
    whole, asked = sums._slow, []

    def counted(values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        asked.append(name)
        return whole(values, name)

    sums._slow = counted
    shared_sums._LARGEST_BYTES = 8 * 100 * 2**2
    given = [(5, "a"), (5, "a"), (6, "a"), (5, "b"), (5, "a"), (100, "c"), (100, "c"), (101, "d"), (101, "d")]
    right = [bool((sums.begin(np.ones(numbers), name)() == size).all()) for numbers, name in given]
    return asked, all(right)


def test_only_the_first_sum_of_a_name_and_size_and_large_ones_are_slow() -> None:
    assert run(slow_sums, 2) == [(["a", "a", "b", "c", "d", "d"], True)] * 2


def test_what_is_large_for_more_ranks_is_less() -> None:
    assert run(slow_sums, 3) == [(["a", "a", "b", "c", "c", "d", "d"], True)] * 3


def is_shared(sums: Optional[SharedSums], rank: int, size: int) -> bool:
    return sums is not None


@pytest.mark.parametrize("blind", [None, 0, 1])
def test_if_one_rank_has_no_part_in_the_memory_none_shares_it(blind: Optional[int]) -> None:
    assert run(is_shared, 2, blind) == [blind is None] * 2
