"""What SyncBatchNorm costs, by each way in which ranks can communicate: ``make bench``, about five minutes.

Step time of the tutorial's network on 2 ranks with 128 samples each, in 4 shards a rank: with statistics of each shard
on its own, which takes no collective, and with those of the global batch. The two take turns in one process, a second
or so each, so that whatever else the machine does meets both; what counts is the ratio, not the milliseconds. Its
interval says what the ratio would have come to if other turns had been drawn: the bootstrap, over pairs of neighbouring
turns (Efron, 1979).

The first way is that of ranks on one machine; the others are those of ranks on several, without a network in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from job.distributed.placement import placement, share_cores

if placement().size > 1:  # not the process that launches the ranks, which would hand all cores on to each of them
    share_cores()

import mxnet as mx
import numpy as np

from benchmarks.intervals import ratio
from benchmarks.runs import as_ranks
from job import memory
from job.config import load_config
from job.data import idx
from job.data.dataset import Split
from job.data.sampler import Sampler, own_shards
from job.distributed.comm import Comm, connect
from job.distributed.device import choose_device, seed_everything
from job.networks import models
from job.training.feed import Feed
from job.training.learner import Learner

WARMUP_TURNS, TURNS, STEPS_A_TURN = 2, 12, 8
RANKS = 2
APART = ["apart"]  # ranks do not use that they are on one machine
WAYS: list[tuple[str, list[str], list[str], dict[str, str]]] = [
    ("shared memory", [], [], {}),
    ("MPI", APART, [], {}),
    ("MPI, cycle of 0.2 ms", APART, [], {"HOROVOD_CYCLE_TIME": "0.2"}),
    ("MPI, cycle of 1 ms", APART, [], {"HOROVOD_CYCLE_TIME": "1"}),
    ("Gloo", APART, ["--gloo"], {}),
    ("Gloo, cycle of 0.5 ms", APART, ["--gloo"], {"HOROVOD_CYCLE_TIME": "0.5"}),
    ("Gloo, cycle of 5 ms", APART, ["--gloo"], {"HOROVOD_CYCLE_TIME": "5"}),
]


def main() -> None:
    """Without a launcher start the measurement once per way; as a rank, measure."""
    if placement().size > 1:
        comm = connect(60.0, share_memory=sys.argv[1:] != APART)
        _measure(comm)
        comm.close()
        return
    print(f"{RANKS} ranks x 128, {TURNS} turns of {STEPS_A_TURN} steps each: median step in ms, ratio of the medians")
    print("| sums by | BatchNorm of each shard | SyncBatchNorm | ratio | 90% interval |\n|---|---|---|---|---|")
    for name, arguments, options, settings in WAYS:
        (row,) = as_ranks("benchmarks.step_time", RANKS, arguments, options, settings)
        print(f"| {name} {row}", flush=True)


def _measure(comm: Comm) -> None:
    config = load_config()
    train_set = idx.load(config.data).train
    learners = [_learner(comm, synchronized) for synchronized in (False, True)]
    step_ms = measure(comm, learners, train_set, config.data.global_batch_of(comm.size), config.data.shards)
    if comm.rank == 0:
        print("row:" + _row(step_ms[WARMUP_TURNS:]), flush=True)


def measure(
    comm: Comm,
    learners: Sequence[Learner],
    split: Split,
    global_batch: int,
    shards: int,
    turns: int = TURNS,
    steps: int = STEPS_A_TURN,
) -> np.ndarray:
    """Milliseconds of a step, (WARMUP_TURNS + turns, learners): the learners take turns of so many ``steps`` each."""
    sampler = Sampler(len(split.labels), global_batch, seed=0)
    own = own_shards(comm.rank, comm.size, shards)
    step_ms = np.empty((WARMUP_TURNS + turns, len(learners)))
    memory.settle()  # as train() does
    for turn in range(WARMUP_TURNS + turns):
        for which, learner in enumerate(learners):
            comm.barrier()
            started = time.perf_counter()
            batches = sampler.batches(range(turn * steps, (turn + 1) * steps), own, shards)
            for step, batch in learner.ahead(batches):
                learner.step(split, batch, len(sampler.batch(step % sampler.steps_per_epoch)), learning_rate=0.01)
            mx.nd.waitall()
            step_ms[turn, which] = (time.perf_counter() - started) / steps * 1e3
    return step_ms


def _row(step_ms: np.ndarray) -> str:
    """Medians and their ratio, from milliseconds (turns, 2) without and with SyncBatchNorm."""
    local, synchronized = np.median(step_ms, axis=0)
    value, low, high = ratio(step_ms[:, 1], step_ms[:, 0])
    return f"| {local:.1f} | {synchronized:.1f} | {value:.3f} | {low:.2f} to {high:.2f} |"


def _learner(comm: Comm, synchronized: bool) -> Learner:
    config = load_config(overrides=[f"model.sync_batch_norm={str(synchronized).lower()}"])
    ctx = choose_device("auto", comm)
    seed_everything(0)
    net = models.build(config.model)
    models.initialize(net, ctx)
    return Learner(net, comm, Feed(ctx, "float32"), config)


if __name__ == "__main__":
    main()
