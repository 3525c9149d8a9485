"""What a step frees stays with the process, and what was there before is not looked through again."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import gc, resource
import numpy as np
from job import memory

if {settled}:
    memory.settle()
for turn in range(40):
    if turn == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(size * 2**18) for size in (9, 7, 5, 3)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, gc.get_freeze_count())
"""


def faults_and_frozen(settled: bool) -> tuple[int, int]:
    """The page faults of twenty turns, and how many objects the garbage collector leaves alone."""
    script = FAULTS.format(settled=settled)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    faults, frozen = map(int, said.split())
    return faults, frozen


def test_what_is_freed_is_taken_again_without_asking_the_system() -> None:
    before, _ = faults_and_frozen(settled=False)
    after, frozen = faults_and_frozen(settled=True)
    assert before > 20 * 1000  # pages: without it the memory goes back and forth
    assert after < 1000
    assert frozen > 1000
