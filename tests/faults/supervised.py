"""``launch/local.sh --min-np``, with ranks that break: ``FAULT=... python -m tests.faults.supervised -np 3 ...``."""

from __future__ import annotations

import sys

from job import command
from launch.elastic.__main__ import main

if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:], train=[sys.executable, "-m", "tests.faults.broken"]))
