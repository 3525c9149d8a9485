"""File systems that lack what others have, imitated by a library that is put before the C library."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.config import ROOT

SOURCE = Path(__file__).parent / "file_systems.c"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

CLAIM = """
import sys
from pathlib import Path
from job import command, run_dir
from job.config import Config, RunConfig

def main():
    for _ in range(2):  # the second start finds the lock of the first
        run_dir.claim(Config(run=RunConfig(dir=Path(sys.argv[1]), resume="auto"))).close()
    held = run_dir.claim(Config(run=RunConfig(dir=Path(sys.argv[1]), resume="auto")))
    if "twice" in sys.argv:
        run_dir.check(Config(run=RunConfig(dir=Path(sys.argv[1]), resume="auto")))
    print("claimed")

command.run(main)
"""

FETCH = """
import sys
from pathlib import Path
from job.config import DataConfig
from job.data import cache

with cache.locked(DataConfig(cache_dir=Path(sys.argv[1])), print) as scratch:
    print("fetching into", scratch)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("library") / "file_systems.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(SOURCE)], check=True)
    return target


def run(program: str, library: Path, *arguments: str, **imitated: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_PRELOAD": str(library), **imitated}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_on_nfs_a_run_starts_again_and_its_folder_is_still_locked(library: Path, tmp_path: Path) -> None:
    done = run(CLAIM, library, str(tmp_path / "run"), FLOCK="nfs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "claimed\n", "")
    again = run(CLAIM, library, str(tmp_path / "run"), "twice", FLOCK="nfs")
    assert again.returncode == 2 and "is in use by process" in again.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_run_warns_once_and_goes_on(library: Path, tmp_path: Path, number: int) -> None:
    done = run(CLAIM, library, str(tmp_path / "run"), FLOCK=str(number))
    assert (done.returncode, done.stdout) == (0, "claimed\n"), done.stderr
    assert done.stderr.count("warning: ") == 1 and "has no locks" in done.stderr


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_no_folder_can_be_brought_to_the_disk_a_run_warns_once_and_goes_on(
    library: Path, tmp_path: Path, number: int
) -> None:
    done = run(CLAIM, library, str(tmp_path / "run"), FOLDER_FSYNC=str(number))
    assert (done.returncode, done.stdout) == (0, "claimed\n"), done.stderr
    assert done.stderr.count("warning: ") == 1 and "cannot bring a folder to the disk" in done.stderr


def test_a_folder_that_fails_otherwise_is_an_error(library: Path, tmp_path: Path) -> None:
    done = run(CLAIM, library, str(tmp_path / "run"), FOLDER_FSYNC=str(errno.EIO))
    assert done.returncode == 1 and "cannot be written: Input/output error" in done.stderr


@pytest.mark.parametrize("flock", ["nfs", str(errno.ENOLCK)])
def test_the_data_is_fetched_all_the_same(library: Path, tmp_path: Path, flock: str) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "thesis").write_text("mine")
    for _ in range(2):
        done = run(FETCH, library, str(tmp_path), FLOCK=flock)
        assert done.returncode == 0 and "fetching into" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "partial"]
    assert (tmp_path / "partial" / "thesis").read_text() == "mine"


def test_a_lock_in_the_cache_that_is_not_ours_is_left_as_it_is(library: Path, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine")
    done = run(FETCH, library, str(tmp_path))
    assert "is not the lock of this program; set data.cache_dir" in done.stderr
    assert (tmp_path / "lock").read_text() == "mine"
