"""A real Slurm of two nodes on this machine: its own munged, slurmctld and two slurmd, in a folder and on ports of its
own. A node is a set of Linux namespaces: it has processes and memory of its own, and loses both at once.

It needs the programs of Debian's slurm-wlm (apt-get install slurm-wlm), none of its services, and root, as slurmd does.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parallel.conftest import ROOT, free_port

PROGRAMS = "unshare setpriv munged slurmctld slurmd sbatch srun scancel scontrol squeue".split()
PATIENCE = 240.0  # seconds, for a job of 10 to 20; a failing test waits so long, a passing one does not
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
HOST = socket.gethostname()
# Two CPUs a node, whatever the machine has; task 0's node has the machine's own name, so that the name resolves.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
KillWait=20
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# A machine is told from others by the id that its kernel made when it started.
NODE = """
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/boot_id.{name} /proc/sys/kernel/random/boot_id
exec slurmd -D -N {name}
"""
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
SECOND = f"{HOST}-second"


class Slurm:
    """A running Slurm, and how a user deals with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen[bytes]] = {}  # the daemons, and each node by its name

    def start(self, name: str, daemon: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self._running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *daemon],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def boot(self, node: str) -> None:
        """Start a node."""
        (self.folder / f"boot_id.{node}").write_text(f"{uuid.uuid4()}\n")
        self.start(node, [*NAMESPACES, "sh", "-ec", NODE.format(folder=self.folder, name=node)])

    def kill(self, node: str) -> None:
        """End everything there at once, as a power cut does. Slurm does not know it yet."""
        self._running[node].kill()
        self._running[node].wait()

    def dead(self, node: str) -> bool:
        return self._running[node].poll() is not None

    def bring_back(self, node: str) -> None:
        """Repair it, and tell Slurm so."""
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")
        self.boot(node)
        _until(lambda: self.command("sinfo", "--noheader", f"--nodes={node}", "--format=%T") == "down", self.folder)
        self.command("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def end(self) -> None:
        for name in reversed([*self._running]):
            self.kill(name)

    def command(self, *words: str, **variables: str) -> str:
        """Run a command of Slurm, and return what it prints."""
        done = subprocess.run(
            words, env={**self.environment, **variables}, cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, options: list[str], arguments: list[str], **variables: str) -> Job:
        """``sbatch OPTIONS launch/slurm.sbatch ARGUMENTS``, from a folder that is not the project's."""
        script = str(ROOT / "launch" / "slurm.sbatch")
        return Job(self, self.command("sbatch", "--parsable", *options, script, *arguments, **variables))


class Job:
    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm = slurm
        self.number = number

    @property
    def log(self) -> str:
        file = self.slurm.folder / f"slurm-{self.number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def run_dir(self) -> Path:
        """Where the script puts it."""
        return self.slurm.folder / "runs" / f"slurm-{self.number}"

    def facts(self) -> dict[str, str]:
        """What Slurm knows of the job."""
        words = self.slurm.command("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    def wait(self, what: str, done: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait until it is so, and fail with all that is known if it is not in time."""
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                pytest.fail(f"not within {seconds:g} s: {what}\n{self.facts()}\n{self.log[-5000:]}")
            time.sleep(0.2)

    def wait_for_line(self, text: str, times: int = 1) -> None:
        self.wait(f"{text!r} in the log", lambda: self.log.count(text) >= times or self.state in FINAL)
        assert self.log.count(text) >= times, self.log[-5000:]

    def wait_for_end(self) -> dict[str, str]:
        self.wait("the end of the job", lambda: self.state in FINAL)
        return self.facts()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}); apt-get install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("slurmd wants to be root")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "munge").mkdir(mode=0o711)
    (folder / "state").mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = [free_port() for _ in range(3)]
    text = CONFIGURATION.format(host=HOST, folder=folder, controller_port=ports[0], ports=ports[1:])
    (folder / "slurm.conf").write_text(text)
    slurm = Slurm(folder)
    # By force: it would rather not have its socket in a folder that only we can enter.
    munge = {name: f"--{name}={folder / 'munge' / name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")}
    munged = ["munged", "--force", "--foreground", *munge.values(), f"--seed-file={folder}/munge/seed"]
    try:
        slurm.start("munged", [*munged, f"--log-file={folder}/munge/log", "--num-threads=4"])
        _until(lambda: (folder / "munge" / "socket").exists(), folder)
        slurm.start("slurmctld", ["slurmctld", "-D"])
        slurm.boot(HOST)
        slurm.boot(SECOND)
        _until(lambda: _idle(slurm) == 2, folder)
        yield slurm
        slurm.command("scancel", "--quiet", "--user=root", "--signal=KILL", "--full")
        slurm.command("scancel", "--quiet", "--user=root")
        _until(lambda: not slurm.command("squeue", "--noheader"), folder)
    finally:
        slurm.end()


def _idle(slurm: Slurm) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=slurm.environment, capture_output=True, text=True
    )
    return done.stdout.split().count("idle")


def _until(done: Callable[[], bool], folder: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            logs = [file.read_text(errors="replace")[-1000:] for file in folder.glob("*.out")]
            pytest.fail("Slurm is not as it should be:\n" + "\n".join(logs))
        time.sleep(0.1)
