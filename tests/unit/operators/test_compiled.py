"""Compiled code is kept for the next process; whatever becomes of the files, the loops run and are right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import ROOT

PROGRAM = """
import errno, os, sys
import numpy as np
from job.operators.compiled import compiled, load_kept

def double(x, out):
    for i in range(len(x)):
        out[i] = 2 * x[i]

if "full" in sys.argv:
    import numba.core.caching
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    numba.core.caching.IndexDataCacheFile._save_data = full
loop = compiled(reorders_sums=True)(double)
if "early" in sys.argv:
    load_kept(sys.modules[__name__])
    print("the work begins", file=sys.stderr)
out = np.empty(3)
loop(np.arange(3.0), out)
hits = sum(loop.stats.cache_hits.values()) if hasattr(loop, "stats") else None
print(out.tolist(), hits)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program in a process of its own, with the files of compiled code below ``cache``."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, str(tmp_path / "program.py"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def files(tmp_path: Path) -> list[Path]:
    return sorted(file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".nbi", ".nbc"))


def test_the_next_process_takes_what_was_compiled(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run().stdout == "[0.0, 2.0, 4.0] 0\n"
    again = run()
    assert (again.stdout, again.stderr) == ("[0.0, 2.0, 4.0] 1\n", "")


@pytest.mark.parametrize("kind", [".nbi", ".nbc"], ids=["index", "code"])
@pytest.mark.parametrize("length", [0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_told_and_replaced(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, kind: str, length: float
) -> None:
    run()
    (file,) = (file for file in files(tmp_path) if file.suffix == kind)
    os.truncate(file, int(file.stat().st_size * length))
    damaged = run()
    assert damaged.stdout == "[0.0, 2.0, 4.0] 0\n", damaged.stderr
    assert damaged.stderr.count("warning: ") == 1 and "compiled anew" in damaged.stderr
    assert run().stdout == "[0.0, 2.0, 4.0] 1\n"


@pytest.mark.parametrize("kind", [".nbi", ".nbc"], ids=["index", "code"])
def test_what_is_damaged_is_told_before_the_work_begins(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, kind: str
) -> None:
    run()
    assert run("early").stderr == "the work begins\n"
    (file,) = (file for file in files(tmp_path) if file.suffix == kind)
    os.truncate(file, file.stat().st_size // 2)
    first, second = run("early").stderr.splitlines()
    assert first.startswith(f"warning: {file.parent}") and second == "the work begins"
    assert run("early").stdout == "[0.0, 2.0, 4.0] 1\n"


def test_a_full_disk_is_told_and_the_loop_runs(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run("full")
    assert done.stdout == "[0.0, 2.0, 4.0] 0\n", done.stderr
    assert "cannot be written (No space left on device)" in done.stderr


def test_a_debugger_gets_the_function_itself(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert run(NUMBA_DISABLE_JIT="1").stdout == "[0.0, 2.0, 4.0] None\n"
