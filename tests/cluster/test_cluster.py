"""``launch/cluster.sh`` on three hosts: they train, they are refused by name, and all of it ends when any part dies."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.conftest import ROOT, Cluster, Ended, Host, cmdline, wait_for
from tests.parallel.runs import weights_of_one_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = ["--config", str(ROOT / "configs" / "smoke.yaml"), "optimizer.learning_rate=0.05", "checkpoint.every_steps=5"]
LONG = ["train.epochs=1000", "train.max_steps=null", "run.step_timeout_seconds=30"]
SECRET, TOKEN = "secret-4711-secret", "token-0815-token"


@pytest.fixture
def arguments(data: list[str], tmp_path: Path) -> list[str]:
    return [*RECIPE, *data, f"run.dir={tmp_path / 'run'}"]


@pytest.fixture
def all_three(tmp_path: Path) -> str:
    """A hostfile with every form that there is, as an editor on another system may leave it."""
    (tmp_path / "hosts").write_bytes(
        b"# the hosts\r\n\r\nhost1\r\n  host2 slots=1   # in the other rack\r\nhost3:1\r\n"
    )
    return str(tmp_path / "hosts")


@pytest.fixture
def the_others(tmp_path: Path) -> str:
    """Without the host that the launcher runs on, as with an operator's launcher pod."""
    (tmp_path / "others").write_text("host2 slots=1\nhost3 slots=1\n")
    return str(tmp_path / "others")


def summary(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "run" / "summary.json").read_text()))


def steps(tmp_path: Path) -> list[int]:
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["split"] == "train"]


def every_command_line() -> str:
    return "\n".join(" ".join(cmdline(process)) for process in psutil.process_iter())


def in_environment_of(rank: psutil.Process) -> str:
    return Path(f"/proc/{rank.pid}/environ").read_text()


def test_three_hosts_train_and_no_secret_is_seen_on_a_command_line(
    cluster: Cluster, all_three: str, arguments: list[str], tmp_path: Path
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "TRACKER_TOKEN": TOKEN, "NCCL_DEBUG": "WARN"}
    job = cluster.start("-x", "TRACKER_TOKEN", all_three, *arguments, "train.max_steps=60", environment=secrets)
    seen = []
    for step in ("asking", "step 3/"):
        if step == "asking":
            wait_for(lambda: "doctor.py" in every_command_line())
        else:
            job.wait_for_line(step)
        seen.append(every_command_line())
    ranks = cluster.ranks()
    assert [len(of_host) for of_host in ranks.values()] == [1, 1, 1]
    environments = [in_environment_of(rank) for of_host in ranks.values() for rank in of_host]
    ended = job.finish()

    assert ended.code == 0, ended.output
    assert summary(tmp_path)["ranks"] == 3
    assert "[0 host1] done: test accuracy" in ended.output
    for host in cluster.hosts.values():
        assert re.search(rf"{host.name} .* yes .* same .* {host.address}", ended.output), ended.output
    assert "ens7 10.213.7.3" in ended.output, "an interface may have another name on each host"
    for lines in seen:
        assert "doctor.py" in lines or "train.py" in lines, "we looked while it ran"
        assert SECRET not in lines
        assert TOKEN not in lines
    for variables in environments:
        assert f"TRACKER_TOKEN={TOKEN}" in variables
        assert "NCCL_DEBUG=WARN" in variables
    assert not any(SECRET in variables for variables in environments[1:]), "only what is allowed leaves this machine"
    cluster.assert_nothing_left()


def test_a_signal_to_the_launcher_stops_all_hosts_with_75_and_fewer_hosts_go_on_to_the_same_bits(
    cluster: Cluster, all_three: str, the_others: str, arguments: list[str], tmp_path: Path
) -> None:
    command = [all_three, *arguments, "train.epochs=10", "train.max_steps=50", "checkpoint.every_steps=null"]
    job = cluster.start(*command)
    job.wait_for_line("step 3/")
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert ended.code == 75, ended.output
    assert "preempted: rank 0: stopped after step" in ended.output
    cluster.assert_nothing_left()
    stopped = int(ended.output.partition("stopped after step ")[2].partition(",")[0])
    again = cluster.launch(the_others, *command[1:])
    assert again.code == 0, again.output
    assert f"going on after step {stopped}" in again.output
    assert steps(tmp_path) == list(range(1, 51))
    assert summary(tmp_path)["ranks"] == 2
    assert summary(tmp_path)["weights_sha256"] == weights_of_one_rank(tmp_path / "run")


def test_a_killed_launcher_leaves_no_orphan_on_any_host_and_a_checkpoint(
    cluster: Cluster, all_three: str, arguments: list[str], tmp_path: Path
) -> None:
    job = cluster.start(all_three, *arguments, *LONG, "checkpoint.every_steps=null")
    job.wait_for_line("step 3/")
    job.signal(signal.SIGKILL)
    job.finish()
    cluster.assert_nothing_left()
    assert int(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1][-8:]) >= 3


