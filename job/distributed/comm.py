"""The collectives: each sums or copies over all ranks, and is the identity for a process on its own.

Nothing else in the project imports Horovod. Sums, not means: ranks may hold different numbers of samples, and only
whoever divides by the global number of samples gets the mean over the global batch.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Optional

import mxnet as mx
import numpy as np

from job.distributed.placement import MEETING, cores, launched, placement
from job.distributed.roll_call import RollCall
from job.distributed.shared_sums import SharedSums, meet
from job.distributed.watchdog import Watchdog, is_orphan, tell
from job.errors import PeerLostError, UsageError

_CYCLE = "HOROVOD_CYCLE_TIME"
_ENOUGH_CORES = 4  # of a rank, to spare one for Horovod
_TIMELINE, _ON_DEMAND = "HOROVOD_TIMELINE", "DYNAMIC"  # Horovod reads the variable when it starts


class Comm:
    """One process on its own."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    blocked_seconds = 0.0  # that threads of this process have waited for sums, since its start

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def fresh_name(self, prefix: str) -> str:
        """A name for a collective that no other has; the same on all ranks, if all ask in the same order."""
        return f"{prefix}.{next(self._numbers)}"

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        """Replace each array, where it is, by its sum over all ranks. Asynchronous, as all MXNet operators are."""

    def broadcast_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        """Replace each array by that of rank 0. Asynchronous."""

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        """The sum over all ranks of a float64, int64 or float16 array, bit for bit the same on all. Waits for it.

        Raises:
            PeerLostError: another rank has failed.
        """
        return values

    def begin_sum(self, values: np.ndarray, name: str) -> Callable[[], np.ndarray]:
        """Begin :meth:`sum`, while this rank goes on. What is returned waits for the result, and raises its errors.

        ``values`` must not change until then, and a name is begun again only after that.
        """
        total = self.sum(values, name)
        return lambda: total

    def subset(self, ranks: Sequence[int]) -> Comm:
        """A communicator of some of the ranks, for :meth:`sum` and :meth:`allreduce_`. All call this, in one order."""
        return self

    def gather_text(self, text: str, name: str) -> list[str]:
        """The text of each rank, in the order of ranks and cut to 500 bytes each. Waits for all."""
        table = np.zeros((self.size, 500))
        encoded = text.encode()[:500]
        table[self.rank, : len(encoded)] = list(encoded)
        return [bytes(row[row > 0].astype(np.uint8)).decode(errors="replace") for row in self.sum(table, name)]

    def broadcast_bytes(self, content: bytes, name: str) -> bytes:
        """What rank 0 passes, on all ranks. Waits for it."""
        return content

    def barrier(self, name: str = "barrier") -> None:
        """Wait until all ranks are here."""
        self.sum(np.zeros(1), name)

    def start_timeline(self, file: Path) -> bool:
        """Have rank 0 write Horovod's timeline to ``file`` from now on; whether that is possible here."""
        return False

    def stop_timeline(self) -> None:
        """Complete the file that :meth:`start_timeline` has begun."""

    def guard(self, what: str, limit_seconds: Optional[float] = None) -> AbstractContextManager[None]:
        """Bound the time that the block may wait for other ranks, by default by the limit of every wait."""
        return nullcontext()

    def close(self) -> None:
        """Leave the job, when all that was started is done and every rank has reached this point."""
        mx.nd.waitall()


