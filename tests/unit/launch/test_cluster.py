"""The command line of ``launch/cluster.sh``, and what it would run, without any host."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from job.errors import UsageError
from launch import cluster
from launch.hosts.hostfile import Host
from launch.hosts.srun import Srun
from launch.hosts.ssh import Ssh

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "cluster.sh"


def script(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([str(SCRIPT), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


# --- what is forwarded ---


def test_only_what_is_allowed_or_named_is_forwarded() -> None:
    variables = {
        "HOROVOD_CYCLE_TIME": "1", "MXNET_CPU_WORKER_NTHREADS": "1", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "2",
        "LANG": "C.UTF-8", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "PATH": "/bin", "HOME": "/root",
        "_HOROVOD_SECRET_KEY": "x", "LANGUAGE_MODEL_KEY": "x", "MY_HOROVOD_KEY": "x", "TOKEN": "x", "JOB_TOKEN": "x",
    }  # fmt: skip
    assert set(cluster.environment(["TOKEN"], variables)) == {
        "HOROVOD_CYCLE_TIME", "MXNET_CPU_WORKER_NTHREADS", "NCCL_DEBUG", "OMP_NUM_THREADS", "LANG", "LC_ALL", "TOKEN",
    }  # fmt: skip


# --- ranks ---


def test_ranks_are_counted_through_the_hosts_in_their_order() -> None:
    placed = cluster.allocate([Host("a", 2), Host("b", 1)], None, {})
    ranks = [(host, slot.rank, slot.local_rank, slot.cross_rank) for host, slots in placed.items() for slot in slots]
    assert ranks == [("a", 0, 0, 0), ("a", 1, 1, 0), ("b", 2, 0, 1)]
    assert [(slot.size, slot.local_size) for slots in placed.values() for slot in slots] == [(3, 2), (3, 2), (3, 1)]


def test_a_host_without_slots_takes_a_rank_a_gpu_or_one() -> None:
    placed = cluster.allocate([Host("a"), Host("b"), Host("c", 2)], None, {"a": 4, "b": 0, "c": 8})
    assert {host: len(ranks) for host, ranks in placed.items()} == {"a": 4, "b": 1, "c": 2}


def test_fewer_ranks_fill_the_first_hosts_and_leave_out_the_last() -> None:
    assert [*cluster.allocate([Host("a", 2), Host("b", 2), Host("c", 2)], 3, {})] == ["a", "b"]


def test_more_ranks_than_slots_are_refused() -> None:
    with pytest.raises(UsageError, match=r"-np 5: the hosts have 4 slots"):
        cluster.allocate([Host("a", 2), Host("b", 2)], 5, {})


# --- ssh ---


def test_ssh_never_asks_and_never_switches_the_checking_of_host_keys_off() -> None:
    for ssh in (Ssh(), Ssh(pinned=Path("/keys"))):
        for first in (True, False):
            words = ssh.command("host2", ["true"], first)
            assert "-oBatchMode=yes" in words
            assert "StrictHostKeyChecking=no" not in " ".join(words)
            assert words[-3:] == ["--", "host2", "true"]


def test_a_pinned_key_is_added_at_the_first_contact_and_demanded_afterwards() -> None:
    ssh = Ssh(2222, Path("/id"), Path("/the keys"))
    assert "-oStrictHostKeyChecking=accept-new" in ssh.command("h", ["true"], first_contact=True)
    words = ssh.command("h", ["true"])
    assert "-oStrictHostKeyChecking=yes" in words
    assert '-oUserKnownHostsFile="/the keys"' in words
    assert words[words.index("-p") + 1] == "2222" and words[words.index("-i") + 1] == "/id"


def test_what_runs_on_the_host_is_one_word_for_its_shell() -> None:
    assert Ssh().command("h", ["python", "a b", "$HOME"])[-1] == "python 'a b' '$HOME'"


def test_a_step_of_slurm_sees_no_variable_that_would_steer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "9", "SLURM_CONF": "/conf", "A_TOKEN": "secret", "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    words = Srun("7").command("n2", ["python", "a b"])
    assert words[:2] == ["env", "-i"] and words[-3:] == ["--nodelist=n2", "python", "a b"]
    assert {"SLURM_CONF=/conf", "HOME=/home/me", "--jobid=7", "--overlap", "--ntasks=1"} <= {*words}
    assert not {"SLURM_NTASKS=9", "A_TOKEN=secret"} & {*words}


# --- the command line ---


def test_arguments_after_the_hostfile_are_those_of_training() -> None:
    options = cluster.parse(["-np", "4", "-p", "2222", "hosts", "--config", "x.yaml", "-np", "train.epochs=2"])
    assert (options.np, options.ssh_port, options.hostfile) == (4, 2222, Path("hosts"))
    assert options.arguments == ["--config", "x.yaml", "-np", "train.epochs=2", "run.resume=auto"]


def test_hosts_without_slots_get_those_that_are_named_for_all_wherever_they_are_listed(tmp_path: Path) -> None:
    """The MPI operator's discover_hosts.sh prints names alone."""
    hosts, script = tmp_path / "hosts", tmp_path / "discover_hosts.sh"
    hosts.write_text("a slots=3\nb\n")
    script.write_text("#!/bin/sh\necho b\necho c\n")
    script.chmod(0o755)
    options = cluster.parse(["--min-np", "1", "--discover", str(script), "--slots-per-host", "2", str(hosts)])
    assert cluster.listed(options) == [Host("a", 3), Host("b", 2)]
    assert cluster.listed(options, discovered=True) == [Host("b", 2), Host("c", 2)]
    assert cluster.listed(cluster.parse([str(hosts)]), discovered=True) == [Host("a", 3), Host("b")]


