"""What not every file system offers: locks, and folders that can be brought to the disk.

NFS locks for writing only what is open for writing, and without its lock service nothing at all; SMB, FUSE and the
drives of Windows know no fsync of a folder. A run that would be whole on them must not end for that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import sys
from functools import cache
from pathlib import Path
from typing import IO

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class InUse(Exception):
    """Another process holds the lock. The message names it."""


def lock(file: IO[str]) -> bool:
    """Take the lock of ``file``, which must be open for writing. The kernel frees it when its holder dies.

    Returns whether it is held: not where the file system has no locks, of which the user is warned.

    Raises:
        InUse: another process holds it.
        OSError: the file system fails.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise InUse(file.read().strip() or "another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(
            f"{Path(file.name).parent}: its file system has no locks ({error.strerror}), so nothing keeps two processes"
            " from writing there; see that only one does"
        )
        return False
    return True


def sign(file: IO[str]) -> None:
    """Write into a lock who holds it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def is_signed(file: Path) -> bool:
    """Whether a lock bears what :func:`sign` writes."""
    with open(file, "rb") as stream:
        text = stream.read(400)
    return bool(re.fullmatch(rb"process \d+ on \S*\s*", text))


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` outlive a loss of power.

    Raises:
        OSError: the file system fails. Where it only has no such thing, the user is warned.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        _warn(
            f"{folder}: its file system cannot bring a folder to the disk ({error.strerror}): a loss of power may take"
            " the newest files"
        )
    finally:
        os.close(descriptor)


@cache
def _warn(message: str) -> None:
    """Once, however often it is met."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
