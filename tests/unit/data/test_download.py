"""The sources, against a local server that fails on command and stand-ins for apt."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import pty
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.data import download
from job.data.download import AptPackage, FileUnavailable, Folder, Mirror, SourceUnavailable

BODY = bytes(range(256)) * 1000
NEVER = time.monotonic() + 3600  # a deadline that plays no part
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers in turn, one a request; then the body, always."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.requests: list[str] = []
        self.over = threading.Event()  # frees the answers that hang

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        (self.server.answers.pop(0) if self.server.answers else whole)(self)

    def log_message(self, *args: object) -> None:
        pass


def status(code: int, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    return answer


def whole(handler: http.server.BaseHTTPRequestHandler) -> None:
    status(200, **{"Content-Length": str(len(BODY))})(handler)
    handler.wfile.write(BODY)


def without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(BODY)


def cut_short(handler: http.server.BaseHTTPRequestHandler) -> None:
    status(200, **{"Content-Length": str(len(BODY))})(handler)
    handler.wfile.write(BODY[:1000])


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    cut_short(handler)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.server.over.wait()  # type: ignore[attr-defined]


def hang_after_ten_bytes(handler: http.server.BaseHTTPRequestHandler) -> None:
    status(200, **{"Content-Length": str(len(BODY))})(handler)
    handler.wfile.write(BODY[:10])
    handler.wfile.flush()
    hang(handler)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def mirror(server: Server, pauses: list[float]) -> Mirror:
    return Mirror(server.url, timeout_seconds=10, attempts=3, say=lambda line: None, sleep=pauses.append)


def test_a_mirror_delivers_the_bytes_and_asks_for_the_gz_file(mirror: Mirror, server: Server, tmp_path: Path) -> None:
    assert mirror.find("x-ubyte", tmp_path, NEVER).read_bytes() == BODY
    assert server.requests == ["/data/x-ubyte.gz"]


@pytest.mark.parametrize("answer", [without_length, status(302, Location="/elsewhere")])
def test_a_body_without_length_and_a_redirect_are_fine(
    answer: Answer, mirror: Mirror, server: Server, tmp_path: Path
) -> None:
    server.answers = [answer]
    assert mirror.find("x", tmp_path, NEVER).read_bytes() == BODY


@pytest.mark.parametrize("answer", [status(500), status(503), status(429), cut_short, reset, hang])
def test_a_transient_failure_is_retried_and_said(
    answer: Answer, mirror: Mirror, server: Server, pauses: list[float], tmp_path: Path
) -> None:
    said: list[str] = []
    server.answers, mirror.say = [answer], said.append
    mirror.timeout_seconds = 0.2 if answer is hang else 10
    start = time.monotonic()
    assert mirror.find("x", tmp_path, NEVER).read_bytes() == BODY
    assert pauses == [1.0]
    assert len(said) == 1
    assert "attempt 1 of 3" in said[0]
    assert time.monotonic() - start < 10


def test_a_mirror_that_does_not_answer_the_connection_is_retried(
    mirror: Mirror, pauses: list[float], tmp_path: Path
) -> None:
    mirror.timeout_seconds = 0.1
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_connection(deaf.getsockname()):
        mirror.url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        with pytest.raises(SourceUnavailable, match="timed out"):
            mirror.find("x", tmp_path, NEVER)
    assert pauses == [1.0, 2.0]


def test_the_pauses_double_and_the_attempts_end(
    mirror: Mirror, server: Server, pauses: list[float], tmp_path: Path
) -> None:
    mirror.attempts, server.answers = 4, [status(500)] * 4
    with pytest.raises(SourceUnavailable, match=r"x\.gz: HTTP 500 .*attempt 4 of 4"):
        mirror.find("x", tmp_path, NEVER)
    assert pauses == [1.0, 2.0, 4.0]
    assert len(server.requests) == 4


def test_a_short_body_is_never_taken_for_the_file(mirror: Mirror, server: Server, tmp_path: Path) -> None:
    server.answers = [cut_short] * 3
    with pytest.raises(SourceUnavailable, match=f"1000 of {len(BODY)} bytes"):
        mirror.find("x", tmp_path, NEVER)


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_a_mirror_lacks_is_not_asked_for_again(
    code: int, mirror: Mirror, server: Server, pauses: list[float], tmp_path: Path
) -> None:
    server.answers = [status(code)]
    with pytest.raises(FileUnavailable, match=f"HTTP {code}"):
        mirror.find("x", tmp_path, NEVER)
    assert len(server.requests) == 1
    assert pauses == []


def test_a_refused_connection_is_not_retried(mirror: Mirror, pauses: list[float], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        mirror.url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    with pytest.raises(SourceUnavailable, match="refused"):
        mirror.find("x", tmp_path, NEVER)
    assert pauses == []


def test_a_server_that_does_not_speak_http_is_unavailable(mirror: Mirror, server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n") and None]
    with pytest.raises(SourceUnavailable, match="SSH"):
        mirror.find("x", tmp_path, NEVER)


def test_a_dripping_mirror_ends_at_its_deadline(mirror: Mirror, server: Server, tmp_path: Path) -> None:
    server.answers = [hang_after_ten_bytes]
    with pytest.raises(SourceUnavailable, match="too slow: 10 bytes"):
        mirror.find("x", tmp_path, time.monotonic())


def test_an_endless_body_is_cut_off(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "MAX_DOWNLOAD_BYTES", len(BODY) - 1)
    with pytest.raises(FileUnavailable, match="more than"):
        mirror.find("x", tmp_path, NEVER)


def test_a_full_disk_is_not_blamed_on_the_mirror(mirror: Mirror, server: Server, tmp_path: Path) -> None:
    (tmp_path / "x.gz").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        mirror.find("x", tmp_path, NEVER)
    assert len(server.requests) == 1


def test_progress_is_drawn_on_a_terminal_only(
    mirror: Mirror, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mirror.find("x", tmp_path, NEVER)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        mirror.find("x", tmp_path, NEVER)
    drawn = b""
    with contextlib.suppress(OSError):  # which is the end of a terminal that nobody has open
        while chunk := os.read(master, 1 << 16):
            drawn += chunk
    assert b"x.gz" in drawn
    os.close(master)


def test_a_folder_gives_the_decompressed_file_first(tmp_path: Path) -> None:
    (tmp_path / "x.gz").touch()
    assert Folder(tmp_path).find("x", tmp_path, NEVER).name == "x.gz"
    (tmp_path / "x").touch()
    assert Folder(tmp_path).find("x", tmp_path, NEVER).name == "x"


def test_a_folder_tells_a_lacking_file_from_a_lacking_folder(tmp_path: Path) -> None:
    with pytest.raises(FileUnavailable, match=r"neither x nor x\.gz"):
        Folder(tmp_path).find("x", tmp_path, NEVER)
    with pytest.raises(SourceUnavailable, match="no such folder"):
        Folder(tmp_path / "none").find("x", tmp_path, NEVER)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH with an apt-get that logs its arguments and a dpkg-deb that unpacks one file."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    write_command(folder / "apt-get", f'echo "$PWD $*" >>{folder}/log; case "$*" in *download*) : >it.deb;; esac')
    tree = f"tree{download.PACKAGE_FOLDER}"
    write_command(folder / "dpkg-deb", f"/bin/mkdir -p {tree} && echo unpacked >{tree}/x && echo also >{tree}/y.gz")
    return folder


def write_command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_apt_works_in_private_folders_and_once_for_all_files(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(tmp_path)
    package = AptPackage(timeout_seconds=5)
    assert package.find("x", Path("scratch"), NEVER).read_text() == "unpacked\n"  # a relative cache_dir is fine
    assert package.find("y", Path("scratch"), NEVER).read_text() == "also\n"
    update, fetch = (commands / "log").read_text().splitlines()
    assert update.endswith(" update")
    assert fetch.endswith(" download dataset-fashion-mnist")
    for line in (update, fetch):
        assert line.startswith(str(scratch))
        for option in ("Dir::State", "Dir::State::Lists", "Dir::Cache"):
            assert f"{option}={scratch}/" in line


def test_without_apt_the_failure_says_so(commands: Path, tmp_path: Path) -> None:
    (commands / "apt-get").unlink()
    with pytest.raises(SourceUnavailable, match="apt-get is not installed"):
        AptPackage(5).find("x", tmp_path, NEVER)


def test_a_failure_of_apt_is_told_in_its_own_words_with_its_likely_cause(commands: Path, tmp_path: Path) -> None:
    script = 'case "$*" in *update*) echo "W: no network" >&2;; *) echo "E: Unable to locate" >&2; exit 100;; esac'
    write_command(commands / "apt-get", script)
    with pytest.raises(SourceUnavailable, match=r"^E: Unable to locate; W: no network$"):
        AptPackage(5).find("x", tmp_path, NEVER)


def test_a_silent_failure_of_apt_is_told_by_its_exit_code(commands: Path, tmp_path: Path) -> None:
    write_command(commands / "apt-get", "exit 7")
    with pytest.raises(SourceUnavailable, match=r"^apt-get: exit 7$"):
        AptPackage(5).find("x", tmp_path, NEVER)


def test_apt_ends_at_its_deadline(commands: Path, tmp_path: Path) -> None:
    write_command(commands / "apt-get", "exec /bin/sleep 60")
    start = time.monotonic()
    with pytest.raises(SourceUnavailable, match="did not end"):
        AptPackage(5).find("x", tmp_path, start + 0.1)
    assert time.monotonic() - start < 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs Debian's or Ubuntu's apt-get, and a package mirror")
def test_the_real_package_holds_the_training_labels(tmp_path: Path) -> None:
    import gzip

    found = AptPackage(30).find("train-labels-idx1-ubyte", tmp_path, time.monotonic() + 240)
    digest = hashlib.sha256(gzip.decompress(found.read_bytes())).hexdigest()
    assert digest == "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
