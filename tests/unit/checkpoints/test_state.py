"""The one list of what a run's future depends on: what it gives, another process can go on from."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from typing import Any

import mxnet as mx
import numpy as np
import pytest

from job.checkpoints.state import RunState
from job.checkpoints.store import decode_arrays, encode_arrays
from job.config import Config, ModelConfig
from job.data.dataset import Split
from job.data.sampler import Shard
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.errors import CheckpointError, DivergedError
from job.monitoring.recorder import Recorder
from job.networks import models
from job.training.feed import Feed
from job.training.learner import Learner

RANDOM = np.random.default_rng(0)
SHARDS = 3
DATA = Split(RANDOM.integers(0, 256, (60, 28, 28), dtype=np.uint8), RANDOM.integers(0, 10, 60, dtype=np.uint8))


class Broken(Feed):
    """Gives images that are not numbers, as long as it is asked to."""

    broken = False

    def __call__(self, split: Split, samples: Any, *change: Any) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        images, labels = super().__call__(split, samples, *change)
        return (images * np.nan if self.broken else images), labels


PLAIN = ModelConfig()


def build(model: ModelConfig = PLAIN, seed: int = 0, on_nonfinite: str = "stop", **optimizer: Any) -> RunState:
    seed_everything(seed)
    net = models.build(model)
    models.initialize(net, mx.cpu())
    config = {
        "run": {"seed": seed, "on_nonfinite": on_nonfinite},
        "model": model.model_dump(),
        "data": {"shards": SHARDS},
        "optimizer": {"learning_rate": 0.05, **optimizer},
    }
    learner = Learner(net, Comm(), Broken(mx.cpu(), "float32"), Config.model_validate(config))
    return RunState(learner, Recorder(), seed)


def take(state: RunState, steps: int) -> None:
    for step in range(state.learner.steps, state.learner.steps + steps):
        state.learner.step(DATA, [batch(step)], 10, 0.05)


def batch(step: int) -> list[Shard]:
    samples = np.arange(step * 10, step * 10 + 10) % 60
    return [Shard(part, int(part[0] - samples[0])) for part in np.array_split(samples, SHARDS)]


def moved(state: RunState, to: RunState) -> None:
    """Hand a state over as a checkpoint does, through bytes."""
    arrays, values = state.state_dict()
    to.load_state_dict(decode_arrays(encode_arrays(arrays)), json.loads(json.dumps(values)))


OPTIMIZERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"name": "adam", "learning_rate": 0.001},
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("steps", [0, 3])
def test_another_learner_goes_on_bit_for_bit(optimizer: dict[str, Any], steps: int) -> None:
    first, second = build(**optimizer), build(seed=1, **optimizer)
    take(first, steps)
    moved(first, second)
    for state in (first, second):
        take(state, 4)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours[1]["train_metrics"] == theirs[1]["train_metrics"]
    assert ours[1]["progress"] == theirs[1]["progress"] == {"steps": steps + 4, "skipped": 0}
    assert list(ours[0]) == list(theirs[0])
    for name, array in ours[0].items():
        np.testing.assert_array_equal(theirs[0][name], array, err_msg=name)


def test_the_order_of_the_arrays_does_not_depend_on_how_many_networks_there_were_before() -> None:
    orders = set()
    for _ in range(6):  # the numbers in Gluon's names grow, and pass from 9 to 10 if no test has been before
        state = build(ModelConfig(dense_batch_norm=True), momentum=0.9)
        take(state, 1)
        orders.add(tuple(state.state_dict()[0]))
    assert len(orders) == 1


def test_the_running_statistics_are_part_of_it() -> None:
    arrays, _ = build().state_dict()
    assert {"network/1.running_mean", "network/1.running_var", "network/0.weight"} <= set(arrays)


def test_the_generators_go_on_where_they_were() -> None:
    first = build()
    random.random(), np.random.normal()
    state = first.state_dict()
    expected = [random.random(), np.random.normal(), np.random.random()]
    random.seed(9), np.random.seed(9)
    first.load_state_dict(state[0], json.loads(json.dumps(state[1])))
    assert [random.random(), np.random.normal(), np.random.random()] == expected


def test_the_state_is_a_copy() -> None:
    state = build()
    arrays, _ = state.state_dict()
    before = arrays["network/0.weight"].copy()
    take(state, 1)
    state.state_dict()
    np.testing.assert_array_equal(arrays["network/0.weight"], before)


def test_the_state_of_another_network_is_refused_by_the_names_that_differ() -> None:
    with pytest.raises(CheckpointError, match=r"another network or optimizer: .*running_mean"):
        moved(build(ModelConfig(dense_batch_norm=True)), build())


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
def test_numbers_gone_bad_end_the_very_step_that_is_named_and_no_weight_has_moved(optimizer: dict[str, Any]) -> None:
    state = build(**optimizer)
    take(state, 2)
    before = state.state_dict()
    Broken.broken = True
    try:
        with pytest.raises(DivergedError, match=r"^step 3: the gradient is not finite.*on_nonfinite=skip"):
            take(state, 1)
    finally:
        Broken.broken = False
    after = state.state_dict()
    for name, array in before[0].items():
        if "running" not in name:  # forward has moved these, and they go no further: no checkpoint follows
            np.testing.assert_array_equal(after[0][name], array, err_msg=name)
    assert after[1]["optimizer"] == before[1]["optimizer"]
    assert after[1]["train_metrics"] == before[1]["train_metrics"]


def test_numbers_too_large_to_be_summed_are_gone_bad_too() -> None:
    state = build()
    state.learner.net[-1].bias.data()[:] = np.float32(1e30) * np.arange(10)  # the loss is finite, and no use
    with pytest.raises(DivergedError, match=r"^step 1: .* too large to go on with"):
        take(state, 1)


def test_a_variance_too_large_to_be_summed_is_told_as_one() -> None:
    state = build(ModelConfig(sync_batch_norm=False))
    state.learner.net[0].weight.data()[:] *= 1e5
    with pytest.raises(DivergedError, match=r"^step 1: a mean or variance of BatchNorm is not .*more than 87,381"):
        take(state, 1)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
def test_a_skipped_update_leaves_no_trace_but_its_number(optimizer: dict[str, Any]) -> None:
    state = build(on_nonfinite="skip", **optimizer)
    take(state, 2)
    before = state.state_dict()
    Broken.broken = True
    try:
        take(state, 1)
    finally:
        Broken.broken = False
    after = state.state_dict()
    for name, array in before[0].items():
        np.testing.assert_array_equal(after[0][name], array, err_msg=name)
    assert after[1]["progress"] == {"steps": 3, "skipped": 1}
    assert {**after[1], "progress": 0, "records": 0} == {**before[1], "progress": 0, "records": 0}
    take(state, 1)
    assert not np.array_equal(state.state_dict()[0]["network/0.weight"], before[0]["network/0.weight"])


def test_skipping_costs_nothing_in_exactness() -> None:
    careful, plain = build(on_nonfinite="skip"), build()
    for state in (careful, plain):
        take(state, 3)
    for ours, theirs in zip(careful.state_dict()[0].values(), plain.state_dict()[0].values()):
        np.testing.assert_array_equal(ours, theirs)


def test_a_vote_to_stop_is_seen_after_the_same_step() -> None:
    learner = build().learner
    learner.step(DATA, [batch(0)], 10, 0.05)
    assert not learner.stopping
    learner.step(DATA, [batch(1)], 10, 0.05, True)
    assert learner.stopping
    learner.step(DATA, [batch(2)], 10, 0.05)
    assert learner.stopping  # for good


def test_the_hash_of_the_weights_is_that_of_the_network_alone_by_its_documented_definition() -> None:
    state = build()
    take(state, 2)
    arrays, _ = state.state_dict()
    digest = hashlib.sha256()
    for name in sorted(name for name in arrays if name.startswith("network/")):
        values = arrays[name]
        digest.update(f"{name[8:]} float32 {'x'.join(str(length) for length in values.shape)}\n".encode())
        digest.update(struct.pack(f"<{values.size}f", *values.ravel().tolist()))
    assert state.sha256()["weights_sha256"] == digest.hexdigest()
    assert {"network/1.running_mean", "network/0.weight"} <= set(arrays)


def test_the_hash_of_the_weights_is_kept_by_a_checkpoint_and_changed_by_a_step() -> None:
    first, second = build(momentum=0.9), build(seed=1, momentum=0.9)
    take(first, 2)
    assert first.sha256() != second.sha256()
    moved(first, second)
    before = first.sha256()
    assert second.sha256() == before
    for state in (first, second):
        take(state, 1)
    assert first.sha256() == second.sha256() != before
