"""What input and augmentation cost of a step: ``python -m benchmarks.augmentation``, about a minute.

Steps of the tutorial's network on one rank, with each kind of augmentation, without any, and with a batch that is at
hand, in turns in one process, so that whatever else the machine does meets them all. What counts is the ratio
(:mod:`benchmarks.intervals`). Beside it the time of the pass over a batch itself, which is too short to be seen in the
steps of a machine that is not quiet.
"""

from __future__ import annotations

import time
from typing import Any

from job.distributed.placement import share_cores

if __name__ == "__main__":
    share_cores()  # before MXNet is imported

import mxnet as mx
import numpy as np

from benchmarks.intervals import ratio
from job.config import load_config
from job.data import idx
from job.data.dataset import Split
from job.data.sampler import Sampler
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.networks import models
from job.training.feed import Feed
from job.training.learner import Learner

WARMUP_TURNS, TURNS, STEPS_A_TURN = 2, 24, 4
AT_HAND = "no input at all, the batch is at hand"
KINDS: dict[str, list[str]] = {
    "none": [],
    AT_HAND: [],
    "horizontal flip": ["data.augment.horizontal_flip=true"],
    "shifted crop": ["data.augment.crop_padding=2"],
    "random erasing": ["data.augment.erase_probability=0.25"],
    "all three": [
        "data.augment.horizontal_flip=true",
        "data.augment.crop_padding=2",
        "data.augment.erase_probability=0.25",
    ],
}


def main() -> None:
    """Measure, and print the table."""
    config = load_config()
    train_set = idx.load(config.data).train
    sampler = Sampler(len(train_set.labels), config.data.global_batch_of(1), seed=0)
    learners = [_learner(overrides) for overrides in KINDS.values()]
    _keep_batch(learners[list(KINDS).index(AT_HAND)])
    step_ms = np.empty((WARMUP_TURNS + TURNS, len(KINDS)))
    for turn in range(WARMUP_TURNS + TURNS):
        for which, learner in enumerate(learners):
            started = time.perf_counter()
            for step in range(turn * STEPS_A_TURN, (turn + 1) * STEPS_A_TURN):
                batch = sampler.shards(0, step, range(config.data.shards), config.data.shards)
                learner.step(train_set, [batch], len(sampler.batch(step)), learning_rate=0.01)
            mx.nd.waitall()
            step_ms[turn, which] = (time.perf_counter() - started) / STEPS_A_TURN * 1e3
    print("| augmentation | its pass in ms | step in ms | ratio of steps | 90% interval |\n|---|---|---|---|---|")
    for which, name in enumerate(KINDS):
        of, to = step_ms[WARMUP_TURNS:, which], step_ms[WARMUP_TURNS:, 0]
        value, low, high = ratio(of, to)
        alone = _pass_ms(learners[which], train_set)
        print(f"| {name} | {alone:.2f} | {np.median(of):.1f} | {value:.3f} | {low:.3f} to {high:.3f} |")


def _pass_ms(learner: Learner, train_set: Split) -> float:
    """The median of as many passes as there were steps, over one batch that is at hand."""
    samples = np.arange(load_config().data.global_batch_of(1))
    images, times = train_set.images[samples], []
    for epoch in range(TURNS * STEPS_A_TURN):
        started = time.perf_counter()
        learner._augment(images, samples, epoch)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def _keep_batch(learner: Learner) -> None:
    """Have it make its first batch, and take that one for all others."""
    make, kept = learner._fed, []

    def fed(*arguments: Any) -> Any:
        kept.extend([] if kept else make(*arguments))
        return kept

    learner._fed = fed  # type: ignore[method-assign]


def _learner(overrides: list[str]) -> Learner:
    config = load_config(overrides=overrides)
    seed_everything(0)
    net = models.build(config.model)
    models.initialize(net, mx.cpu())
    return Learner(net, Comm(), Feed(mx.cpu(), "float32"), config)


if __name__ == "__main__":
    main()
