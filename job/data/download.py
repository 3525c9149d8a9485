"""Where the data set's bytes come from: a folder, an HTTP mirror, or a Debian package fetched without root.

A source is asked for one file at a time and answers with a local path. What it hands over is not trusted: the caller
verifies it. Every failure is one of two kinds, so that the caller knows whether to ask the same source again.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

Say = Callable[[str], None]

PACKAGE = "dataset-fashion-mnist"
PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MAX_DOWNLOAD_BYTES = 1 << 30
CHUNK_BYTES = 1 << 16


class FileUnavailable(Exception):
    """The source does not have this file; it may have others."""


class SourceUnavailable(Exception):
    """The source as a whole cannot be used; asking it for another file is a waste of time."""


class _Transient(Exception):
    """The same request may well succeed in a moment."""


class Source(Protocol):
    """A place that may hold the files. As text, what messages call it."""

    def find(self, name: str, scratch: Path, deadline: float) -> Path:
        """A local path of ``name`` or of its gzip file.

        Args:
            name: the file's name, without ``.gz``.
            scratch: an existing folder to write to, deleted by the caller.
            deadline: when to give up, in seconds of :func:`time.monotonic`.

        Raises:
            FileUnavailable: this file cannot be had here.
            SourceUnavailable: no file can be had here.
            OSError: ``scratch`` cannot be written.
        """


@dataclass
class Folder:
    """Files that are on this machine already, compressed or not."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def find(self, name: str, scratch: Path, deadline: float) -> Path:
        """See :class:`Source`."""
        if not os.path.isdir(self.path):
            raise SourceUnavailable("no such folder")
        path = self.path_of(name)
        if path is None:
            raise FileUnavailable(f"holds neither {name} nor {name}.gz")
        return path

    def path_of(self, name: str) -> Path | None:
        """The file, or else its gzip file, if either is there."""
        candidates = self.path / name, self.path / f"{name}.gz"
        return next((path for path in candidates if os.path.isfile(path)), None)


@dataclass
class Mirror:
    """An HTTP or HTTPS server with the gzip files under one prefix."""

    url: str
    timeout_seconds: float
    attempts: int
    say: Say = print
    sleep: Callable[[float], None] = time.sleep

    def __str__(self) -> str:
        return self.url

    def find(self, name: str, scratch: Path, deadline: float) -> Path:
        """See :class:`Source`."""
        url, target = f"{self.url.rstrip('/')}/{name}.gz", scratch / f"{name}.gz"
        for attempt in range(1, self.attempts + 1):
            try:
                with target.open("wb") as file:
                    file.writelines(self._chunks(url, deadline))
                return target
            except _Transient as error:
                problem = f"{error} (attempt {attempt} of {self.attempts})"
            if attempt < self.attempts:
                pause = 2.0 ** (attempt - 1)
                self.say(f"{url}: {problem}; trying again in {pause:.0f} s")
                self.sleep(pause)
        raise SourceUnavailable(f"{name}.gz: {problem}")

    def _chunks(self, url: str, deadline: float) -> Iterator[bytes]:
        """The body, whole or an exception. Only the network's errors are caught here, not those of who writes it."""
        request = urllib.request.Request(url, headers={"User-Agent": "horovod-gluon-job"})  # some refuse Python's own
        received = 0
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response, _progress(url) as progress:
                total = int(response.headers["Content-Length"] or 0) or None
                bar = progress.add_task(url, total=total)
                # read1, not read: a mirror that drips must come back here to be measured against the deadline.
                while received != total and (chunk := response.read1(CHUNK_BYTES)):
                    received += len(chunk)
                    _check_limits(received, deadline)
                    progress.update(bar, completed=received)
                    yield chunk
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _judge(error) from error
        if total and received < total:
            raise _Transient(f"the connection closed after {received} of {total} bytes")


def _progress(url: str) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    columns = TextColumn(url.rpartition("/")[2]), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _check_limits(received: int, deadline: float) -> None:
    if received > MAX_DOWNLOAD_BYTES:
        raise FileUnavailable(f"sends more than {MAX_DOWNLOAD_BYTES} bytes")
    if time.monotonic() > deadline:
        raise SourceUnavailable(f"too slow: {received} bytes when its time was up")


def _judge(error: Exception) -> Exception:
    """What an error of urllib means for the next request."""
    if isinstance(error, urllib.error.HTTPError):
        kind: type[Exception] = _Transient if error.code >= 500 or error.code in (408, 429) else FileUnavailable
        return kind(f"HTTP {error.code} {error.reason}")
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    # socket.timeout is not yet a TimeoutError on Python 3.9.
    passing = (socket.timeout, TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
    kind = _Transient if isinstance(error, (*passing, http.client.IncompleteRead)) else SourceUnavailable
    return kind(str(error) or type(error).__name__)


@dataclass
class AptPackage:
    """The package of Debian and Ubuntu, fetched and unpacked in a private folder: no root, nothing installed."""

    timeout_seconds: float
    package: str = PACKAGE
    unpacked: Folder | None = None

    def __str__(self) -> str:
        return f"apt package {self.package}"

    def find(self, name: str, scratch: Path, deadline: float) -> Path:
        """See :class:`Source`."""
        if self.unpacked is None:
            self.unpacked = Folder(self._unpack(scratch.resolve() / "apt", deadline))
        return self.unpacked.find(name, scratch, deadline)

    def _unpack(self, folder: Path, deadline: float) -> Path:
        # Lists of its own: a container's are empty, and only root may write the system's.
        for part in ("state", "lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        apt = ["apt-get", "--quiet=2"]
        for option in (
            f"Dir::State={folder / 'state'}",
            f"Dir::State::Lists={folder / 'lists'}",
            f"Dir::Cache={folder / 'cache'}",
            "Debug::NoLocking=1",
            "APT::Sandbox::User=root",  # else root's apt turns into a user who may not write here
            f"Acquire::http::Timeout={max(1, round(self.timeout_seconds))}",
            f"Acquire::https::Timeout={max(1, round(self.timeout_seconds))}",
        ):
            apt += ["-o", option]
        warnings = _run([*apt, "update"], folder, deadline)  # exits 0 although an index could not be fetched
        _run([*apt, "download", self.package], folder, deadline, warnings)
        for package in folder.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(package), "tree"], folder, deadline)
        return folder / "tree" / PACKAGE_FOLDER.relative_to("/")


def _run(command: Sequence[str], folder: Path, deadline: float, background: str = "") -> str:
    """Run it; the last line of its standard error. ``background`` may be why a failure came, and is told with it."""
    if shutil.which(command[0]) is None:
        raise SourceUnavailable(f"{command[0]} is not installed")
    env = {**os.environ, "LC_ALL": "C"}
    left = max(0.0, deadline - time.monotonic())
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"{command[0]} did not end in {left:.0f} s") from None
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode != 0:
        raise SourceUnavailable("; ".join(filter(None, (last or f"{command[0]}: exit {done.returncode}", background))))
    return last
