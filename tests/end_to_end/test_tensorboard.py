"""``make tensorboard``, in a checkout whose environment is already there."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path
from threading import Timer

import pytest
from tensorboardX import SummaryWriter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile and the environment; the set-up, for which test_setup.py is there, finds nothing to do."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text("#!/bin/sh\n")
    (tmp_path / "launch" / "setup.sh").chmod(0o755)
    return tmp_path


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="needs .venv, which make setup makes")
def test_without_runs_it_says_what_to_do(checkout: Path) -> None:
    done = subprocess.run(["make", "tensorboard"], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "`make train` makes the first run" in done.stderr and done.stdout == ""


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="needs .venv, which make setup makes")
def test_it_prints_an_address_that_serves_all_runs_and_takes_arguments(checkout: Path) -> None:
    for name in ("first", "second"):
        with SummaryWriter(str(checkout / "runs" / name / "tensorboard")) as writer:
            writer.add_scalar("test/accuracy", 0.9, 1)
    command = ["make", "tensorboard", "ARGS=--port 0 --host 127.0.0.1"]
    server = subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    late = Timer(120, server.kill)
    late.start()
    try:
        address = next(found[0] for line in server.stderr or () if (found := re.search(r"http://127.0.0.1:\d+/", line)))
        seen: list[str] = []
        while len(seen) < 2:  # it reads them meanwhile; the timeout of the test is the bound
            with urllib.request.urlopen(f"{address}data/runs", timeout=60) as answer:
                seen = json.load(answer)
        assert sorted(seen) == ["first/tensorboard", "second/tensorboard"]
    finally:
        late.cancel()
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", "--", f"-{server.pid}"], check=False)
        server.communicate(timeout=60)
