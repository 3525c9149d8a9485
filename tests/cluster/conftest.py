"""Several real hosts on this machine: each has its own network, mounts, name, processes and sshd.

A host is a set of Linux namespaces that no file and no name refers to, so they are gone, with all that runs and is
mounted in them, as soon as their first process is. That process is bound to the life of the tests by the kernel
(PDEATHSIG): nothing is left behind even by tests that are killed. A bridge in a further network namespace joins the
hosts; no packet leaves it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import psutil
import pytest

from tests import synthetic

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.213.7"
PATIENCE = 240.0  # seconds for a run of 30 s; a failing test waits so long, a passing one does not
TOOLS = ("ip", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
INTERFACES = {"host1": "eth0", "host2": "eth0", "host3": "ens7"}  # the name may differ between hosts

_SSHD = """
Port 22
HostKey {folder}/key.{name}
AuthorizedKeysFile {folder}/login.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
LogLevel ERROR
"""
_SSH = """
Host *
  IdentityFile {folder}/login
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""
# The first process of a host. The account of root may be locked here, which sshd would mind.
_BOOT = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/shadow /etc/shadow
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd.{name}
"""


class Ended(NamedTuple):
    code: int
    output: str


class Host:
    """One host, from its start to its death."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        boot = _BOOT.format(name=name, folder=folder, sshd=shutil.which("sshd"))
        namespaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._log = open(folder / f"log.{name}", "w")  # noqa: SIM115
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "bash", "-c", boot], stderr=self._log
        )
        self.pid = wait_for(lambda: first_child(self._unshare.pid))

    def enter(self, *command: str, all_namespaces: bool = True) -> list[str]:
        """The words that run ``command`` on this host, or only in its network."""
        which = ["--mount", "--uts", "--ipc", "--net", "--pid"] if all_namespaces else ["--net"]
        return ["nsenter", "--target", str(self.pid), *which, "--", *command]

    def run(self, *command: str) -> None:
        subprocess.run(self.enter(*command), check=True, timeout=30)

    def processes(self) -> list[psutil.Process]:
        """All that runs there for the job: agents and ranks."""
        own = os.stat(f"/proc/{self.pid}/ns/pid").st_ino if psutil.pid_exists(self.pid) else 0
        return [p for p in of_the_job() if namespace(p) == own]

    def die(self) -> None:
        """End everything there at once, as a power cut does."""
        if self._unshare.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait(30)
        self._log.close()


