"""Imported by launch/cluster.py: hosts that are the nodes of a Slurm job, and are reached by a job step each.

Run on a host, it says by which addresses the launcher and that host see each other, as sshd's SSH_CONNECTION does. It
needs nothing but Python.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

# A step beside the others, with all that the job has of the node: a step that shares nothing would wait for the others.
# What a site binds one task to, or starts it with, is not meant for an agent whose ranks use the whole node.
_OPTIONS = (
    "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--cpu-bind=none", "--mpi=none", "--no-kill", "--quiet",
)  # fmt: skip
_PASSED = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "TMPDIR", "LD_LIBRARY_PATH", "SLURM_CONF")


class Srun(NamedTuple):
    """How the nodes of a Slurm job are reached, from one of them.

    Args:
        job: its number.
    """

    job: str

    def command(self, host: str, remote: Sequence[str], first_contact: bool = False) -> list[str]:
        """The words of a command that has ``host`` run ``remote``. It passes standard input, output and errors on.

        Of the environment it has what ssh would give: SLURM_* of the batch script would steer each step too.
        """
        kept = [f"{name}={os.environ[name]}" for name in _PASSED if name in os.environ]
        return ["env", "-i", *kept, "srun", f"--jobid={self.job}", *_OPTIONS, f"--nodelist={host}", *remote]

    @property
    def orphaned(self) -> Sequence[str]:
        """What ends or requeues the job when its first node is lost.

        With --no-kill Slurm takes that node out of the job, and lets the others run without a batch script for ever.
        """
        asked = f"scontrol show job {self.job} | grep -q Requeue=0"
        return ["sh", "-c", f"if {asked}; then scancel {self.job}; else scontrol requeue {self.job}; fi"]

    def remedy(self, host: str, errors: str) -> str:
        """What to do where a host was not reached."""
        return f"`sinfo --Node --long --nodes={host}` shows its state; a node that the job has lost does not come back"


def _connection(launcher: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((launcher, 9))  # sends nothing
        return f"{launcher} 0 {probe.getsockname()[0]} 0"


if __name__ == "__main__":
    if "SLURM_LAUNCH_NODE_IPADDR" in os.environ:
        print(_connection(os.environ["SLURM_LAUNCH_NODE_IPADDR"]))
