"""What SyncBatchNorm costs: ``make bench``, about a minute.

Step time of the tutorial's network on 2 ranks with 128 samples each, with MXNet's BatchNorm, of each rank on its own,
and with SyncBatchNorm. The two take turns step by step in one process, so that whatever else the machine does meets
both; what counts is the ratio of their medians, not the milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from job.placement import placement, share_cores

share_cores()

import mxnet as mx
import numpy as np

from benchmarks.runs import ROOT
from job import data, models
from job.comm import Comm, connect
from job.config import load_config
from job.device import choose_device, seed_everything
from job.sampler import Sampler
from job.steps import Feed, Learner
from job.sync_batch_norm import convert_sync_batch_norm

WARMUP, STEPS = 10, 100
RANKS = 2
CONTROLLERS = {"Gloo": ["--gloo"], "MPI": ["--mpi", "--mpi-args=--mca mpi_yield_when_idle 1"]}


def main() -> None:
    """Without a launcher start the measurement once per controller; as a rank, measure."""
    if placement().size > 1:
        comm = connect(60.0)
        _measure(comm)
        comm.close()
        return
    print(f"{RANKS} ranks x 128, {STEPS} steps each, alternating: medians in ms, and quartiles of the pairs' ratios")
    print(
        "| controller | BatchNorm of each rank | SyncBatchNorm | ratio of medians | quartiles |\n|---|---|---|---|---|"
    )
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for name, options in CONTROLLERS.items():
        launcher = ["horovodrun", "--disable-cache", *options, "-np", str(RANKS), sys.executable]
        done = subprocess.run(
            [*launcher, "-m", "benchmarks.step_time"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        row = next((line.split("row:")[1] for line in done.stdout.splitlines() if "row:" in line), None)
        if row is None:
            raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        print(f"| {name} {row}", flush=True)


def _measure(comm: Comm) -> None:
    config = load_config()
    train_set = data.load(config.data).train
    sampler = Sampler(len(train_set.labels), config.data.global_batch_of(comm.size), seed=0)
    learners = [_learner(comm, synchronized) for synchronized in (False, True)]
    seconds: list[list[float]] = [[], []]
    for step in range(WARMUP + STEPS):
        share = sampler.share(0, step, comm.rank, comm.size)
        for learner, times in zip(learners, seconds):
            comm.barrier()
            started = time.perf_counter()
            learner.step(train_set, [share], len(sampler.batch(step)), learning_rate=0.01)
            mx.nd.waitall()
            times.append(time.perf_counter() - started)
        if step % 10 == 0:
            for learner in learners:
                learner.meter.reduce()
    local, synchronized = (np.array(times[WARMUP:]) * 1e3 for times in seconds)
    medians = np.median(local), np.median(synchronized)
    low, high = np.percentile(synchronized / local, [25, 75])
    if comm.rank == 0:
        ratio = medians[1] / medians[0]
        print(f"row:| {medians[0]:.1f} | {medians[1]:.1f} | {ratio:.3f} | {low:.2f} to {high:.2f} |", flush=True)


def _learner(comm: Comm, synchronized: bool) -> Learner:
    config = load_config()
    ctx = choose_device("auto", comm)
    seed_everything(0)
    net = models.build(config.model)
    if synchronized:
        convert_sync_batch_norm(net, comm)
    models.initialize(net, ctx)
    return Learner(net, comm, Feed(ctx, "float32"), config.train, config.optimizer)


if __name__ == "__main__":
    main()
