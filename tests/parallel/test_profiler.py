"""Profiling on real ranks: who is slow and who waits, both controllers, and a run that is stopped in the middle."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from job.monitoring.profiler import PARTS
from tests import synthetic
from tests.parallel.conftest import environment, launcher

# On rank 1 each batch takes half a second to make.
SLOW_FEED = """
import time
from job.distributed.placement import share_cores
from job.quick_import import quicken
share_cores()  # before MXNet is imported
quicken()
from job import command, train
from job.training import learner
import mxnet
from job.distributed.placement import placement

def slowly(self, *arguments, original=learner.Feed.__call__):
    mxnet.nd.waitall()  # so that no operator hides it
    time.sleep(0.5 * placement().rank)
    return original(self, *arguments)

learner.Feed.__call__ = slowly
command.run(train.main)
"""

# Rank 1 is told to stop in its second step, while it makes the batch of the third one.
STOPPED = """
import os, signal
from job.distributed.placement import share_cores
from job.quick_import import quicken
share_cores()  # before MXNet is imported
quicken()
from job import command, train
from job.training import learner
from job.distributed.placement import placement

def stopping(self, *arguments, original=learner.Feed.__call__, batches=[]):
    batches.append(1)
    if placement().rank == 1 and len(batches) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *arguments)

learner.Feed.__call__ = stopping
command.run(train.main)
"""

PLAIN = """
from job.distributed.placement import share_cores
from job.quick_import import quicken
share_cores()
quicken()
from job import command, train
command.run(train.main)
"""


def run(script: str, folder: Path, *overrides: str, controller: str = "gloo", **variables: str) -> tuple[int, str]:
    """The exit code of a run of 6 steps on two ranks, with these environment variables, and what it printed."""
    data = synthetic.write(folder.parent / "data")
    (file := folder.parent / "train.py").write_text(script)
    command = [*launcher(2, controller), str(file), *data, f"run.dir={folder}", "train.epochs=1", *overrides]
    environ = {**environment(), **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def table(printed: str) -> dict[str, tuple[float, float, float, int]]:
    """By part: the mean in milliseconds a step, its share in per cent, the most, and the rank that has it."""
    rows = re.findall(r"profile: (\w+) +([0-9.]+) +([0-9.]+)% +([0-9.]+) \(rank (\d)\)", printed)
    return {part: (float(mean), float(share), float(most), int(rank)) for part, mean, share, most, rank in rows}


def assert_parts_add_up(printed: str) -> None:
    rows = table(printed)
    assert list(rows) == [*PARTS, "whole"]
    assert sum(rows[part][0] for part in PARTS) == pytest.approx(rows["whole"][0], abs=0.03)


def allreduces(timeline: Path) -> Counter[str]:
    """How often Horovod's timeline shows the allreduce of each array."""
    events = json.loads(timeline.read_text())
    arrays = {event["pid"]: event["args"].get("name") for event in events if event.get("name") == "process_name"}
    return Counter(arrays[event["pid"]] for event in events if event.get("name") == "ALLREDUCE")


def steps_in(trace: Path) -> list[str]:
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    return [name for name in names if name.startswith("step ")]


def test_a_rank_whose_input_is_slow_shows_as_input_there_and_as_wait_on_the_other(tmp_path: Path) -> None:
    code, printed = run(SLOW_FEED, tmp_path / "run", "run.profile_steps=3-5", controller="mpi")
    assert code == 0, printed
    rows = table(printed)
    assert_parts_add_up(printed)
    assert rows["input"][3] == 1 and rows["input"][2] >= 500
    assert rows["wait"][3] == 0 and rows["wait"][2] >= 250
    profile = tmp_path / "run" / "profile"
    assert all(steps_in(profile / f"steps-3-5.rank{rank}.json") == ["step 3", "step 4", "step 5"] for rank in (0, 1))
    counted = allreduces(profile / "steps-3-5.horovod.json")
    assert counted["horovod_allreduce.batch_norm.1.0.forward"] == 3
    assert counted["horovod_allreduce.batch_norm.1.1.backward.0"] == 3


def test_a_profiled_run_that_is_stopped_and_goes_on_profiles_the_rest_and_learns_the_same(tmp_path: Path) -> None:
    assert run(PLAIN, tmp_path / "plain")[0] == 0
    profiled = ["run.profile_steps=2-6", "run.resume=auto"]
    code, printed = run(STOPPED, tmp_path / "run", *profiled)
    assert code != 0 and "preempted" in printed
    stopped = int(re.findall(r"stopped after step (\d)", printed)[0])
    assert_parts_add_up(printed)
    assert f"profile: steps 2-{stopped} on 2 ranks" in printed
    profile = tmp_path / "run" / "profile"
    before = {file: file.read_bytes() for file in profile.iterdir()}
    assert sorted(file.name for file in before) == [
        "steps-2-6.horovod.json", "steps-2-6.rank0.json", "steps-2-6.rank1.json",
    ]  # fmt: skip
    assert steps_in(profile / "steps-2-6.rank1.json") == [f"step {step}" for step in range(2, stopped + 1)]
    assert allreduces(profile / "steps-2-6.horovod.json")["horovod_allreduce.batch_norm.1.0.forward"] == stopped - 1

    whole = tmp_path / "whole.json"  # a timeline of the whole run, which the user has asked Horovod for
    code, printed = run(PLAIN, tmp_path / "run", *profiled, HOROVOD_TIMELINE=str(whole))
    assert code == 0, printed
    assert "Horovod's timeline: none, as HOROVOD_TIMELINE names another" in printed
    assert allreduces(whole)["horovod_allreduce.batch_norm.1.0.forward"] == 6 - stopped
    rest = f"{stopped + 1}-6" if stopped < 5 else "6"
    assert f"profile: steps {rest} on 2 ranks" in printed
    assert {file: file.read_bytes() for file in before} == before
    assert steps_in(profile / f"steps-{rest}.rank0.json")[-1] == "step 6"
    weights = [tmp_path / name / "checkpoints" / "step-00000006" / "arrays.params" for name in ("plain", "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
