"""An image built and run without an engine: debootstrap makes its base, buildah reads the Dockerfile, unshare runs it.

What an engine gives a container is here too: processes, network and shared memory of its own, its own user without any
capability, the image's environment and entry point. All of it ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "image"  # kept: the next build takes from it what did not change
RELEASE = "bookworm"
BASE = "localhost/base"
TOOLS = ("buildah", "debootstrap", "unshare", "setpriv", "mount", "ip", "ssh-keygen")
# The host's own package configuration is lent to the build, so that it reaches the mirrors that the host reaches.
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
LENT = (
    ("/etc/apt", "/etc/apt"),
    ("/etc/pip.conf", "/etc/pip.conf"),
    (CERTIFICATES, CERTIFICATES),
    (CERTIFICATES, "/usr/local/share/ca-certificates/host.crt"),  # from where Debian's package makes the other anew
)
BUILD_SECONDS = 3600.0
CLONE_NEWNS = 0x20000  # of sched.h; os.unshare() is Python 3.12's
USER = 1000

# Arguments: the root, how it is mounted, the folders to be seen as /runs and ~/.ssh, then the command. What is mounted
# here is seen by this process and its children alone, and gone with them.
ENTER = """
set -eu
root=$1 options=$2 runs=$3 ssh=$4; shift 4
mount --bind -o "$options" "$root" "$root"
cd "$root"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs -o mode=1777,size=1g tmpfs dev/shm
mount -t tmpfs -o mode=1777 tmpfs tmp
mount --bind "$runs" runs
if [ -n "$ssh" ]; then mount --bind "$ssh" home/mpiuser/.ssh; fi
hostname job
ip link set lo up
exec chroot . setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs \\
    -- env --chdir="$WORKDIR" -u WORKDIR "$@"
"""


def why_not() -> str:
    """Why no image can be built here; empty if one can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install buildah debootstrap iproute2 openssh-client"
    if os.geteuid() != 0:
        return "debootstrap and chroot need root"
    spaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "true"]
    return "" if subprocess.run(spaces, check=False).returncode == 0 else "no namespaces of its own are permitted here"


def keep_mounts_private() -> None:
    """What this thread's children mount from here on is gone with them: nothing keeps :data:`BUILD` from being removed.

    Raises:
        OSError: not permitted.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def buildah(*arguments: str) -> str:
    """Run buildah on a store of its own, its scratch files beside it. What it printed on stdout."""
    scratch = BUILD / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    command = ["buildah", "--root", str(BUILD / "store"), "--runroot", str(BUILD / "run"), *arguments]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=BUILD_SECONDS
    )
    return done.stdout.strip()


def make_base() -> None:
    """Make :data:`BASE`, unless it is there: Debian's minimal system, and the host's ways to get packages."""
    if BASE in buildah("images", "--format", "{{.Name}}").splitlines():
        return
    folder = BUILD / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = ["debootstrap", "--variant=minbase", RELEASE, str(folder)]
    subprocess.run(command, check=True, timeout=BUILD_SECONDS, stdout=subprocess.DEVNULL)
    (folder / "etc/apt/sources.list").unlink(missing_ok=True)
    for source, name in LENT:
        target = folder / name[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif os.path.exists(source):
            shutil.copy(source, target)
    # As Debian's own image has it: no package is kept beside what was installed from it.
    (folder / "etc/apt/apt.conf.d/99keep-none").write_text('APT::Keep-Downloaded-Packages "false";\n')
    subprocess.run(["chroot", str(folder), "apt-get", "clean"], check=True)
    container = buildah("from", "scratch")
    buildah("copy", "--quiet", container, str(folder), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(folder)


def build(target: str) -> str:
    """Build that target of the Dockerfile; the name of the image."""
    make_base()
    name = f"localhost/horovod-gluon-job:{target}"
    options = ["--isolation", "chroot", "--pull=never", "--layers", "--format", "docker"]
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "REVISION=a-test"]
    buildah("bud", *options, *arguments, "--target", target, "--tag", name, str(ROOT))
    return name


class Image:
    """A built image, its root file system within reach. ``with`` removes what was unpacked."""

    def __init__(self, name: str) -> None:
        self.config: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]
        self._container = buildah("from", "--pull=never", name)
        self.root = Path(buildah("mount", self._container))
        # What an engine writes before it starts a container.
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost job\n")
        (self.root / "home/mpiuser/.ssh").mkdir(parents=True, exist_ok=True)  # a stage that compiles has no such user

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        buildah("rm", self._container)

    @functools.cached_property
    def megabytes(self) -> int:
        """Of all files, as they lie on disk."""
        used = subprocess.run(["du", "-sxm", str(self.root)], stdout=subprocess.PIPE, text=True, check=True)
        return int(used.stdout.split()[0])

    def start(
        self, *command: str, runs: Path, ssh: Path | None = None, read_only: bool = True, **variables: str
    ) -> Process:
        """Start as ``docker run IMAGE command`` would; without a command the image's own."""
        os.chown(runs, USER, USER)
        arguments = [str(self.root), "ro" if read_only else "rw", str(runs), str(ssh or "")]
        full = [*self.config["Entrypoint"], *(command or self.config["Cmd"])]
        environment = dict(pair.split("=", 1) for pair in self.config["Env"])
        return Process([*arguments, *full], {**environment, **variables, "WORKDIR": self.config["WorkingDir"]})

    def run(self, *command: str, runs: Path, **options: Any) -> tuple[int, str]:
        """Start, and wait for the end. The exit code, and all that it said."""
        return self.start(*command, runs=runs, **options).finish()


class Process:
    """A container that runs."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        spaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--fork"]
        self._popen = subprocess.Popen(
            [*spaces, "/bin/sh", "-c", ENTER, "enter", *arguments],
            env={**environment, "HOME": "/home/mpiuser"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def alive(self) -> bool:
        return self._popen.poll() is None

    def wait_for(self, condition: Callable[[], bool], timeout: float = 100.0) -> None:
        """Until the condition holds, the process ends, or the seconds are over."""
        deadline = time.monotonic() + timeout
        while not condition() and self.alive() and time.monotonic() < deadline:
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Send it to the container's process 1, with which all others end. SIGTERM is ``docker stop``."""
        if self.alive():
            for first in psutil.Process(self._popen.pid).children():
                first.send_signal(number)

    def finish(self, timeout: float = 200.0) -> tuple[int, str]:
        """The exit code, and all that was said. Killed, with all its processes, if that takes longer (seconds)."""
        try:
            said, _ = self._popen.communicate(timeout=timeout)
        finally:
            self.signal(signal.SIGKILL)
        return self._popen.returncode, said
