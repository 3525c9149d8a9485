"""This project: ``python -m benchmarks.peers.ours [key.path=value ...]``, on as many ranks as started it.

An epoch is a whole run of ``job/train.py`` of one epoch in a fresh folder: with TensorBoard, checkpoints, evaluation.
With BENCH_BIND=no the ranks do not stay on their own cores.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from unittest import mock

from job.distributed.placement import share_cores

share_cores()

import mxnet as mx

from benchmarks.peers.turns import MODE, steps, take_turns
from job import memory
from job.config import Config, load_config
from job.data.sampler import own_shards
from job.distributed.comm import connect
from job.distributed.device import choose_device
from job.train import new_learner, open_data, train


def main() -> None:
    """Join the other ranks, then take turns with the other contestants."""
    overrides = sys.argv[1:]
    comm = connect(600.0)  # a turn of the others is a wait too
    with tempfile.TemporaryDirectory() as folder:
        runs = 0

        def fresh() -> Config:
            nonlocal runs
            runs += 1
            config = load_config(overrides=[*overrides, "train.epochs=1", f"run.dir={folder}/{runs}"])
            config.run.dir.mkdir()
            return config

        dataset, sampler, config = open_data(fresh(), comm)
        shards = config.data.shards
        own = own_shards(comm.rank, comm.size, shards)
        moving = os.environ.get("BENCH_BIND") == "no"
        with mock.patch("job.distributed.device.bind") if moving else nullcontext():
            device = choose_device("cpu", comm)
        learner = new_learner(config, comm, device, dataset.about)
        memory.settle()  # as train() does

        def step(number: int) -> None:
            epoch, index = divmod(number, sampler.steps_per_epoch)
            batch = sampler.shards(epoch, index, own, shards)
            learner.step(dataset.train, [batch], len(sampler.batch(index)), config.optimizer.learning_rate)

        turn = steps(step, mx.nd.waitall)

        def warm_up() -> None:
            for _ in range(3):
                turn()

        take_turns(turn if MODE == "step" else lambda: train(fresh(), comm), warm_up, comm.rank, comm.barrier)
        comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()
