"""A process that waits until it is told which rank it is."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from job.distributed.placement import Placement, placement
from job.distributed.standby import STANDBY, is_standby, wait_for_rank
from tests.parallel.conftest import ROOT


def test_it_becomes_the_rank_that_it_is_told_after_it_has_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(os, "environ", {**os.environ, STANDBY: "yes", "HOROVOD_RANK": "0", "HOROVOD_SIZE": "3"})
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}\n'))
    assert is_standby()
    wait_for_rank(lambda: prepared.append(placement().size))
    assert prepared == [3]
    assert placement() == Placement(rank=1, size=2)
    assert not is_standby()


def test_any_other_process_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STANDBY, raising=False)
    wait_for_rank(lambda: pytest.fail("there is nothing to prepare"))


def test_it_ends_with_whoever_would_tell_it() -> None:
    code = "from job.distributed.standby import wait_for_rank; wait_for_rank(lambda: None); print('on its own')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, STANDBY: "yes"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
