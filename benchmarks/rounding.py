"""What rounding alone does: ``python -m benchmarks.rounding``, about two minutes on one core.

First the error of one BatchNorm layer, MXNet's and ours, against numpy in float64. Then one process that trains twice
by the tutorial's recipe, the second time with the samples of each shard in another order: mathematically the same run,
so that what differs is how much the recipe amplifies the last bit of a sum.
"""

from __future__ import annotations

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import nn

from job.config import load_config
from job.data import idx
from job.data.sampler import Sampler, Shard
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.networks import models
from job.networks.sync_batch_norm import SyncBatchNorm
from job.training.feed import Feed
from job.training.learner import Learner
from tests.oracles import batch_norm

STEPS = (5, 10, 30, 50)


def main() -> None:
    """Print both tables."""
    print("| BatchNorm of 256x20x24x24 values | y | dx | dgamma |\n|---|---|---|---|")
    generator = np.random.default_rng(0)
    x, dy = (generator.normal(mean, 1.0, (256, 20, 24, 24)).astype(np.float32) for mean in (1.0, 1.0))
    for name, layer in (("MXNet's, float32", nn.BatchNorm()), ("SyncBatchNorm, float32", SyncBatchNorm(comm=Comm()))):
        print(f"| {name} | {' | '.join(f'{error:.0e}' for error in _errors(layer, x, dy))} |")

    print("\n| one process, shards reordered | " + " | ".join(f"step {step}" for step in STEPS) + " |")
    print("|---|" + "---|" * len(STEPS))
    for dtype in ("float32", "float64"):
        straight, reordered = (np.array(_losses(dtype, reorder)) for reorder in (False, True))
        difference = np.abs(reordered / straight - 1)
        print(f"| {dtype} | " + " | ".join(f"{difference[step - 1]:.0e}" for step in STEPS) + " |")


def _errors(layer: nn.BatchNorm, x: np.ndarray, dy: np.ndarray) -> list[float]:
    layer.initialize()
    inputs = mx.nd.array(x)
    inputs.attach_grad()
    with autograd.record():
        y = layer(inputs)
    y.backward(mx.nd.array(dy))
    exact = batch_norm(x, dy, 1, 1e-5, None, None)
    pairs = ((y, exact.y), (inputs.grad, exact.dx), (layer.gamma.grad(), exact.dgamma))
    return [float(np.abs(actual.asnumpy() - expected).max() / np.abs(expected).max()) for actual, expected in pairs]


def _losses(dtype: str, reorder: bool) -> list[float]:
    config, comm = load_config(), Comm()
    train_set = idx.load(config.data).train
    sampler = Sampler(len(train_set.labels), 256, seed=0)
    seed_everything(0)
    net = models.build(config.model)
    models.initialize(net, mx.cpu(), dtype)
    learner = Learner(net, comm, Feed(mx.cpu(), dtype), config)
    losses = []
    for step in range(max(STEPS)):
        shards = sampler.shards(0, step, range(config.data.shards), config.data.shards)
        shards = [Shard(samples[::-1] if reorder else samples, first) for samples, first in shards]
        learner.step(train_set, [shards], len(sampler.batch(step)), config.optimizer.learning_rate)
        losses.append(learner.totals().loss)
    return losses


if __name__ == "__main__":
    main()
