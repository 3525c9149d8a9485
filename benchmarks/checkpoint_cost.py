"""What a checkpoint costs: the step time with and without them, alternating, and how long going on takes.

    python -m benchmarks.checkpoint_cost [STRETCHES]

The tutorial's network at its batch of 256 on one process, on data of its shape. One stretch of steps has a checkpoint
begun at its start, the next none, in the order that a coin decides, so that a noisy machine is equally noisy to
both. What a checkpoint adds is the median over neighbouring stretches, with its quartiles.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from job.distributed.placement import share_cores

share_cores()

import mxnet as mx
import numpy as np

from job.checkpoints.state import RunState
from job.checkpoints.store import BackgroundWriter, Store, decode_arrays
from job.config import Config
from job.data.dataset import Split
from job.data.sampler import Shard
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.monitoring.recorder import Recorder
from job.networks import models
from job.training.feed import Feed
from job.training.learner import Learner

BATCH = 256
STRETCH = 5  # steps that are timed together; the checkpoint is begun before the first of them


def build(config: Config) -> tuple[Learner, RunState]:
    """The tutorial's learner, as job/train.py builds it."""
    seed_everything(0)
    net = models.build(config.model)
    models.initialize(net, mx.cpu())
    learner = Learner(net, Comm(), Feed(mx.cpu(), "float32"), config)
    return learner, RunState(learner, Recorder(), 0)


def main(stretches: int) -> None:
    """Measure and print."""
    config = Config.model_validate({"optimizer": {"momentum": 0.9, "learning_rate": 0.01}})
    random = np.random.default_rng(0)
    data = Split(
        random.integers(0, 256, (BATCH * 4, 28, 28), dtype=np.uint8),
        random.integers(0, 10, BATCH * 4, dtype=np.uint8),
    )  # type: ignore[arg-type]
    learner, state = build(config)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    copies = []
    with tempfile.TemporaryDirectory() as folder:
        writer = BackgroundWriter(Store(Path(folder), 2))
        order = [bool(first) ^ second for first in random.integers(0, 2, stretches + 1) for second in (False, True)]
        for stretch, saves in enumerate(order):
            mx.nd.waitall()
            started = time.perf_counter()
            if saves:
                writer.write(learner.steps, *state.state_dict())
                copies.append(time.perf_counter() - started)
            for _ in range(STRETCH):
                parts = np.split(random.permutation(BATCH * 4)[:BATCH], config.data.shards)
                shards = [Shard(part, index * len(part)) for index, part in enumerate(parts)]
                learner.step(data, [shards], BATCH, 0.01)
            mx.nd.waitall()
            if stretch > 1:  # the first of each warm up
                seconds[saves].append(time.perf_counter() - started)
            writer.wait()
        size = sum(file.stat().st_size for file in Store(Path(folder), 2).paths()[0].iterdir())
        resuming = time_to_resume(config, Store(Path(folder), 2))
        writer.close()
    without = statistics.median(seconds[False])
    low, added, high = (1e3 * q for q in statistics.quantiles((b - a for a, b in zip(*seconds.values())), n=4))
    print(f"checkpoint of {size / 1e6:.1f} MB, of the network, its momentum and all else")
    print(f"step without one: {without / STRETCH * 1e3:.1f} ms (median of {stretches} times {STRETCH} steps)")
    print(f"training waits {statistics.median(copies) * 1e3:.1f} ms for the copy; the rest is written beside it")
    print(f"a checkpoint adds {added:.1f} ms in all (quartiles over neighbours: {low:.1f} to {high:.1f})")
    print(f"going on takes {resuming * 1e3:.0f} ms: find, verify and load")


def time_to_resume(config: Config, store: Store) -> float:
    """Seconds from a fresh network to one that has the newest checkpoint's state."""
    import json

    _, state = build(config)
    started = time.perf_counter()
    found = store.newest(print)
    assert found is not None
    state.load_state_dict(decode_arrays(found.arrays), json.loads(found.state))
    mx.nd.waitall()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
