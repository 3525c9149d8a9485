"""Imported by launch/cluster.py: the ssh commands. Their options decide how soon a dead host is noticed, and which host
keys are believed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional, Protocol

# Never ask: nobody is there to answer for each of many hosts. A connection of its own for each host: a shared one
# (ControlMaster) would die with whoever else uses it.
_OPTIONS = (
    "BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3", "ControlPath=none",
    "ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "LogLevel=ERROR",
)  # fmt: skip


class Reach(Protocol):
    """How hosts are reached: by ssh, or as :class:`launch.hosts.srun.Srun` does."""

    @property
    def orphaned(self) -> Sequence[str]:
        """What an agent runs at its end when the launcher has fallen silent; nothing if it is empty."""

    def command(self, host: str, remote: Sequence[str], first_contact: bool = False) -> list[str]:
        """The words of a command that has ``host`` run ``remote``, and passes its input and output on."""

    def remedy(self, host: str, errors: str) -> str:
        """What to do where a host was not reached, by what the command wrote."""


class Ssh(NamedTuple):
    """How hosts are reached. Whose keys are believed is decided by the user's own ssh settings, or by ``pinned``.

    Args:
        port: of sshd; None for what the ssh settings say.
        identity_file: the private key; None for what the ssh settings say.
        pinned: file with the only host keys to believe. A host that it does not hold is added when it is first asked.
    """

    port: Optional[int] = None
    identity_file: Optional[Path] = None
    pinned: Optional[Path] = None

    @property
    def orphaned(self) -> Sequence[str]:
        """Nothing: a person sees that the launcher is gone."""
        return ()

    def command(self, host: str, remote: Sequence[str], first_contact: bool = False) -> list[str]:
        """The words of a command that has a shell on ``host`` run ``remote``, a command that needs no terminal."""
        options = [*_OPTIONS, *self._host_key_options(first_contact)]
        words = ["ssh", "-T", *(f"-o{option}" for option in options)]
        if self.port:
            words += ["-p", str(self.port)]
        if self.identity_file:
            words += ["-i", str(self.identity_file)]
        # A login shell that is csh takes `!` for its history even between quotes, but not behind a backslash.
        return [*words, "--", host, shlex.join(remote).replace("!", "'\\!'")]

    def remedy(self, host: str, errors: str) -> str:
        """What to do where a host was not reached."""
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in errors or "has changed and you have requested" in errors:
            return f"if {host} was installed anew, remove its old key from the known hosts; if not, do not trust it"
        if "Host key verification failed" in errors:
            return f"compare its key and accept it once with `ssh {host} true`, or give --pin-host-keys FILE"
        if "Permission denied" in errors:
            return f"let the key of this machine in: ssh-copy-id {host}, or give -i FILE"
        return f"`ssh {host} true` must work without a question"

    def _host_key_options(self, first_contact: bool) -> list[str]:
        if not self.pinned:
            return []
        checking = "accept-new" if first_contact else "yes"
        return [
            f'UserKnownHostsFile="{self.pinned}"', "GlobalKnownHostsFile=/dev/null", "HashKnownHosts=no",
            "UpdateHostKeys=no", f"StrictHostKeyChecking={checking}",
        ]  # fmt: skip