class HorovodComm(Comm):
    """The ranks of a Horovod job, or those of one of its process sets.

    Every wait is bounded: after ``timeout_seconds`` the process says what it waited for, and ends with exit code 1.

    Args:
        timeout_seconds: the longest wait for another rank.
        process_set: a ``horovod.mxnet.ProcessSet``; by default all ranks. ``rank`` and ``size`` are those within it.
        timeline: whether :meth:`start_timeline` will be called. It has its price all the time: from the start to the
            end rank 0 has a thread that never sleeps, and ranks of one machine do not sum through shared memory, which
            the timeline could not show.
        subsets: whether :meth:`subset` will be called.
        share_memory: whether ranks sum through memory where all are on one machine, as they do unless they measure
            what Horovod does.
    """

    def __init__(
        self,
        timeout_seconds: float,
        process_set: Any = None,
        timeline: bool = False,
        subsets: bool = False,
        share_memory: bool = True,
    ) -> None:
        import horovod.mxnet as hvd

        super().__init__()
        if timeline:
            os.environ.setdefault(_TIMELINE, _ON_DEMAND)
        together = placement().local_size == placement().size and share_memory and not timeline
        cores_a_rank = cores() // placement().local_size
        os.environ.setdefault(
            _CYCLE, cycle_ms(mx.context.num_gpus() > 0, together, not os.environ.get(MEETING), cores_a_rank)
        )
        if subsets:
            os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
        self._hvd = hvd
        self._entered = 0  # collectives
        self._subsets: dict[tuple[int, ...], Comm] = {}
        self._clock = threading.Lock()  # of blocked_seconds: MXNet's threads sum too
        self._roll_call = RollCall(placement().rank, lambda: self._entered)
        self._watchdog = Watchdog(timeout_seconds, self._expire, is_orphan, self._roll_call.gone)
        if not hvd.is_initialized():
            with self._watchdog.guard(f"rank {placement().rank}: waiting for all {placement().size} ranks to start"):
                hvd.init()
        self._options = {"process_set": process_set or hvd.mpi_ops.global_process_set}
        self._shared: Optional[SharedSums] = None
        self.rank = process_set.rank() if process_set else hvd.rank()
        self.size = process_set.size() if process_set else hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        if not process_set:
            host, port = self._roll_call.address
            self._roll_call.peers = [
                (peer.partition(":")[0], int(peer.partition(":")[2]))
                for peer in self.gather_text(f"{host}:{port}", "addresses")
            ]
            self._roll_call.gone()  # so that they are known to answer
            if together:
                self._shared = meet(self.rank, self.size, partial(self.gather_text, name="shared memory"), self._begin)

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str, process_set: Any = None) -> None:
        # One group: which arrays Horovod would otherwise fuse depends on timing, and with it the order of summation
        # and the last bits of the result.
        options = {"process_set": process_set} if process_set else self._options
        self._entered += not process_set  # of those that all ranks enter
        self._hvd.grouped_allreduce_(list(arrays), average=False, name=name, **options)

    def broadcast_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        # As a sum with zeros: one collective for all arrays. Horovod's broadcasts, one an array, have crashed with a
        # segmentation fault in a rank whose peer had just died. The zeros are negative, to leave a -0.0 its sign.
        if self.rank:
            for array in arrays:
                array[:] = -np.zeros(array.shape, array.dtype)  # of the number -0.0 MXNet makes 0.0
        self.allreduce_(arrays, name)

    def guard(self, what: str, limit_seconds: Optional[float] = None) -> AbstractContextManager[None]:
        return self._watchdog.guard(f"rank {self.rank}: {what}", limit_seconds)

    def start_timeline(self, file: Path) -> bool:
        if os.environ.get(_TIMELINE) != _ON_DEMAND:  # the user has Horovod write one of the whole run
            return False
        self._hvd.start_timeline(str(file))
        return True

    def stop_timeline(self) -> None:
        if os.environ.get(_TIMELINE) == _ON_DEMAND:
            self._hvd.stop_timeline()

    def subset(self, ranks: Sequence[int]) -> Comm:
        if len(ranks) == self.size:
            return self
        key = tuple(ranks)
        if key not in self._subsets:  # Horovod refuses a set that is there already
            self._subsets[key] = _Subset(self, self._hvd.add_process_set(list(ranks)))
        return self._subsets[key]

    def sum(self, values: np.ndarray, name: str, process_set: Any = None) -> np.ndarray:
        return self.begin_sum(values, name, process_set)()

    def begin_sum(self, values: np.ndarray, name: str, process_set: Any = None) -> Callable[[], np.ndarray]:
        self._entered += not process_set  # of those that all ranks enter
        if self._shared and not process_set:
            return partial(self._finish, self._shared.begin(values, name), name)
        return partial(self._finish, self._begin(values, name, process_set), name)

    def _finish(self, result: Callable[[], np.ndarray], name: str) -> np.ndarray:
        with self.guard(f"waiting for the other ranks in {name!r}"), peer_errors():
            started = time.perf_counter()
            total = result()
            with self._clock:
                self.blocked_seconds += time.perf_counter() - started
            return total

    def _begin(self, values: np.ndarray, name: str, process_set: Any = None) -> Callable[[], np.ndarray]:
        options = {"process_set": process_set} if process_set else self._options
        total = mx.nd.array(values, ctx=mx.cpu(), dtype=values.dtype)  # inside an operator the default is its device
        self._hvd.allreduce_(total, average=False, name=name, **options)
        return lambda: np.asarray(total.asnumpy())

    def broadcast_bytes(self, content: bytes, name: str) -> bytes:
        own = len(content) if self.rank == 0 else 0
        size = int(self.sum(np.array([float(own)]), f"{name}.size")[0])
        with self.guard(f"waiting for rank 0 in {name!r}"), peer_errors():
            if size == 0:  # MXNet has no empty arrays
                return b""
            array = mx.nd.array(np.frombuffer(content, np.uint8) if self.rank == 0 else np.zeros(size), dtype="uint8")
            self.allreduce_([array], name)  # zeros on all others
            return bytes(array.asnumpy().tobytes())

    def close(self) -> None:
        self._roll_call.all_stay = False  # whoever has met the others below leaves
        with self.guard("waiting for the other ranks to finish"):
            mx.nd.waitall()
            self.barrier()
            self._hvd.shutdown()
        self._watchdog.close()

    def _expire(self, message: str) -> None:
        tell(message)
        late = self._roll_call.late()
        tell(f"{message}; {late}" if late else "", stacks=False)
        self._roll_call.linger()
        os._exit(1)


