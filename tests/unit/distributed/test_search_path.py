"""What hides packages, found by name, and told where an import fails of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.config import ROOT
from job.distributed.search_path import hiding


def test_folders_that_hide_packages_are_found_in_either_search_path(tmp_path: Path) -> None:
    (tmp_path / "site" / "numpy").mkdir(parents=True)
    (tmp_path / "mpi").mkdir()
    (tmp_path / "mpi" / "libmpi.so.40").touch()
    assert hiding(f"{tmp_path}:{tmp_path}/site:", f"{tmp_path}/mpi:/gone") == [
        f"{tmp_path}/site (of PYTHONPATH) holds numpy",
        f"{tmp_path}/mpi (of LD_LIBRARY_PATH) holds libmpi.so.40",
    ]
    assert hiding("", "") == []


def fails_to_start(command: list[str], **variables: str) -> str:
    """What a command says that cannot import what it needs, and ends with 1 without a traceback."""
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("content", ["__version__ = '2.0.0'", "raise ImportError('\\nof another Python\\n')", "}"])
def test_a_foreign_numpy_is_one_error_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(content)
    said = fails_to_start(
        [sys.executable, str(ROOT / "job" / "train.py"), f"run.dir={tmp_path}/run"], PYTHONPATH=str(tmp_path)
    )
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert f"{tmp_path} (of PYTHONPATH) holds numpy, and hides what .venv holds; unset PYTHONPATH; " in said


def test_a_python_without_the_packages_is_told_which_one_to_take() -> None:
    said = fails_to_start([sys.executable, "-S", str(ROOT / "job" / "train.py"), "--help"])
    assert said.startswith("error: No module named ") and "`make setup`" in said and len(said.splitlines()) == 1