@pytest.mark.parametrize("given", ["run.resume=never", "run.overwrite=true"])
def test_a_run_goes_on_unless_told_otherwise(given: str) -> None:
    assert cluster.parse(["hosts", given]).arguments == [given]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "HOSTFILE"),
        (["-np", "0", "hosts"], "'0' is not a whole number"),
        (["-np", "x", "hosts"], "'x' is not"),
        (["--wrong", "hosts"], "--wrong"),
        (["-x", "NO_SUCH_VARIABLE", "hosts"], "-x NO_SUCH_VARIABLE: there is no such variable"),
        (["-i", "/no/such/key", "hosts"], "/no/such/key: there is no such file"),
        (["--max-np", "3", "hosts"], "give --min-np N too"),
        (["--srun", "hosts"], "SLURM_JOB_ID is not set"),
        (["--min-np", "1", "--discover", "/no/such/script", "hosts"], "/no/such/script: there is no such file"),
        (["--min-np", "4", "--max-np", "3", "hosts"], "--min-np 4 is more than there may be ranks, 3"),
        (["--min-np", "1", "-np", "2", "--max-np", "3", "hosts"], "give one of them"),
    ],
)
def test_wrong_usage_is_told(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        cluster.parse(words)


def test_within_a_slurm_job_all_nodes_are_reached_by_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("localhost\nn2:2\n")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert cluster.launch(cluster.parse(["--srun", "--min-np", "1", "--dry-run", str(tmp_path / "hosts")])) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if "agent.py" in line]
    assert [re.search(r"srun --jobid=7 .*--nodelist=(\S+)", command)[1] for command in commands] == ["localhost", "n2"]  # type: ignore[index]


def test_help_teaches(tmp_path: Path) -> None:
    done = script("--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("host slots=N", "--pin-host-keys", "--dry-run", "exit codes: 0 done", "run.resume=auto", "-x NAME"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_a_dry_run_prints_every_command_contacts_nobody_and_hides_what_is_forwarded_by_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost\n198.51.100.1:2\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f"#!/bin/sh\ntouch {tmp_path}/contacted\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    words = ["-x", "TOKEN", "-p", "2222", "--dry-run", "hosts", "train.epochs=2", "run.dir=a b"]
    done = script(*words, cwd=tmp_path, TOKEN="token-0815", NCCL_DEBUG="WARN", PATH=path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "# localhost: rank 0"
    assert re.fullmatch(r"env -i .*/python \S+/launch/hosts/agent\.py", lines[1])
    assert lines[2] == "# 198.51.100.1: ranks 1, 2"
    assert re.fullmatch(r"ssh -T .*-p 2222 -- 198\.51\.100\.1 '\S+/python \S+/launch/hosts/agent\.py'", lines[3])
    assert "train.epochs=2 'run.dir=a b' run.resume=auto" in done.stdout
    assert "NCCL_DEBUG=WARN" in done.stdout
    assert "TOKEN=(not shown)" in done.stdout
    assert "token-0815" not in done.stdout + done.stderr
    assert not (tmp_path / "contacted").exists()
    assert not (tmp_path / "a b").exists()


def test_the_launcher_needs_no_gpu_for_ranks_that_have_one_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("198.51.100.1\n")
    done = script("--dry-run", "hosts", "run.device=gpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hosts", "arguments", "message"),
    [
        ("a\na\n", [], "hosts:2: a stands in line 1 already"),
        ("localhost:2\n", ["train.epochs=0"], "train.epochs"),
        ("localhost:300\n", [], "too small for 300 ranks"),
    ],
)
def test_what_is_wrong_ends_with_2_before_any_host_is_contacted(
    tmp_path: Path, hosts: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "hosts").write_text(hosts)
    done = script("hosts", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_check_that_a_signal_ends_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted = subprocess.CompletedProcess(["train.py"], -signal.SIGABRT, "")
    monkeypatch.setattr(cluster.subprocess, "run", lambda *_, **__: aborted)
    with pytest.raises(SystemExit) as ended:
        cluster.resolve_config([], 2, True)
    assert ended.value.code == 1