def test_a_killed_agent_ends_the_job_and_its_ranks(cluster: Cluster, the_others: str, arguments: list[str]) -> None:
    job = cluster.start(the_others, *arguments, *LONG)
    job.wait_for_line("step 3/")
    for process in cluster.hosts["host3"].processes():
        if "agent.py" in " ".join(cmdline(process)[:2]):
            process.kill()
    ended = job.finish()
    assert ended.code == 1
    assert "host3 (rank 1) was lost" in last_line(ended)
    cluster.assert_nothing_left()


def test_a_host_that_dies_ends_the_job_and_is_named(cluster: Cluster, the_others: str, arguments: list[str]) -> None:
    job = cluster.start(the_others, *arguments, *LONG)
    job.wait_for_line("step 3/")
    cluster.hosts["host3"].die()
    ended = job.finish()
    assert ended.code == 1
    assert "host3 (rank 1) was lost" in last_line(ended)
    cluster.assert_nothing_left("host3")


def test_a_rank_that_dies_ends_the_job_and_is_named(cluster: Cluster, all_three: str, arguments: list[str]) -> None:
    job = cluster.start(all_three, *arguments, *LONG)
    job.wait_for_line("step 3/")
    cluster.ranks()["host2"][0].kill()
    ended = job.finish()
    assert ended.code == 1
    assert "rank 1 on host2 was ended by signal 9" in last_line(ended)
    cluster.assert_nothing_left()


def test_a_cut_link_ends_the_job_on_both_sides(cluster: Cluster, the_others: str, arguments: list[str]) -> None:
    job = cluster.start(the_others, *arguments, *LONG)
    job.wait_for_line("step 3/")
    cluster.cut("host3")
    ended = job.finish()
    assert ended.code == 1
    assert "host3" in ended.output[ended.output.index("step 3/") :], ended.output
    cluster.assert_nothing_left(seconds=90)


def test_a_bad_configuration_ends_with_2_before_any_host_is_contacted(
    cluster: Cluster, all_three: str, arguments: list[str]
) -> None:
    ended = cluster.launch(all_three, *arguments, "train.epochs=none")
    assert ended.code == 2
    assert "train.epochs" in ended.output
    assert "reachable" not in ended.output


def test_other_packages_and_another_commit_are_refused_by_name(
    cluster: Cluster, all_three: str, arguments: list[str], tmp_path: Path
) -> None:
    give_other_numpy(cluster.hosts["host2"], tmp_path)
    give_other_commit(cluster.hosts["host3"], tmp_path)
    ended = cluster.launch(all_three, *arguments)
    for host in ("host2", "host3"):
        cluster.hosts[host].die()  # and comes back as it was
    assert ended.code == 1
    assert "host2: packages: numpy 1.0.0, where the others have 1.23.5; run " in ended.output
    assert re.search(r"host3: commit: \w{10}(-dirty)?, where 2 others have \w{10}", ended.output), ended.output
    assert "host1: " not in ended.output
    assert "step 1/" not in ended.output
    assert not (tmp_path / "run").exists()


def test_a_host_that_does_not_answer_is_named(cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("host2\nnowhere\nno-such-name\n")
    ended = cluster.launch("--check", str(tmp_path / "hosts"), *arguments)
    assert ended.code == 1
    assert re.search(r"nowhere: reachable: .*(No route to host|timed out)", ended.output), ended.output
    assert re.search(r"no-such-name: reachable: .*resolve", ended.output), ended.output
    assert "host2: " not in ended.output


def test_pinned_host_keys_refuse_a_changed_key(cluster: Cluster, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("host2\n")
    command = ["--check", "--pin-host-keys", str(tmp_path / "pinned keys"), str(tmp_path / "hosts"), *arguments]
    first = cluster.launch(*command)
    assert first.code == 0, first.output
    assert (tmp_path / "pinned keys").read_text().startswith("host2")
    cluster.hosts["host2"].die()
    cluster.new_host_key("host2")
    cluster.trust_all()
    cluster.reboot("host2")
    ended = cluster.launch(*command)
    assert ended.code == 1
    assert "host2: reachable: Host key verification failed" in ended.output
    assert "was installed anew" in ended.output
    unpinned = cluster.launch("--check", str(tmp_path / "hosts"), *arguments)
    assert unpinned.code == 0, "the user's own ssh settings know the new key"


def last_line(ended: Ended) -> str:
    return ended.output.strip().splitlines()[-1]


def give_other_numpy(host: Host, folder: Path) -> None:
    import numpy

    (metadata,) = Path(numpy.__file__).parents[1].glob("numpy-*.dist-info/METADATA")
    changed = re.sub(r"(?m)^Version: .*$", "Version: 1.0.0", metadata.read_text(), count=1)
    (folder / "METADATA").write_text(changed)
    host.run("mount", "--bind", str(folder / "METADATA"), str(metadata))


def give_other_commit(host: Host, folder: Path) -> None:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30
        ).stdout.strip()

    before, head = git("rev-parse", "--verify", "--quiet", "HEAD~1"), git("rev-parse", "--git-path", "HEAD")
    if not before:
        pytest.skip("this checkout has no commit but one, or no git")
    (folder / "HEAD").write_text(before + "\n")
    host.run("mount", "--bind", str(folder / "HEAD"), str(ROOT / head))
