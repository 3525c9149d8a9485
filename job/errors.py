"""The failures that a user can mend, each told in one message.

A :class:`JobError` reaches the user as its message alone, without a traceback; anything else that escapes is a bug
and keeps its traceback.
"""


class JobError(Exception):
    """Something outside the program went wrong. The message says what, where, and what to do."""

    exit_code = 1


class UsageError(JobError):
    """The command line or the configuration is wrong; nothing has been started."""

    exit_code = 2


class DataError(JobError):
    """The data set is missing, damaged, or not what it should be. The message names the file."""


class PeerLostError(JobError):
    """Another rank failed or cannot be reached, so that this one cannot go on. That rank's message has the cause."""

    def __init__(self, message: str = "stopped, because another rank failed; its message says why") -> None:
        super().__init__(message)


class CheckpointError(JobError):
    """A checkpoint cannot be written, or none can be gone on from. The message names the folder."""


class DivergedError(JobError):
    """The loss or the gradient is no longer a finite number. The message names the step."""


class Preempted(JobError):
    """Asked to stop, and stopped: a checkpoint is written, and the same command goes on from it."""

    exit_code = 75
