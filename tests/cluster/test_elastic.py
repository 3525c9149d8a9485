"""``launch/cluster.sh --min-np`` on three hosts: ranks and hosts die, join and leave, and the bits stay the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import ROOT, Cluster, cmdline
from tests.parallel.conftest import HOROVODRUN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = [
    "--config", str(ROOT / "configs" / "smoke.yaml"), "optimizer.learning_rate=0.05", "train.epochs=1000",
    "train.max_steps=null", "checkpoint.every_steps=null", "elastic.commit_every_steps=2", "elastic.cooldown_seconds=1",
]  # fmt: skip


@pytest.fixture
def arguments(data: list[str], tmp_path: Path) -> list[str]:
    return [*RECIPE, *data, f"run.dir={tmp_path / 'run'}"]


def changes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "changes.jsonl").read_text().splitlines()]


def newest_weights(run: Path) -> tuple[int, str]:
    """After how many steps, and their SHA-256."""
    newest = max((run / "checkpoints").iterdir())
    manifest = json.loads((newest / "manifest.json").read_text())
    return manifest["step"], manifest["weights_sha256"]


def assert_as_if_nothing_had_happened(folder: Path, arguments: list[str]) -> None:
    """One rank in one process, which nobody disturbs, takes as many steps."""
    steps, weights = newest_weights(folder / "run")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "train"] == [*range(1, steps + 1)]
    overrides = [f"run.dir={folder / 'alone'}", f"train.max_steps={steps}", "run.resume=never"]
    command = [sys.executable, str(ROOT / "job" / "train.py"), *arguments, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert newest_weights(folder / "alone") == (steps, weights)


def test_ranks_and_hosts_die_and_the_others_go_on_to_the_same_bits(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("host2\nhost3\n")
    job = cluster.start("--min-np", "1", str(tmp_path / "hosts"), *arguments)
    job.wait_for_line("step 5/")
    cluster.ranks()["host3"][0].kill()
    job.wait_for_line("went on after step")
    cluster.hosts["host2"].die()  # with rank 0, and with its memory
    job.wait_for_line("1 rank went on after step")
    cluster.reboot("host2")
    job.wait_for_line("2 ranks went on after step")
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == 75, ended.output
    assert "launch/cluster.sh: preempted, with a checkpoint written" in ended.output
    killed, lost, joined = changes(tmp_path)
    assert killed["why"] == "rank 1 on host3 was ended by SIGKILL"
    assert (killed["ranks_before"], killed["hosts"]) == (2, {"host2": 1, "host3": 1})
    assert lost["why"].startswith("host2 was lost: ")
    assert (lost["ranks_before"], lost["hosts"]) == (2, {"host3": 1})
    assert (joined["why"], joined["hosts"]) == ("host2 joined", {"host3": 1, "host2": 1})
    for death in (killed, lost):
        assert death["replayed_steps"] <= 3, "a commit every two steps"
    assert joined["replayed_steps"] == 0
    cluster.assert_nothing_left()
    assert_as_if_nothing_had_happened(tmp_path, arguments)


def test_a_host_that_is_cut_off_with_rank_0_is_replaced_and_never_writes_beside_the_new_one(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("host2\nhost3\n")
    job = cluster.start("--min-np", "1", "--stop-timeout", "5", str(tmp_path / "hosts"), *arguments)
    job.wait_for_line("step 3/")
    cluster.cut("host2")
    job.wait_for_line("1 rank went on after step")
    assert cluster.ranks()["host2"] == [], "they were ended before their lock was free"
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == 75, ended.output
    (lost,) = changes(tmp_path)
    assert lost["why"].startswith("host2 was lost: ") and lost["hosts"] == {"host3": 1}
    cluster.assert_nothing_left()
    assert_as_if_nothing_had_happened(tmp_path, arguments)


def test_hosts_join_and_leave_by_a_script_or_when_their_agent_is_told_to(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    listed, script = tmp_path / "listed", tmp_path / "discover"
    script.write_text(f"#!/bin/sh\ncat {listed}\n")
    script.chmod(0o755)
    replace(listed, "host2:1\n")
    (tmp_path / "hosts").write_text("host2:1\n")
    job = cluster.start("--min-np", "1", "--discover", str(script), str(tmp_path / "hosts"), *arguments)
    job.wait_for_line("step 3/")
    replace(listed, "host2:1\nnowhere:1\nhost3:1\nhost1:1\n")
    job.wait_for_line("went on after step")
    while len(changes(tmp_path)[-1]["hosts"]) < 3:  # both at once, or one after the other
        job.wait_for_line("went on after step")
    (agent,) = [
        process for process in cluster.hosts["host3"].processes() if "agent.py" in " ".join(cmdline(process)[:2])
    ]
    agent.terminate()
    job.wait_for_line("2 ranks went on after step")
    replace(listed, "host1:1\n")  # without rank 0's
    job.wait_for_line("1 rank went on after step")
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == 75, ended.output
    assert ended.output.count("launch/cluster.sh: without nowhere: reachable: ") == 1
    *joined, left, removed = changes(tmp_path)
    assert " ".join(change["why"] for change in joined).count("joined") == len(joined)
    assert left["why"] == "host3 left" and left["hosts"] == {"host2": 1, "host1": 1}
    assert removed["why"] == "host2 left" and removed["hosts"] == {"host1": 1}
    assert [change["replayed_steps"] for change in changes(tmp_path)] == [0] * len(changes(tmp_path))
    cluster.assert_nothing_left()
    assert_as_if_nothing_had_happened(tmp_path, arguments)


def test_under_horovodrun_a_rank_dies_and_a_host_leaves_and_comes_back(
    cluster: Cluster, arguments: list[str], tmp_path: Path
) -> None:
    listed, script = tmp_path / "listed", tmp_path / "discover"
    script.write_text(f"#!/bin/sh\ncat {listed}\n")
    script.chmod(0o755)
    replace(listed, "host1:1\nhost2:1\n")
    sizes = ["-np", "2", "--min-np", "1", "--max-np", "2", "--network-interface", "eth0"]
    command = [*sizes, "--host-discovery-script", str(script), sys.executable, str(ROOT / "job" / "train.py")]
    path = {"PATH": f"{HOROVODRUN.parent}:{os.environ['PATH']}"}
    job = cluster.start(*command, *arguments, launcher=HOROVODRUN, environment=path)
    job.wait_for_line("step 3/")
    (rank,) = cluster.ranks()["host2"]
    rank.kill()
    job.wait_for_line("2 ranks went on after step")
    replace(listed, "host1:1\n")
    job.wait_for_line("1 rank went on after step")
    replace(listed, "host1:1\nhost2:1\n")
    job.wait_for_line("2 ranks went on after step")
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == 1, "Horovod makes 1 of all codes"
    killed, left, joined = changes(tmp_path)
    assert [(change["ranks_before"], change["ranks"]) for change in (killed, left, joined)] == [(2, 2), (2, 1), (1, 2)]
    assert killed["replayed_steps"] <= 3, "a commit every two steps"
    cluster.assert_nothing_left()
    assert_as_if_nothing_had_happened(tmp_path, arguments)


def replace(file: Path, text: str) -> None:
    """So that whoever reads it finds all or nothing of it."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)
