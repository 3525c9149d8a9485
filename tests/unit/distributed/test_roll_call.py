"""The roll call: who is late is found without a collective."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from job.distributed import roll_call
from job.distributed.roll_call import RollCall


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    with mock.patch.object(roll_call, "_ANSWER_SECONDS", 0.5):
        yield


def ranks(*entered: int) -> list[RollCall]:
    calls = [RollCall(rank, lambda count=count: count) for rank, count in enumerate(entered)]  # type: ignore[misc]
    for call in calls:
        call.peers = [other.address for other in calls]
    return calls


def test_the_rank_that_has_entered_fewest_collectives_is_late() -> None:
    for call in ranks(7, 6, 7):
        assert call.late().startswith("late: rank 1, alive, but behind the others")


def test_several_may_be_late() -> None:
    assert ranks(7, 6, 5, 7)[0].late().startswith("late: ranks 1, 2, alive")


def test_a_rank_that_does_not_answer_is_named() -> None:
    calls = ranks(7, 7, 7)
    nobody = RollCall(9, lambda: 0).address
    with mock.patch.object(calls[0], "peers", [calls[0].address, (nobody[0], 1), calls[2].address]):
        assert calls[0].late() == "late: rank 1, silent: stopped, dead or cut off"


def test_if_nobody_answers_the_fault_may_be_here() -> None:
    (call,) = ranks(7)
    call.peers = [call.address, (call.address[0], 1), (call.address[0], 2)]
    assert call.late() == "none of the other ranks answers: this one may be cut off"


def test_if_all_are_level_nobody_is_accused() -> None:
    assert ranks(7, 7)[0].late() == ""


def test_before_the_ranks_know_each_other_nobody_is_accused() -> None:
    assert RollCall(0, lambda: 1).late() == ""


def test_whoever_is_asked_shows_its_stacks_once(capfd: pytest.CaptureFixture[str]) -> None:
    first, _ = ranks(7, 6)
    first.late()
    first.late()
    assert capfd.readouterr().err.count("rank 1: another rank waits too long; here are") == 1
