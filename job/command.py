"""How a command ends: one readable message, the exit code of the contract, and never a hang.

Exit codes: 0 done; 1 failed; 2 bad configuration or usage, before any rank starts work; 75 preempted, a checkpoint is
written, the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from job.distributed.placement import launched, placement
from job.errors import DivergedError, JobError, PeerLostError, Preempted, UsageError

_HOLD_SECONDS = 10.0


def run(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and end the process with the exit code that its outcome calls for.

    A rank leaves through ``os._exit``: the ordinary way out would wait, in Horovod's and MXNet's own exit hooks, for
    ranks that may never answer, where no watchdog looks any more. All that has to be closed is closed by then.
    """
    try:
        main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    except Preempted as stop:
        code = 0 if _launch_script_is_told() else stop.exit_code
        _end(str(stop) if placement().rank == 0 else "", code, "preempted")
    except JobError as error:
        if isinstance(error, (UsageError, PeerLostError, DivergedError)):
            _let_another_rank_speak()
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except BrokenPipeError:
        _end("nobody reads the output any more", 1)
    except Exception:
        _end(traceback.format_exc(), 1)


def _let_another_rank_speak() -> None:
    """One message is enough for what all ranks meet, and the launcher ends the others after it.

    All find the same mistake in the configuration, and rank 0 tells it. All lose the rank that failed, and that one
    knows why.
    """
    if placement().rank > 0 and launched():
        time.sleep(_HOLD_SECONDS)


def _launch_script_is_told() -> bool:
    """Whether one has asked. A launcher takes 75 for a failure, ends the other ranks for it, and may make 1 of it."""
    file = os.environ.get("JOB_PREEMPTED_FILE")
    if not file:
        return False
    with contextlib.suppress(OSError):
        with open(file, "a", encoding="utf-8") as stream:  # other ranks write to it too
            stream.write("preempted\n")
        return True
    return False


def _end(message: str, code: int, label: str = "error") -> NoReturn:
    everybodys = code == UsageError.exit_code and placement().rank == 0
    where = f"rank {placement().rank}: " if placement().size > 1 and not everybodys else ""
    with contextlib.suppress(OSError, ValueError):  # whoever read our output may be gone
        if message:
            print(f"{label}: {where}{message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)
