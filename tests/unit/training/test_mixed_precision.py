"""Training in mixed precision: against numpy's float16, and what an overflow does to a step."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from job.checkpoints.state import Network, Optimizer
from job.config import ModelConfig
from job.errors import DivergedError
from job.networks import models
from job.training import loss_scale
from job.training.learner import Learner
from tests.unit.training.test_learner import (
    gradient,
    learner,
    log_softmax,
    parameters,
    pixels,
    split,
    take_step,
    weights,
)

SAMPLES = np.arange(24)
KINDS = ("weight", "bias", "weight.0", "bias.0")  # with their momentum


def half(*arguments: Any, dtype: str = "float16", **options: Any) -> Learner:
    return learner(*arguments, dtype="float32", model={"dtype": dtype}, **options)


def gradients(trained: Learner) -> list[np.ndarray]:
    return [p.grad().asnumpy() for p in trained.net.collect_params().values() if p.grad_req != "null"]


def with_batch_norm() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Dense(16), nn.BatchNorm(), nn.Activation("relu"), nn.Dropout(0.25), nn.Dense(10))
    return net


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def in_numpy(at: tuple[np.ndarray, np.ndarray], data: Any, scale: float) -> list[np.ndarray]:
    """The gradient of softmax regression on one shard, in float16 where a GPU would have it; all else in float64."""
    inputs = rounded(pixels(data)[SAMPLES].astype(np.float32))
    logits = rounded(inputs @ rounded(at[0]).T + rounded(at[1]))
    error = rounded(scale * (np.exp(log_softmax(logits)) - np.eye(10)[data.labels[SAMPLES]]) / len(SAMPLES))
    return [rounded(error.T @ inputs) / scale, rounded(error.sum(axis=0)) / scale]


def test_a_gradient_is_numpys_in_float16_and_reaches_weights_in_float32() -> None:
    data, trained = split(24), half(shards=1)
    for parameter in trained.net.collect_params().values():
        parameter.set_data(mx.nd.array(np.random.default_rng(0).normal(0, 0.1, parameter.shape)))
    start = weights(trained)
    expected = in_numpy(start, data, 2.0**16)
    take_step(trained, data, [SAMPLES], 0.25)
    for found, values in zip(gradients(trained), expected):
        assert found.dtype == np.float32
        # The last bit of float16 may turn on the order of a sum in float32.
        np.testing.assert_allclose(found, values, rtol=2**-10)
        assert (found == values).mean() > 0.98
    for before, after, slope in zip(start, weights(trained), expected):
        assert after.dtype == np.float32
        np.testing.assert_allclose(after, before - 0.25 * slope, rtol=0, atol=2**-12 * np.abs(slope).max())
    assert not np.array_equal(weights(trained)[0], rounded(weights(trained)[0]))  # masters have more digits


def test_the_scale_saves_gradients_that_float16_has_no_numbers_for() -> None:
    data, found = split(24), {}
    sure = (
        18 * np.eye(10)[data.labels[0]]
    )  # so that the other classes have an error of e^-18, a quarter of the smallest
    other = (data.labels[0] + 1) % 10
    for scale in (1.0, 2.0**16):
        trained = half(shards=1)
        trained.net.bias.data()[:] = sure
        trained._scale.value = scale  # type: ignore[union-attr]
        expected = gradient(weights(trained), data, SAMPLES[:1])[0][other]
        take_step(trained, data, [SAMPLES[:1]], 0.25)
        found[scale] = gradients(trained)[0][other]
    assert 0 < expected.max() < 2.0**-25
    assert not found[1.0].any()
    np.testing.assert_allclose(found[2.0**16], expected, rtol=0.01, atol=1e-12)


def test_a_few_steps_are_those_of_float32_but_for_rounding() -> None:
    data, runs = split(96), {}
    for dtype in ("float32", "float16"):
        trained = half(models.build(ModelConfig(dense_batch_norm=True)), dtype=dtype)
        for samples in np.array_split(np.arange(96), 4):
            take_step(trained, data, [samples], 0.0625)
        runs[dtype] = trained.totals().loss, trained.evaluate(data, 50).loss, parameters(trained)
    assert runs["float16"][:2] == pytest.approx(runs["float32"][:2], rel=0.01)
    differences = [np.abs(ours - theirs).max() for ours, theirs in zip(runs["float16"][2], runs["float32"][2])]
    assert 0 < max(differences) < 0.05


def overflowing(**options: Any) -> Learner:
    """Has taken a step, and whose next one overflows at its scale, and not at half of it."""
    trained = half(with_batch_norm(), momentum=0.5, **options)
    take_step(trained, split(48), [SAMPLES], 0.25)
    largest = max(np.abs(slope).max() for slope in gradients(trained))
    trained._scale.value = 2.0 ** np.ceil(np.log2(65504 / largest) + 4)  # type: ignore[union-attr]
    return trained


def state(trained: Learner) -> dict[str, Any]:
    """Weights, running statistics, momentum, and how often it was updated."""
    return {**Network(trained.net).state_dict(), **Optimizer(trained.net, trained.trainer).state_dict()}


def test_a_step_whose_gradients_overflow_leaves_no_trace_but_a_smaller_scale_until_one_is_good() -> None:
    trained, data = overflowing(), split(48)
    before, first = state(trained), trained._scale.value  # type: ignore[union-attr]
    trained.totals()
    for skipped in range(1, 30):
        take_step(trained, data, [SAMPLES + 24], 0.25, measure=True)
        vitals = trained.vitals()
        if trained.skipped < skipped:
            break
        assert (vitals["loss_scale"], vitals["skipped"]) == (first / 2**skipped, skipped)
        assert np.isnan(vitals["gradient_norm"]) and trained.totals().count == 0
        np.testing.assert_equal(state(trained), before)
    assert skipped > 3 and trained.steps == skipped + 1
    assert vitals["loss_scale"] == first / 2 ** (skipped - 1) and np.isfinite(vitals["gradient_norm"])
    after = state(trained)
    assert after["updates"] == 2 and not any(np.array_equal(after[f"4.{name}"], before[f"4.{name}"]) for name in KINDS)


def test_the_step_after_is_the_same_with_or_without_steps_that_were_skipped_before_it() -> None:
    data = split(48)
    trained, other = overflowing(), overflowing()
    while trained.steps - trained.skipped < 2:
        take_step(trained, data, [SAMPLES + 24], 0.25)
    other._scale.value = trained._scale.value  # type: ignore[union-attr]
    other.load_state_dict({**other.state_dict(), "steps": trained.steps - 1})  # so that Dropout drops the same
    take_step(other, data, [SAMPLES + 24], 0.25)
    np.testing.assert_equal(state(trained), state(other))


def test_at_the_smallest_scale_gradients_that_overflow_end_the_run_as_ever() -> None:
    data, net = split(24), nn.HybridSequential()
    net.add(nn.Dense(4), nn.Dense(10))
    trained = half(net, shards=1)
    trained._scale.value = 4.0  # type: ignore[union-attr]
    first, last = (layer.weight.data() for layer in net)
    first[:] = 0  # all classes are as likely
    last[:] = 60_000
    last[int(data.labels[0])] = -60_000  # what the first layer gets is -108,000
    for skipped in (1, 2):
        take_step(trained, data, [SAMPLES[:1]], 0.25)
        assert trained.skipped == skipped
    with pytest.raises(DivergedError, match=r"^step 3: the gradient is not finite.*or train in model\.dtype=float32$"):
        take_step(trained, data, [SAMPLES[:1]], 0.25)
    assert (trained.skipped, trained.vitals()["loss_scale"]) == (2, loss_scale.SMALLEST)
    assert not first.asnumpy().any()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(on_nonfinite: str) -> None:
    data, trained = split(24), half(run={"on_nonfinite": on_nonfinite})
    trained.net.weight.data()[:] = np.inf
    if on_nonfinite == "stop":
        with pytest.raises(DivergedError, match="the loss and the gradient are not finite"):
            take_step(trained, data, [SAMPLES], 0.25)
    else:
        take_step(trained, data, [SAMPLES], 0.25)
        assert trained.skipped == 1
    assert trained.vitals()["loss_scale"] == loss_scale.FIRST


def test_the_scale_and_its_count_go_on_from_a_checkpoint() -> None:
    data, trained, resumed = split(24), half(), half()
    trained._scale.value = 2.0**9  # type: ignore[union-attr]
    trained._scale._good_steps = loss_scale.GROWTH_INTERVAL - 2  # type: ignore[union-attr]
    take_step(trained, data, [SAMPLES], 0.25)
    resumed.load_state_dict(trained.state_dict())
    assert resumed.vitals()["loss_scale"] == 2.0**9
    take_step(resumed, data, [SAMPLES], 0.25)
    assert resumed.vitals()["loss_scale"] == 2.0**10


def test_a_run_goes_on_in_another_type_if_it_is_asked_to() -> None:
    single, mixed = half(dtype="float32"), half()
    mixed.load_state_dict({**single.state_dict(), "steps": 3})
    assert mixed.vitals()["loss_scale"] == loss_scale.FIRST
    single.load_state_dict({**mixed.state_dict(), "steps": 5})
    assert "loss_scale" not in single.vitals() and single.steps == 5
