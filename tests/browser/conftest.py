"""A real run and a real browser to look at it with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from benchmarks.browser import MISSING, chromium

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on the real data."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    train = [sys.executable, str(ROOT / "job" / "train.py"), "--config", str(ROOT / "configs" / "smoke.yaml")]
    arguments = ["train.max_steps=12", f"run.dir={folder}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # threads that wait for one another stand still on a full machine
    done = subprocess.run([*train, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    if MISSING:
        pytest.skip(MISSING)
    with chromium() as browser:
        yield browser
