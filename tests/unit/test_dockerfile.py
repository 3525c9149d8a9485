"""The Dockerfile as a text. ``make image-test`` builds and runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")


def lint(dockerfile: Path) -> "subprocess.CompletedProcess[str]":
    if not HADOLINT.exists():
        pytest.skip("hadolint is not installed: make setup")
    return subprocess.run([str(HADOLINT), str(dockerfile)], capture_output=True, text=True, timeout=30)


def test_the_dockerfile_has_no_finding_of_hadolint() -> None:
    done = lint(ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_hadolint_does_find_what_is_wrong(tmp_path: Path) -> None:
    broken = tmp_path / "Dockerfile"
    shutil.copy(ROOT / "Dockerfile", broken)
    broken.write_text(broken.read_text() + "RUN cd / && sudo true\n")
    assert {"DL3003", "DL3004"} <= set(lint(broken).stdout.split())


def test_each_finding_that_is_ignored_has_its_reason_above_it() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    ignored = [number for number, line in enumerate(lines) if line.startswith("# hadolint ignore")]
    assert ignored
    assert all(lines[number - 1].startswith("# ") for number in ignored)
