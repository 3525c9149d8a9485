"""Ranks and launchers that die, hang, or are asked to go: rows 1 to 4 of the matrix."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import psutil
import pytest

from tests.faults.conftest import Run, finish, wait_for_line


@pytest.mark.fault(1)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["start:0", "step:7", "allreduce:7", "save:10", "evaluation:12"])
def test_a_killed_rank_ends_the_run_in_time_and_it_goes_on_to_the_same_bits(
    run: Run, whole: Run, point: str, rank: int
) -> None:
    where, step = point.split(":")
    ended = run.train(2, fault=f"kill:{where}:{rank}:{step}")
    assert ended.code == 1
    assert f"Process name: {rank}\n" in ended.output
    assert "Exit code: -9" in ended.output or "Exit code: 137" in ended.output
    run.assert_nothing_left()
    again = run.train(2 - rank, "run.resume=auto")  # with another number, or with the same
    assert again.code == 0, again.output
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()


@pytest.mark.fault(1)
def test_a_rank_killed_as_it_writes_leaves_the_checkpoint_before(run: Run, whole: Run) -> None:
    ended = run.train(2, fault="kill:write:0:10")
    assert ended.code == 1
    assert run.checkpoints() == ["step-00000005", "step-00000006", "step-00000010.partial"]
    again = run.train(2, "run.resume=auto")
    assert "going on after step 6" in again.output
    assert run.weights() == whole.weights()
    assert not any(name.endswith(".partial") for name in run.checkpoints())


@pytest.mark.fault(2)
@pytest.mark.parametrize("how", ["kill", "term"])
def test_no_rank_outlives_its_launcher(run: Run, how: str) -> None:
    run.train(2, "train.epochs=1000", fault=f"{how}-launcher:step:1:7")
    run.assert_nothing_left()


@pytest.mark.fault(3)
@pytest.mark.parametrize("signal_and_rank", ["term:0", "term:1", "usr1:1", "term:all"])
def test_a_signal_to_any_rank_stops_all_at_one_step_with_a_checkpoint(
    run: Run, whole: Run, signal_and_rank: str
) -> None:
    name, rank = signal_and_rank.split(":")
    ended = run.train(2, "checkpoint.every_steps=null", fault=f"{name}:step:{rank}:7")
    assert "Exit code: 75" in ended.output
    assert "preempted: rank 0: stopped after step" in ended.output
    asked = f"rank {'0' if rank == 'all' else rank} received SIG{name.upper()}"
    assert asked in ended.output
    run.assert_nothing_left()
    last = run.checkpoints()[-1]
    assert f"stopped after step {int(last[5:])}," in ended.output
    assert 8 <= int(last[5:]) <= 10
    again = run.train(1, "run.resume=auto", "checkpoint.every_steps=null")
    assert again.code == 0, again.output
    assert run.weights() == whole.weights()
    assert run.records() == whole.records()


@pytest.mark.fault(3)
def test_a_second_signal_ends_at_once(run: Run) -> None:
    ended = run.train(2, fault="twice:step:1:7")
    assert "SIGTERM for the second time: ending at once" in ended.output
    run.assert_nothing_left()


CONTROLLERS = pytest.mark.parametrize("controller", [["--gloo"], []], ids=["gloo", "mpi"])


@pytest.mark.fault(3)
@pytest.mark.parametrize("to", ["script", "rank"])
@CONTROLLERS
def test_the_launch_script_ends_with_75_and_goes_on_when_given_again(run: Run, to: str, controller: list[str]) -> None:
    command = run.script(2, *controller, "train.epochs=1000")
    process = run.popen(command)
    output = wait_for_line(process, "step 8/")
    (process if to == "script" else ranks_of_script(run)[-1]).send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.code == 75, output + ended.output
    run.assert_nothing_left()
    stopped_at = re.search(r"preempted: rank 0: stopped after step (\d+),", ended.output)
    assert stopped_at, ended.output
    assert "improperly" not in ended.output and "second time" not in ended.output  # as mpirun would end other ranks
    again = run.popen(command)
    wait_for_line(again, f"going on after step {stopped_at[1]}\n")
    again.send_signal(signal.SIGTERM)
    finish(again)
    run.assert_nothing_left()


@pytest.mark.fault(3)
@CONTROLLERS
def test_a_second_signal_ends_the_launch_script_even_if_a_rank_cannot_stop(run: Run, controller: list[str]) -> None:
    process = run.popen(run.script(2, *controller, "train.epochs=1000"))
    wait_for_line(process, "step 8/")
    ranks_of_script(run)[1].send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    wait_for_line(process, "stops at once")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code in (143, 75)  # mpirun wakes whom it ends, who may still manage to stop well
    run.assert_nothing_left()


@pytest.mark.fault(3)
@CONTROLLERS
def test_the_launch_script_stops_well_though_nobody_reads_its_messages_any_more(
    run: Run, controller: list[str]
) -> None:
    reader, writer = os.pipe()
    process = run.popen(run.script(2, *controller, "train.epochs=1000"), stderr=writer)
    os.close(writer)
    wait_for_line(process, "step 8/")
    os.close(reader)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 75
    run.assert_nothing_left()


def ranks_of_script(run: Run) -> list[psutil.Process]:
    """The processes that train, in no particular order."""
    return [p for p in run.processes() if p.name().startswith("python") and "train.py" in " ".join(p.cmdline()[:2])]


@pytest.mark.fault(4)
@pytest.mark.parametrize("point", ["step:7", "evaluation:12"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_sleeps_is_noticed_and_named_and_all_show_their_stacks(run: Run, point: str, rank: int) -> None:
    where, step = point.split(":")
    ended = run.train(2, "run.step_timeout_seconds=4", fault=f"sleep:{where}:{rank}:{step}")
    assert ended.code == 1
    assert f"late: rank {rank}, alive, but behind the others" in ended.output
    assert "no answer within 4 s" in ended.output
    assert "in broken" in ended.output, "the stack of the rank that sleeps"
    assert "most recent call first" in ended.output
    run.assert_nothing_left()


@pytest.mark.fault(4)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_noticed_and_named(run: Run, rank: int) -> None:
    ended = run.train(2, "run.step_timeout_seconds=4", fault=f"stop:step:{rank}:7")
    assert ended.code == 1
    assert f"late: rank {rank}, silent: stopped, dead or cut off" in ended.output
    run.assert_nothing_left()


@pytest.mark.fault(2)
@pytest.mark.parametrize("name, controller", [("horovodrun", ["--gloo"]), ("mpirun", [])])
def test_no_rank_outlives_the_launcher_of_the_launch_script(run: Run, name: str, controller: list[str]) -> None:
    process = run.popen(run.script(2, *controller, "train.epochs=1000"))
    wait_for_line(process, "step 8/")
    launchers = [p for p in run.processes() if name in " ".join(p.cmdline()[:2])]
    assert launchers
    for launcher in launchers:
        launcher.kill()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail("the script outlived its launcher")
    run.assert_nothing_left()
