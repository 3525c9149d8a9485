"""Pods without Kubernetes: containers of namespaces, for what has to be seen running. pod.sh says how far that goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "launch" / "kubernetes"
NAMESPACES = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
PATIENCE = 60.0  # seconds; a failing test waits so long, a passing one does not


def unavailable() -> str:
    """Why this machine can have no such pods; empty if it can."""
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "ip", "ssh-keygen") if not shutil.which(tool)]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd (openssh-server)")
    if missing:
        return f"pods of namespaces need {', '.join(missing)}"
    tried = subprocess.run(
        [*NAMESPACES, "--net", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
    )
    return f"no namespaces for this user: {tried.stderr.strip()}" if tried.returncode else ""


def manifest(file: str, kind: str) -> dict[str, Any]:
    """The document of that kind in a file below launch/kubernetes."""
    documents = yaml.safe_load_all((KUBERNETES / file).read_text())
    return next(document for document in documents if document["kind"] == kind)


def make_keys(folder: Path) -> Path:
    """What the MPI operator puts into a job's Secret: one ECDSA key pair, in PEM."""
    folder.mkdir(parents=True)
    key = folder / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", key], check=True)
    shutil.copy(folder / "id_rsa.pub", folder / "authorized_keys")
    return folder


class Pod:
    """One pod, from its command's start to the end of the ``with`` block, which leaves nothing behind.

    Args:
        folder: a new one for its state; ``tmp`` in it is the pod's /tmp.
        keys: see :func:`make_keys`.
        command: of its container.
        network: name of a network namespace made by ``ip netns``; None for one of its own, with loopback alone.
        hosts: what /etc/hosts says.
        runs: the claim.
        name: its host name, which ``hosts`` knows.
    """

    def __init__(
        self,
        folder: Path,
        keys: Path,
        command: Sequence[str],
        network: Optional[str] = None,
        hosts: str = "127.0.0.1 localhost worker-0\n",
        runs: Optional[Path] = None,
        name: str = "worker-0",
    ) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True)
        (folder / "ssh").symlink_to(keys)
        (folder / "runs").symlink_to(runs or folder)
        (folder / "hosts").write_text(hosts)
        (folder / "hostname").write_text(name)
        self.log = folder / "log"
        self._commands: list[subprocess.Popen[str]] = []
        enter = ["ip", "netns", "exec", network, *NAMESPACES] if network else [*NAMESPACES, "--net"]
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*enter, ROOT / "tests/kubernetes/pod.sh", ROOT, folder, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"]},
                start_new_session=True,
            )

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_commands()
        # Process 1 takes all of its pod with it. unshare's --kill-child does not reach it: the kernel forgets that wish
        # when a process becomes another user.
        with contextlib.suppress(OSError):
            os.kill(self._process_1(), signal.SIGKILL)
        self._process.kill()
        self._process.wait(PATIENCE)

    def end_commands(self) -> None:
        """Kill what :meth:`popen` has started and nobody has waited for."""
        for process in self._commands:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)
            process.stdout.close()
        self._commands.clear()

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code of its command."""
        return self._process.wait(seconds)

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def terminate(self) -> None:
        """SIGTERM to process 1, as the kubelet ends a container."""
        os.kill(self._process_1(), signal.SIGTERM)

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the container, as ``kubectl exec`` and the kubelet's hooks do."""
        inside = [
            "nsenter",
            "--target",
            str(self._process_1()),
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            "--root",
        ]
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        plain = ["env", "-i", "-C", "/opt/job", "HOME=/home/mpiuser", "PATH=/opt/job/.venv/bin:/usr/bin:/bin"]
        process = subprocess.Popen(
            [*inside, *user, *plain, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._commands.append(process)
        return process

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a command in the container."""
        process = self.popen(*command)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output

    def until(self, *command: str) -> str:
        """Repeat a command in the container until it succeeds. Returns its output."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                code, output = self.run(*command)
            except FileNotFoundError:  # not so far that there is a process 1
                code, output = 1, "the pod has not started"
            if code == 0:
                return output
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{' '.join(command)} did not succeed: {output}\nthe pod wrote:\n{self.text()}")

    def _process_1(self) -> int:
        """Its process id out here: the child of unshare, which is this very process after `ip netns exec`."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            raise FileNotFoundError("unshare has no child yet")
        return int(children[0])