class Cluster:
    """Three hosts, a launcher on the first of them, and a run directory that all can see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "ssh").mkdir()
        (folder / "ssh" / "ssh_config").write_text(_SSH.format(folder=folder))
        (folder / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n")
        names = [*INTERFACES, "nowhere"]
        self._addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
        hosts = [f"{address} {name}" for name, address in self._addresses.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        generate_key(folder / "login")
        for name in INTERFACES:
            self.new_host_key(name)
        self.trust_all()
        self._switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
        wait_for(lambda: os.readlink(f"/proc/{self._switch.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        wait_for(lambda: "sleep" in psutil.Process(self._switch.pid).name())
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        self.hosts: dict[str, Host] = {}
        for name in INTERFACES:
            self.boot(name)

    def new_host_key(self, name: str) -> None:
        for file in self.folder.glob(f"key.{name}*"):
            file.unlink()
        generate_key(self.folder / f"key.{name}")

    def trust_all(self) -> None:
        keys = [f"{name} {(self.folder / f'key.{name}.pub').read_text()}" for name in INTERFACES]
        (self.folder / "known_hosts").write_text("".join(keys))

    def boot(self, name: str) -> None:
        """Start a host, plug it in, and wait until its sshd answers."""
        (self.folder / f"sshd.{name}").write_text(_SSHD.format(folder=self.folder, name=name))
        host = self.hosts[name] = Host(name, self._addresses[name], self.folder)
        wait_for(lambda: os.readlink(f"/proc/{host.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        port, interface = f"to-{name}", INTERFACES[name]
        # A host keeps its hardware address, as a real one does, or its neighbours would look for it in vain.
        card = ["name", interface, "address", f"02:00:00:00:00:0{host.address[-1]}", "netns", str(host.pid)]
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", *card)
        self._in_switch("ip", "link", "set", port, "master", "bridge", "up")
        for command in (
            ["ip", "address", "add", f"{host.address}/24", "dev", interface],
            ["ip", "link", "set", interface, "up"],
        ):
            subprocess.run(host.enter(*command, all_namespaces=False), check=True, timeout=30)
        wait_for(lambda: "sshd" in psutil.Process(host.pid).name())
        wait_for(lambda: self._listens(host))

    def reboot(self, name: str) -> None:
        """As after a power cut: its processes, mounts and connections are gone."""
        self.hosts[name].die()
        with contextlib.suppress(subprocess.CalledProcessError):  # gone with the namespace, which may take its time
            self._in_switch("ip", "link", "delete", f"to-{name}")
        self.boot(name)

    def cut(self, name: str) -> None:
        """Pull the plug of a host."""
        self._in_switch("ip", "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        self._in_switch("ip", "link", "set", f"to-{name}", "up")

    def close(self) -> None:
        for host in self.hosts.values():
            host.die()
        self._switch.kill()
        self._switch.wait(30)

    # --- the command under test ---

    def start(
        self,
        *words: str,
        environment: Optional[dict[str, str]] = None,
        launcher: Path = ROOT / "launch" / "cluster.sh",
    ) -> Launched:
        """Start ``launch/cluster.sh``, or another launcher, on host1 with these words."""
        clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), "COLUMNS": "160"}
        command = self.hosts["host1"].enter(str(launcher), *words)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return Launched(process)

    def launch(self, *words: str) -> Ended:
        """The same, to its end."""
        return self.start(*words).finish()

    def ranks(self) -> dict[str, list[psutil.Process]]:
        """The ranks that run, by host."""
        ranks = {}
        for name, host in self.hosts.items():
            found = [process for process in host.processes() if "train.py" in " ".join(cmdline(process)[:3])]
            ranks[name] = found
        return ranks

    def assert_nothing_left(self, *but_on: str, seconds: float = 40.0) -> None:
        """No agent and no rank on any host, within a bound."""
        end = time.monotonic() + seconds
        while (left := self._left(but_on)) and time.monotonic() < end:
            psutil.wait_procs(left, timeout=1)
        assert left == []

    def _left(self, but_on: Sequence[str]) -> list[psutil.Process]:
        return [p for name, host in self.hosts.items() if name not in but_on for p in host.processes()]

    def _in_switch(self, *command: str) -> str:
        entered = ["nsenter", "--target", str(self._switch.pid), "--net", "--", *command]
        return subprocess.run(entered, check=True, timeout=30, capture_output=True, text=True).stdout

    def _listens(self, host: Host) -> bool:
        keyscan = host.enter("ssh-keyscan", "-T", "1", host.address, all_namespaces=False)
        return bool(subprocess.run(keyscan, capture_output=True, timeout=30).stdout)


class Launched:
    """A launcher that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.read: list[str] = []

    def wait_for_line(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.read.append(line)
            if text in line:
                return
        pytest.fail(f"no {text!r} in:\n{''.join(self.read)}")

    def signal(self, number: signal.Signals) -> None:
        """To the launcher itself: nsenter, which we started, does not pass signals on."""
        launcher = first_child(self.process.pid)
        assert launcher
        os.kill(launcher, number)

    def finish(self, seconds: float = PATIENCE) -> Ended:
        assert self.process.stdout is not None
        late = threading.Timer(seconds, self.signal, [signal.SIGKILL])
        late.start()
        self.read.append(self.process.stdout.read())
        code = self.process.wait()
        if not late.is_alive():
            pytest.fail(f"still running after {seconds:g} s:\n{''.join(self.read)}")
        late.cancel()
        return Ended(code, "".join(self.read))


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true answer. Raises if there is none in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            if answer := condition():
                return answer
        except OSError:
            pass
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def first_child(pid: int) -> Optional[int]:
    children = psutil.Process(pid).children()
    return children[0].pid if children else None


def generate_key(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, timeout=30)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def namespace(process: psutil.Process) -> int:
    try:
        return os.stat(f"/proc/{process.pid}/ns/pid").st_ino
    except OSError:
        return -1


def of_the_job() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter()
        if {"agent.py", "train.py"} & {os.path.basename(word) for word in cmdline(process)[:3]}
    ]


def unavailable() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "hosts are namespaces, which take root to make"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"hosts are namespaces with sshd, and there is no {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "add", "bridge", "type", "bridge"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return f"hosts are namespaces, which cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := unavailable():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that make a run small: six steps an epoch."""
    return synthetic.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def every_host_is_up(cluster: Cluster) -> Iterator[None]:
    yield
    for name, host in cluster.hosts.items():
        cluster.mend(name) if psutil.pid_exists(host.pid) else cluster.reboot(name)
    for host in cluster.hosts.values():
        for process in host.processes():
            process.kill()
