#!/usr/bin/env python
"""Train on one rank, or on many: ``python job/train.py``, ``horovodrun -np 4 python job/train.py``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Optional

if not __package__:  # run as a script: find the package from any directory, and keep job/ itself off the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from job.distributed.search_path import explain_imports
from job.distributed.standby import is_standby, stay_for_horovodrun, wait_for_rank

if __name__ == "__main__":
    explain_imports()
    stay_for_horovodrun()

from job import command
from job.cli import parse, require_samples, settle_shards
from job.distributed.placement import enforce_determinism, placement, share_cores
from job.quick_import import quicken

if __name__ == "__main__":
    share_cores()  # before MXNet is imported
    quicken(onnx=False)
    # Whoever has made a mistake need not wait for all that follows.
    asked = None if is_standby() else command.attempt(parse)
    if asked and asked.run.deterministic:
        enforce_determinism(tensor_cores=asked.model.dtype == "float16")  # before MXNet is imported, too

from mxnet import Context
from mxnet.gluon import HybridBlock

from job import memory, run_dir
from job.checkpoints.resume import goes_on, open_checkpoints
from job.checkpoints.state import RunState
from job.config import Config
from job.data import formats
from job.data.dataset import Dataset, Description
from job.data.pictures import decoded_ahead
from job.data.sampler import Sampler, hold_out, own_shards
from job.distributed.comm import Comm, connect, peer_errors
from job.distributed.device import choose_device, seed_everything
from job.distributed.preemption import Preemption
from job.errors import Preempted
from job.fitness import preflight
from job.monitoring.profiler import Profiler
from job.monitoring.recorder import Recorder
from job.monitoring.tensorboard import Subject
from job.monitoring.writers import open_writers
from job.networks import models, weights
from job.training.feed import Feed
from job.training.learner import Learner, load_loops
from job.training.schedule import Schedule, peak_learning_rate


def open_data(config: Config, comm: Comm) -> tuple[Dataset, Sampler, Config]:
    """The data, once every node has it; how it is cut into batches; and the configuration with the shards of these."""
    with comm.guard("waiting for every node to have the data", config.data.lock_timeout_seconds):
        dataset = formats.load(config.data)
        conditions = comm.gather_text(preflight.conditions(), "data")  # by which all have it
        preflight.require_same_data(comm.gather_text(" ".join(dataset.digests.values()), "digests of the data"))
    if comm.rank == 0:
        preflight.tell(preflight.compare(conditions))
        print(formats.summary(config.data, dataset), end="", flush=True)
        run_dir.write_whole(config.run.dir / run_dir.DATASET, dataset.about.to_json())
    kept, held = hold_out(dataset.train.labels, config.data.validation_fraction, config.data.validation_seed)
    sampler = Sampler(len(kept), config.data.global_batch_of(comm.size), config.run.seed, kept)
    require_samples(config, comm.size, sampler.smallest_batch)
    return dataset.holding_out(held), sampler, settle_shards(config, comm.size, sampler.smallest_batch, comm.rank == 0)


def new_learner(config: Config, comm: Comm, ctx: Context, about: Description) -> Learner:
    """The network with weights that follow from the seed or are of a file, and its optimizer."""
    seed_everything(config.run.seed)
    net = models.build(config.model, len(about.classes), about.shape)
    models.initialize(net, ctx, config.model.weights_dtype, about.shape)
    if comm.rank == 0 and config.model.weights and not goes_on(config):  # the others receive what rank 0 has
        print(f"model.weights={config.model.weights}: {weights.load(net, config.model.weights)}", flush=True)
    if comm.rank == 0 and config.train.fp16_allreduce:
        print(f"train.fp16_allreduce=true: another number of ranks than {comm.size} gives other bits", flush=True)
    return Learner(net, comm, Feed(ctx, config.model.weights_dtype, about), config)


def train(config: Config, comm: Comm) -> HybridBlock:
    """The whole run, the same on every rank. Returns the trained network, of which all ranks hold the same."""
    ctx = choose_device(config.run.device, comm)
    dataset, sampler, config = open_data(config, comm)
    shards, micros = config.data.shards, config.train.accumulate_steps
    own = own_shards(comm.rank, comm.size, shards)
    total_steps = min(config.train.max_steps or sys.maxsize, config.train.epochs * sampler.steps_per_epoch)
    peak = peak_learning_rate(config.optimizer, comm.size)
    schedule = Schedule(config.schedule, peak, sampler.steps_per_epoch, total_steps)
    learner = new_learner(config, comm, ctx, dataset.about)
    recorder = Recorder(ranks=comm.size)
    state = RunState(learner, recorder, config.run.seed)

    with ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        checkpoints = stack.enter_context(open_checkpoints(config, comm, dataset.digests))
        checkpoints.resume(state)
        subject = Subject(config, learner, dataset)
        on_disk = recorder.on_disk(learner.steps)
        recorder.go_on(stack.enter_context(open_writers(config.run.dir, comm, total_steps, on_disk, subject)))
        profiler = stack.enter_context(Profiler(config, comm, learner))
        memory.settle()
        batches = sampler.batches(range(learner.steps, total_steps), own, shards, micros)
        for step, batch in learner.ahead(decoded_ahead(dataset.train.images, batches)):
            epoch, index = divmod(step, sampler.steps_per_epoch)
            stop = bool(preemption.signal) or checkpoints.failing
            epoch_ends = step + 1 == total_steps or index + 1 == sampler.steps_per_epoch
            logs = epoch_ends or (step + 1) % config.train.log_every_steps == 0
            with profiler.step(step + 1), comm.guard(f"step {step + 1}"):
                learner.step(dataset.train, batch, len(sampler.batch(index)), schedule(step), stop, logs)

            if logs:
                recorder.train(step + 1, epoch, learner.totals(), schedule(step), **learner.vitals())
            if epoch_ends:
                for split, samples in dataset.measured(last=step + 1 == total_steps):
                    found = learner.evaluations(samples, config.data.test_batch_per_rank)
                    recorder.test(step + 1, epoch, *found, split=split)
            checkpoints.keep(state, save=epoch_ends or learner.stopping)
            if learner.stopping:
                checkpoints.finish()
                raise preemption.preempted(comm, step + 1)
        checkpoints.finish()
        recorder.finish(
            ranks=comm.size,
            train_examples_per_epoch=sampler.samples,
            shards=shards,
            sync_batch_norm=config.model.sync_batch_norm,
            **state.sha256(),
            skipped_updates=learner.skipped,
        )
    return learner.net


def main(config: Optional[Config] = None) -> None:
    """Parse, unless that is done, join the other ranks, train, leave together."""
    config = config or parse()
    lock = run_dir.claim(config) if placement().rank == 0 else None  # noqa: F841  (held as long as the process lives)
    groups = config.model.sync_batch_norm_group is not None
    comm = connect(config.run.step_timeout_seconds, timeline=bool(config.run.profiled), subsets=groups)
    with peer_errors():
        try:
            train(config, comm)
        except Preempted:
            comm.close()  # under mpirun a rank that leaves the job otherwise has the others killed
            raise
        comm.close()


if __name__ == "__main__":
    wait_for_rank(prepare=load_loops)
    command.run(lambda: main(asked))
