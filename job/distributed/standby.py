"""A process that has imported everything, and waits to be told which rank it is: it replaces one that has died.

The imports are most of a start. A supervisor (launch/elastic) starts such processes while the ranks train, and writes
one line to the standard input of each when it is needed: variables of its environment, as a JSON object. If the
supervisor ends, so does the input, and with it the process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

STANDBY = "JOB_STANDBY"  # set for a process that is to wait


def is_standby() -> bool:
    """Whether this process is to wait for its rank."""
    return STANDBY in os.environ


def stay_for_horovodrun() -> None:
    """Where ``horovodrun --min-np`` has started this process: become one that stays while ranks come and go.

    It has this process's id, so that what the driver sends reaches it. The ranks that it starts come here again, but
    without HOROVOD_ELASTIC.
    """
    if not {"HOROVOD_ELASTIC", "HOROVOD_GLOO_RENDEZVOUS_ADDR"} <= os.environ.keys():
        return
    worker = Path(__file__).resolve().parents[2] / "launch" / "elastic" / "horovodrun.py"
    if not worker.is_file():
        print(f"error: horovodrun --min-np needs a checkout of the project: there is no {worker}", file=sys.stderr)
        sys.exit(2)
    os.execv(sys.executable, [sys.executable, str(worker), *sys.argv[1:]])


def wait_for_rank(prepare: Callable[[], None]) -> None:
    """Where this process is a standby: ``prepare``, and wait until it is told its rank. Else nothing."""
    if os.environ.pop(STANDBY, None) is None:
        return
    prepare()
    order = sys.stdin.readline()
    if not order:
        os._exit(0)  # nobody needs it any more
    os.environ.update(json.loads(order))