class _Subset(Comm):
    """Some of the ranks, for sums. Of a rank that is not among them it is never asked anything."""

    def __init__(self, whole: HorovodComm, process_set: Any) -> None:
        super().__init__()
        self._whole, self._process_set = whole, process_set

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        self._whole.allreduce_(arrays, name, self._process_set)

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        return self._whole.sum(values, name, self._process_set)


def cycle_ms(on_gpu: bool, together: bool, over_mpi: bool, cores_a_rank: int) -> str:
    """How often Horovod is to look for work: once in so many milliseconds, of which a sum waits for half.

    Args:
        on_gpu: whether sums are of arrays on GPUs. Then each of a step is Horovod's, and looks take no core that
            computes. How fast that is was never measured on a GPU; over MPI on a CPU a sum took 0.2 ms at 0.1 ms.
        together: whether ranks have shared memory for what a step sums. Looks only take time from them then.
        over_mpi: and not Gloo, whose looks take more of a core (`make bench` measures both).
        cores_a_rank: on this machine.
    """
    if on_gpu and cores_a_rank >= _ENOUGH_CORES:
        return "0.1"
    if together and not on_gpu:
        return "5"
    return "0.5" if over_mpi else "1"  # Horovod's own is 1


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn what MXNet raises when another rank has failed into :class:`PeerLostError`."""
    try:
        yield
    except mx.MXNetError as error:
        if "Horovod has been shut down" in str(error):
            raise PeerLostError from None
        raise


def connect(timeout_seconds: float, timeline: bool = False, subsets: bool = False, share_memory: bool = True) -> Comm:
    """Join the job that the launcher announced; a process on its own if there was no launcher.

    Raises:
        UsageError: the variables of a rank are there, and no launcher is.
    """
    if not launched():
        raise UsageError(
            f"HOROVOD_RANK and HOROVOD_SIZE say that this is rank {placement().rank} of {placement().size}, but no"
            " launcher started it: unset them, they are left over from another job"
        )
    if placement().size == 1:
        return Comm()
    return HorovodComm(timeout_seconds, None, timeline, subsets, share_memory)
