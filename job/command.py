"""How a command ends: one readable message, the exit code of the contract, and never a hang.

Exit codes: 0 done; 1 failed; 2 bad configuration or usage, before any rank starts work; 75 preempted, a checkpoint is
written, the same command goes on.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, Optional, TypeVar

from job.distributed.placement import launched, placement
from job.distributed.watchdog import leaving
from job.errors import DivergedError, JobError, PeerLostError, Preempted, UsageError

T = TypeVar("T")

_HOLD_SECONDS = 10.0


def run(main: Callable[[], Optional[int]], label: str = "error") -> NoReturn:
    """Run ``main`` and end the process with the exit code that it returns, or that its outcome calls for.

    ``label`` is what the message of a failure begins with.

    A rank leaves through ``os._exit``: the ordinary way out would wait, in Horovod's and MXNet's own exit hooks, for
    ranks that may never answer, where no watchdog looks any more. All that has to be closed is closed by then.
    """

    def whole() -> int:
        code = main() or 0
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    code = attempt(whole, label)
    leaving.acquire()
    os._exit(code)


def attempt(work: Callable[[], T], label: str = "error") -> T:
    """The result of ``work``; if it fails, the process ends with a message and the exit code that this calls for."""
    _ready_streams()
    try:
        return work()
    except Preempted as stop:
        code = 0 if _launch_script_is_told() else stop.exit_code
        _end(str(stop) if placement().rank == 0 else "", code, "preempted")
    except JobError as error:
        if isinstance(error, (UsageError, PeerLostError, DivergedError)):
            _let_another_rank_speak()
        _end(str(error), error.exit_code, label)
    except KeyboardInterrupt:
        _end("interrupted", 130, label)
    except BrokenPipeError:
        _end("nobody reads the output any more", 1, label)
    except OSError:
        _end(_about_output() or traceback.format_exc(), 1, label)
    except Exception:
        _end(traceback.format_exc(), 1, label)


def _ready_streams() -> None:
    """Have output never be what ends a run that is fine: it may be closed, know only ASCII, or have no width."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed by who started us, as by `2>&-`
            _open_if_closed(descriptor)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the life of the process)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for size in ("COLUMNS", "LINES"):
        if os.environ.get(size, "").strip().lstrip("0") == "":  # rich would show nothing in no columns
            os.environ.pop(size, None)


def _open_if_closed(descriptor: int) -> None:
    """Or else the next file that is opened becomes the output of every library."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _about_output() -> str:
    """What is wrong with standard output, be it buffered or not; empty if one can write there."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        return f"standard output cannot be written: {error.strerror}; free some space, or send it elsewhere"
    return ""


def _let_another_rank_speak() -> None:
    """One message is enough for what all ranks meet, and the launcher ends the others after it.

    All find the same mistake in the configuration, and rank 0 tells it. All lose the rank that failed, and that one
    knows why.
    """
    if placement().rank > 0 and launched() and "JOB_COMMITS" not in os.environ:  # others are to go on at once
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


def _end(message: str, code: int, label: str) -> NoReturn:
    everybodys = code == UsageError.exit_code and placement().rank == 0
    where = f"rank {placement().rank}: " if placement().size > 1 and not everybodys else ""
    with contextlib.suppress(OSError, ValueError):  # whoever read our output may be gone
        if message:
            print(f"{label}: {where}{message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    leaving.acquire()
    os._exit(code)
