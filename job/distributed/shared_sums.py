"""Sums over ranks of one machine, through memory that they share.

Horovod looks for work once a cycle, has all ranks agree on what is ready, and then adds up. For the few kilobytes that
a BatchNorm sums in the middle of a step, that is a millisecond for which every rank waits. Here a rank writes its
numbers where the others see them, and wakes those that wait for it.

The memory has no name in any file system: whatever becomes of the ranks, it is gone with the last of them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import platform
import secrets
import threading
from collections.abc import Callable
from typing import Optional

import numpy as np

from job.errors import PeerLostError

# Of what is summed, times the square of the ranks: each of them adds up what all have. Horovod's share that work: with
# 2 and 4 ranks this way was faster up to there, with 8 it was not beyond (`python -m benchmarks.buckets sums`).
_LARGEST_BYTES = 2**28
_LOOK_SECONDS = 0.1  # between two looks at whether a rank that is waited for is alive
_LINE = 64  # bytes that processors exchange as a whole; numbers of two ranks are not in the same
_TOKEN_BYTES = 16
_FUTEX = {"x86_64": 202, "aarch64": 98}  # the number of the system call
_FUTEX_WAIT, _FUTEX_WAKE, _ALL = 0, 1, 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LOOK = _Timespec(0, round(_LOOK_SECONDS * 1e9))

Begin = Callable[[np.ndarray, str], Callable[[], np.ndarray]]  # of a sum; what it returns waits for the result


class SharedSums:
    """The memory that ranks share, and a part of it for each name.

    Args:
        file: the memory, as an open file.
        rank: of this process.
        size: the number of ranks.
        slow: begins a sum over all ranks without shared memory; by it the ranks agree on what lies where.
    """

    def __init__(self, file: int, rank: int, size: int, slow: Begin) -> None:
        self._file, self._rank, self._size, self._slow = file, rank, size, slow
        self._parts: dict[tuple[str, int], _Part] = {}
        self._allocating = threading.Lock()
        self._end = mmap.PAGESIZE  # of what rank 0 has given out; the first page has the token
        fcntl.lockf(file, fcntl.LOCK_EX, 1, rank)  # held as long as this process lives

    def begin(self, values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        """Begin to sum a float64 or int64 array over all ranks, in their order. What is returned waits for the sum.

        Large ones go the slow way, and those of float16, which cannot say where they are to lie.

        A name is begun again only after that. The wait raises :class:`PeerLostError` if another rank has ended.
        """
        if values.nbytes * self._size**2 > _LARGEST_BYTES or values.dtype == np.float16:
            return self._slow(values, name)
        part = self._parts.get((name, values.size))
        if part is None:
            return self._begin_first(values, name)
        part.write(values)
        return lambda: part.total().reshape(values.shape)

    def _begin_first(self, values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        """The first sum of a name goes the slow way, and takes along where its numbers are to lie from now on."""
        start = self._allocate(values.size) if self._rank == 0 else 0
        finish = self._slow(np.append(values, np.array([start], values.dtype)), name)

        def total() -> np.ndarray:
            both = finish()
            memory = mmap.mmap(self._file, _Part.length(self._size, values.size), offset=int(both[-1]))
            self._parts[name, values.size] = _Part(memory, self._rank, self._size, values, self._is_dead)
            return both[:-1].reshape(values.shape)

        return total

    def _allocate(self, numbers: int) -> int:
        with self._allocating:
            start = self._end
            self._end += -(-_Part.length(self._size, numbers) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._file, self._end)
            return start

    def _is_dead(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)  # for the others, who look too
        return True


class _Part:
    """Of one name: for each rank a count of its sums, and its numbers of the last two of them.

    Two, because a rank may be ahead of another by one sum, and not by two: it has begun its second next only when all
    have begun their next, and so have read all of this one.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, like: np.ndarray, is_dead: Callable[[int], bool]
    ) -> None:
        counts = np.frombuffer(memory, np.int32, size * _LINE // 4).reshape(size, -1)
        rows = np.frombuffer(memory, like.dtype, offset=size * _LINE).reshape(2, size, -1)
        self._counts, self._numbers = counts[:, 0], rows[:, :, : like.size]
        self._addresses = [int(counts[peer].ctypes.data) for peer in range(size)]
        self._rank, self._is_dead = rank, is_dead
        self._done = 0

    @staticmethod
    def length(size: int, numbers: int) -> int:
        """Bytes that it takes."""
        return size * _LINE + 2 * size * _padded(8 * numbers)

    def write(self, values: np.ndarray) -> None:
        """Show the others what this rank has."""
        self._done += 1
        self._numbers[self._done % 2, self._rank] = values.ravel()
        self._counts[self._rank] = self._done
        _futex(self._addresses[self._rank], _FUTEX_WAKE, _ALL)

    def total(self) -> np.ndarray:
        """Of what all have written, (n,). Waits for them."""
        for peer in range(len(self._addresses)):
            self._wait_for(peer)
        return functools.reduce(np.add, self._numbers[self._done % 2])

    def _wait_for(self, peer: int) -> None:
        while (seen := int(self._counts[peer])) < self._done:
            if _futex(self._addresses[peer], _FUTEX_WAIT, seen, _LOOK) == errno.ETIMEDOUT and self._is_dead(peer):
                raise PeerLostError


def meet(rank: int, size: int, tell: Callable[[str], list[str]], slow: Begin) -> Optional[SharedSums]:
    """Share memory, if all ranks can; all call this. None if one of them cannot.

    Args:
        rank: of this process.
        size: the number of ranks.
        tell: gathers the text of each rank.
        slow: see :class:`SharedSums`.
    """
    token = secrets.token_bytes(_TOKEN_BYTES)
    file = _made(token) if rank == 0 else None
    where, of_rank_0 = tell(f"/proc/{os.getpid()}/fd/{file} {token.hex()}")[0].split()
    file = file if rank == 0 else _opened(where, of_rank_0)
    fits = file is not None and platform.machine() in _FUTEX
    if slow(np.array([float(fits)]), "memory is shared")()[0] < size or file is None:
        return None
    return SharedSums(file, rank, size, slow)


def _made(token: bytes) -> Optional[int]:
    try:
        file = os.memfd_create("sums of ranks")
        os.write(file, token)
    except OSError:  # a container may forbid it
        return None
    return file


def _opened(where: str, token: str) -> Optional[int]:
    try:
        file = os.open(where, os.O_RDWR | os.O_CLOEXEC)
        if os.pread(file, _TOKEN_BYTES, 0).hex() == token:
            return file
        os.close(file)
    except OSError:  # rank 0 is in another container, or of another user
        pass
    return None


def _futex(address: int, operation: int, value: int, limit: Optional[_Timespec] = None) -> int:
    """Wait while the number at ``address`` is ``value``, or wake who waits there. Returns the error number, or 0."""
    number = _FUTEX[platform.machine()]
    done = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_int(operation),
        ctypes.c_int(value),
        ctypes.byref(limit) if limit else None,
        None,
        ctypes.c_int(0),
    )
    return ctypes.get_errno() if done < 0 else 0


def _padded(count: int) -> int:
    return -(-count // _LINE) * _LINE
