"""What the custom operators share, each of which is one for all shards of a rank."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def write(req: str, target: Any, compute: Callable[[Any], Any]) -> None:
    """Let ``compute`` write into ``target`` as MXNet requests: not at all, over what is there, or added to it."""
    if req == "null":
        return
    before = target.copy() if req == "add" else None
    compute(target)
    if before is not None:
        target += before


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="shards")


def side_by_side(function: Callable[[Any], Any], shards: Iterable[Any]) -> list[Any]:
    """``function`` of each shard, on as many threads as MXNet computes operators with."""
    shards = list(shards)
    threads = min(len(shards), int(os.environ.get("MXNET_CPU_WORKER_NTHREADS") or 1))
    if threads == 1:
        return [function(one) for one in shards]
    try:
        return list(_pool(threads).map(function, shards))
    except RuntimeError:  # a backward that nobody waited for, while the interpreter ends and takes no more work
        return [function(one) for one in shards]
