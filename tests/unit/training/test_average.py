"""The moving average of the weights, against the formula in numpy's float64."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import nn

from job.training.average import Average
from job.training.learner import Learner
from tests.unit.training.test_learner import learner, split, take_step

DECAY = 0.75


def with_batch_norm(**train: Any) -> Learner:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 5, strides=4), nn.BatchNorm(), nn.Dense(10))
    return learner(net, train={"average_decay": DECAY, **train})


def held(learner: Learner) -> dict[str, np.ndarray]:
    return {place: array.data().asnumpy() for place, array in learner.net._collect_params_with_prefix().items()}


def test_it_follows_weights_and_running_statistics_and_forgets_the_first_ones_soon() -> None:
    trained, data = with_batch_norm(), split(30)
    expected = held(trained)
    for n in range(1, 31):
        take_step(trained, data, [np.arange(n % 9, n % 9 + 12)], 0.125)
        decay = min(DECAY, (1 + n) / (10 + n))
        expected = {place: decay * expected[place] + (1 - decay) * now for place, now in held(trained).items()}
    assert trained.average
    found = trained.average.state_dict()
    assert set(found) == set(expected) and "1.running_var" in found
    for place, values in expected.items():
        np.testing.assert_allclose(found[place], values, rtol=1e-12, atol=1e-15, err_msg=place)
        assert not np.allclose(found[place], held(trained)[place], rtol=1e-9, atol=0), place


def test_an_update_that_is_skipped_leaves_it_alone() -> None:
    data = split(12)
    trained = learner(train={"average_decay": DECAY}, run={"on_nonfinite": "skip"})
    take_step(trained, data, [np.arange(12)], 0.125)
    assert trained.average
    before = trained.average.state_dict()
    weight = trained.net.weight.data()
    kept = weight.copy()
    weight[:] = np.nan
    take_step(trained, data, [np.arange(12)], 0.125)
    assert trained.skipped == 1
    assert all(np.array_equal(before[place], now) for place, now in trained.average.state_dict().items())
    weight[:] = kept
    take_step(trained, data, [np.arange(12)], 0.125)
    decay = min(DECAY, 3 / 12)  # the second update
    expected = decay * before["weight"] + (1 - decay) * weight.asnumpy()
    np.testing.assert_allclose(trained.average.state_dict()["weight"], expected, rtol=1e-12)


def test_it_is_evaluated_beside_the_weights_which_stay_as_they_are() -> None:
    trained, data = with_batch_norm(), split(50)
    for n in range(8):
        take_step(trained, data, [np.arange(n, n + 20)], 0.5)
    assert trained.average
    before, averaged = held(trained), trained.average.state_dict()
    last, average = trained.evaluations(data, 20)
    assert average and average.loss != last.loss
    assert all(np.array_equal(before[place], now) for place, now in held(trained).items())
    for place, parameter in trained.net._collect_params_with_prefix().items():
        parameter.data()[:] = averaged[place]
    alone = trained.evaluate(data, 20)
    assert (alone.loss_sum, alone.correct) == (average.loss_sum, average.correct)


def test_a_run_that_had_none_so_far_begins_with_its_weights() -> None:
    net = nn.Dense(2, in_units=2)
    net.initialize(mx.init.One())
    average = Average(net, 0.9)
    net.weight.data()[:] = 5
    average.load_state_dict({})
    assert (average.state_dict()["weight"] == 5).all()


def test_without_a_decay_there_is_none() -> None:
    trained = learner()
    assert trained.average is None and trained.evaluations(split(5), 5)[1] is None
