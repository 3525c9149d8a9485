"""Learning: every step against the same step worked out apart from it, in numpy's float64 wherever that can be done.

Most of it is done on softmax regression, whose gradient is one line of numpy. MXNet hands rates and factors to its
update rules in float32, whatever the weights are, so they are sums of few powers of two here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from job.config import ModelConfig, OptimizerConfig, TrainConfig
from job.data.idx import Split
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.networks import models
from job.training.learner import Feed, Learner, cross_entropy

CPU = mx.cpu()
Weights = tuple[np.ndarray, np.ndarray]  # (10, 784) and (10,)


class Rank(Comm):
    """One of several ranks, of which the others are silent; remembers the gradients that it would have summed."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.gradients: list[np.ndarray] = []

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        self.gradients = [array.asnumpy() for array in arrays]


def split(samples: int, seed: int = 0) -> Split:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (samples, 28, 28), dtype=np.uint8)
    return Split(images, random.integers(0, 10, samples, dtype=np.uint8))


def pixels(data: Split) -> np.ndarray:
    return data.images.reshape(len(data.labels), 784).astype(np.float64) / 255


def learner(
    net: Optional[gluon.HybridBlock] = None,
    dtype: str = "float64",
    comm: Optional[Comm] = None,
    train: Optional[dict[str, Any]] = None,
    **optimizer: Any,
) -> Learner:
    seed_everything(1)
    net = nn.Dense(10) if net is None else net
    models.initialize(net, CPU, dtype)
    return Learner(net, comm or Comm(), Feed(CPU, dtype), TrainConfig(**(train or {})), OptimizerConfig(**optimizer))


def weights(learner: Learner) -> Weights:
    return learner.net.weight.data().asnumpy(), learner.net.bias.data().asnumpy()


def parameters(learner: Learner) -> list[np.ndarray]:
    return [parameter.data().asnumpy() for parameter in learner.net.collect_params().values()]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def gradient(at: Weights, data: Split, samples: np.ndarray, smoothing: float = 0.0) -> Weights:
    """Of the mean cross-entropy of softmax regression over ``samples``."""
    inputs, labels = pixels(data)[samples], data.labels[samples]
    target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    error = (np.exp(log_softmax(inputs @ at[0].T + at[1])) - target) / len(samples)
    return error.T @ inputs, error.sum(axis=0)


def test_pixels_reach_the_network_between_0_and_1_with_their_own_labels() -> None:
    data = split(20)
    data.images[4, 0, :2] = (0, 255)
    images, labels = Feed(CPU, "float32")(data, np.array([4, 19, 0]))
    assert (images.shape, images.dtype, labels.dtype) == ((3, 1, 28, 28), np.float32, np.float32)
    np.testing.assert_allclose(images.asnumpy().reshape(3, 784), pixels(data)[[4, 19, 0]], rtol=1e-7)
    assert images[0, 0, 0, :2].asnumpy().tolist() == [0, 1]
    assert labels.asnumpy().tolist() == data.labels[[4, 19, 0]].tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_numpys(smoothing: float) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(0, 3, (40, 10)), random.integers(0, 10, 40)
    target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    expected = -(target * log_softmax(logits)).sum(axis=1)
    losses = cross_entropy(mx.nd.array(logits, dtype="float64"), mx.nd.array(labels, dtype="float64"), smoothing)
    np.testing.assert_allclose(losses.asnumpy(), expected, rtol=1e-12)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    losses = cross_entropy(mx.nd.array([[1000, 0], [1000, 0]]), mx.nd.array([0, 1]))
    np.testing.assert_allclose(losses.asnumpy(), [0, 1000], atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_of_sgd_is_numpys(smoothing: float) -> None:
    data, samples = split(30), np.array([3, 1, 4, 15, 9, 26, 5])
    trained = learner(train={"label_smoothing": smoothing})
    (weight, bias) = weights(trained)
    expected = gradient((weight, bias), data, samples, smoothing)
    trained.step(data, [samples], len(samples), learning_rate=0.25)
    np.testing.assert_allclose(weights(trained)[0], weight - 0.25 * expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(weights(trained)[1], bias - 0.25 * expected[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
def test_a_step_of_the_tutorials_network_is_gluons_own(dtype: str, tolerance: float) -> None:
    data, samples = split(16), np.arange(16)
    trained = learner(models.build(ModelConfig(name="tutorial_without_batch_norm")), dtype)
    plain = models.build(ModelConfig(name="tutorial_without_batch_norm"))
    plain.cast(dtype)
    plain.initialize()
    images = mx.nd.array(data.images[:, None] / 255, dtype=dtype)
    plain(images)
    # Deviation 0.1 and not 0.01, so that the gradient of every layer is far above the tolerance.
    random = np.random.default_rng(2)
    for ours, theirs in zip(trained.net.collect_params().values(), plain.collect_params().values()):
        start = mx.nd.array(random.normal(0, 0.1, ours.shape), dtype=dtype)
        ours.set_data(start)
        theirs.set_data(start)

    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    for _ in range(2):
        with autograd.record():
            mean = loss(plain(images), mx.nd.array(data.labels, dtype=dtype)).mean()
        mean.backward()
        for parameter in plain.collect_params().values():
            assert np.abs(parameter.grad().asnumpy()).max() > 1e-3
            parameter.set_data(parameter.data() - 0.25 * parameter.grad())
        trained.step(data, [samples], 16, learning_rate=0.25)

    for ours, theirs in zip(parameters(trained), plain.collect_params().values()):
        np.testing.assert_allclose(ours, theirs.data().asnumpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sizes", [(10,), (4, 3, 3), (1, 8, 1)])
def test_micro_batches_of_any_sizes_are_one_batch(sizes: tuple[int, ...]) -> None:
    data = split(10)
    trained, numpys = learner(), learner()
    start = weights(numpys)
    expected = gradient(start, data, np.arange(10))
    shares = np.split(np.arange(10), np.cumsum(sizes)[:-1])
    for _ in range(2):  # nothing is left over from one step to the next
        trained.step(data, shares, 10, learning_rate=0.125)
        start = tuple(value - 0.125 * change for value, change in zip(start, expected))
        expected = gradient(start, data, np.arange(10))
    for ours, theirs in zip(weights(trained), start):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("micros", [1, 2])
def test_the_gradients_of_uneven_ranks_add_up_to_that_of_the_global_batch(micros: int) -> None:
    data = split(23)
    ranks = [Rank(rank, 3) for rank in range(3)]
    shares = [np.arange(0, 15), np.arange(15, 20), np.arange(20, 23)]
    start = None
    for comm, share in zip(ranks, shares):
        trained = learner(comm=comm)
        start = weights(trained)
        trained.step(data, np.array_split(share, micros), 23, learning_rate=0.1)
    assert start is not None
    for summed, expected in zip(zip(*(comm.gradients for comm in ranks)), gradient(start, data, np.arange(23))):
        np.testing.assert_allclose(sum(summed), expected, rtol=1e-12, atol=1e-15)


def test_all_ranks_start_from_the_parameters_of_rank_0() -> None:
    class Other(Rank):
        def broadcast_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
            for array in arrays:
                array[:] = 7

    assert all((value == 7).all() for value in parameters(learner(models.build(ModelConfig()), comm=Other(1, 2))))


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
    ],
)
def test_a_gradient_above_the_limit_is_scaled_to_it_as_a_whole(dtype: str) -> None:
    data, samples = split(30), np.arange(30)
    start = weights(learner(dtype=dtype))
    expected = np.concatenate([part.ravel() for part in gradient(start, data, samples)])
    limit = float(np.linalg.norm(expected)) / 4
    trained = learner(dtype=dtype, train={"clip_gradient_norm": limit})
    before = weights(trained)
    trained.step(data, [samples], 30, learning_rate=0.5)
    update = np.concatenate([(old - new).ravel() for old, new in zip(before, weights(trained))]).astype(np.float64)
    assert np.linalg.norm(update) / 0.5 == pytest.approx(limit, rel=1e-4)
    cosine = update @ expected / np.linalg.norm(update) / np.linalg.norm(expected)
    assert cosine == pytest.approx(1, abs=1e-6)  # same direction


def test_a_gradient_below_the_limit_is_left_alone() -> None:
    data, samples = split(30), np.arange(30)
    clipped, free = learner(dtype="float32", train={"clip_gradient_norm": 1e6}), learner(dtype="float32")
    for trained in (clipped, free):
        trained.step(data, [samples], 30, learning_rate=0.5)
    for ours, theirs in zip(weights(clipped), weights(free)):
        np.testing.assert_array_equal(ours, theirs)


def test_the_limit_holds_for_the_sum_over_micro_batches() -> None:
    data, samples = split(30), np.arange(30)
    train = {"clip_gradient_norm": 0.05}
    whole, parts = learner(dtype="float32", train=train), learner(dtype="float32", train=train)
    whole.step(data, [samples], 30, learning_rate=0.5)
    parts.step(data, np.array_split(samples, 4), 30, learning_rate=0.5)
    for ours, theirs in zip(weights(whole), weights(parts)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weight_decay_is_for_weights_alone(name: str) -> None:
    data, samples = split(8), np.arange(8)
    moved = []
    for decay in (0.0, 0.5):
        trained = learner(models.build(ModelConfig(dense_batch_norm=True)), name=name, weight_decay=decay)
        random = np.random.default_rng(3)  # biases and shifts away from 0, where decay would not show
        for parameter in trained.net.collect_params().values():
            parameter.set_data(mx.nd.array(random.uniform(0.1, 0.5, parameter.shape), dtype="float64"))
        trained.step(data, [samples], 8, learning_rate=0.5)
        moved.append(parameters(trained))
    decayed = [not np.array_equal(*pair) for pair in zip(*moved)]
    names = list(trained.net.collect_params())
    assert decayed == [name.endswith("weight") for name in names]
    assert (sum(decayed), len(names)) == (4, 20)


def after_steps(
    optimizer: dict[str, Any], rule: Callable[..., np.ndarray], rates: Sequence[float], tolerance: float = 1e-14
) -> None:
    """Train for some steps on all samples, and compare with ``rule`` applied to numpy's gradients."""
    data, samples = split(12), np.arange(12)
    trained = learner(**optimizer)
    at = [value.copy() for value in weights(trained)]
    memories: list[dict[str, Any]] = [{"m": 0.0, "v": 0.0}, {"m": 0.0, "v": 0.0}]
    decays = (optimizer.get("weight_decay", 0.0), 0.0)
    for step, rate in enumerate(rates, start=1):
        gradients = gradient((at[0], at[1]), data, samples)
        at = [
            value + rule(slope + decay * value, rate, step, memory)
            for value, slope, decay, memory in zip(at, gradients, decays, memories)
        ]
        trained.step(data, [samples], 12, rate)
    for ours, expected in zip(weights(trained), at):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.0625])
def test_sgd_is_numpys(decay: float) -> None:
    after_steps({"weight_decay": decay}, lambda slope, rate, step, memory: -rate * slope, [0.25, 0.25, 0.125])


@pytest.mark.parametrize("decay", [0.0, 0.0625])
def test_momentum_is_numpys(decay: float) -> None:
    def rule(slope: np.ndarray, rate: float, step: int, memory: dict[str, Any]) -> np.ndarray:
        memory["m"] = 0.75 * memory["m"] - rate * slope
        return memory["m"]

    after_steps({"momentum": 0.75, "weight_decay": decay}, rule, [0.25, 0.25, 0.125])


# With decay for one step only: MXNet's rule updates the weight in place before it reads it for the momentum, so that
# from the second step on the decay in the momentum is that of the weight after the step.
@pytest.mark.parametrize(("decay", "rates"), [(0.0, [0.25, 0.25, 0.125]), (0.0625, [0.25])])
def test_nesterovs_momentum_is_numpys(decay: float, rates: list[float]) -> None:
    def rule(slope: np.ndarray, rate: float, step: int, memory: dict[str, Any]) -> np.ndarray:
        memory["m"] = 0.75 * memory["m"] - rate * slope
        return 0.75 * memory["m"] - rate * slope  # as if the velocity had been applied once more (Sutskever, 2013)

    after_steps({"momentum": 0.75, "nesterov": True, "weight_decay": decay}, rule, rates)


@pytest.mark.parametrize("decay", [0.0, 0.0625])
def test_adam_is_numpys(decay: float) -> None:
    def rule(slope: np.ndarray, rate: float, step: int, memory: dict[str, Any]) -> np.ndarray:
        memory["m"] = 0.75 * memory["m"] + 0.25 * slope
        memory["v"] = 0.9375 * memory["v"] + 0.0625 * slope**2
        corrected = rate * np.sqrt(1 - 0.9375**step) / (1 - 0.75**step)  # Kingma and Ba, 2015, end of section 2
        return -corrected * memory["m"] / (np.sqrt(memory["v"]) + 2**-10)

    optimizer = {"name": "adam", "beta1": 0.75, "beta2": 0.9375, "epsilon": 2**-10, "weight_decay": decay}
    after_steps(optimizer, rule, [2**-6, 2**-6, 2**-8], tolerance=1e-8)  # its correction is rounded


def test_training_metrics_are_those_of_the_samples_before_the_step() -> None:
    data = split(20)
    trained = learner()
    weight, bias = weights(trained)
    trained.step(data, [np.arange(7), np.arange(7, 10)], 10, learning_rate=0.1)
    totals = trained.meter.reduce()
    logits = pixels(data)[:10] @ weight.T + bias
    assert totals.count == 10
    assert totals.loss == pytest.approx(-log_softmax(logits)[np.arange(10), data.labels[:10]].mean(), rel=1e-12)
    assert totals.correct == (logits.argmax(axis=1) == data.labels[:10]).sum()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("limit", [None, 0.0625])
def test_the_gradients_norm_is_that_of_the_last_step_before_it_is_clipped(dtype: str, limit: Optional[float]) -> None:
    data = split(30)
    trained = learner(dtype=dtype, train={"clip_gradient_norm": limit})
    for samples in (np.arange(10), np.arange(10, 30)):
        expected = np.concatenate([part.ravel() for part in gradient(weights(trained), data, samples)])
        trained.step(data, [samples], len(samples), learning_rate=0.5)
    trained.totals()
    assert np.linalg.norm(expected) > 0.125
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    assert trained.vitals()["gradient_norm"] == pytest.approx(np.linalg.norm(expected), rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", [{"momentum": 0.5}, {"name": "adam", "learning_rate": 0.125}])
def test_the_update_ratio_is_how_far_the_last_step_moved_all_weights_together(
    dtype: str, optimizer: dict[str, Any]
) -> None:
    data = split(30)
    trained = learner(dtype=dtype, **optimizer)
    for _ in range(3):
        before = np.concatenate([value.ravel() for value in weights(trained)]).astype(np.float64)
        trained.step(data, [np.arange(30)], 30, 0.125, False, True)
    after = np.concatenate([value.ravel() for value in weights(trained)]).astype(np.float64)
    trained.totals()
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert trained.vitals()["update_ratio"] == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 1e-12)


def test_measuring_a_step_changes_nothing_of_it() -> None:
    data = split(30)
    watched, alone = learner(dtype="float32"), learner(dtype="float32")
    for step in range(3):
        watched.step(data, [np.arange(30)], 30, 0.5, False, step % 2 == 0)
        alone.step(data, [np.arange(30)], 30, 0.5)
    for ours, theirs in zip(weights(watched), weights(alone)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_that_was_not_measured_has_no_update_ratio() -> None:
    data = split(30)
    trained = learner()
    for measure in (True, False):
        trained.step(data, [np.arange(30)], 30, 0.5, False, measure)
    trained.totals()
    vitals = trained.vitals()
    assert np.isnan(vitals["update_ratio"]) and vitals["pace"]["compute_seconds"][0] > 0


@pytest.mark.parametrize("batch", [1, 7, 10, 23, 500])
def test_evaluation_counts_every_sample_once(batch: int) -> None:
    data = split(23)
    evaluated = learner(train={"label_smoothing": 0.3})  # which is for training only
    evaluated.step(data, [np.arange(8)], 8, learning_rate=0.125)  # to be right about some of them
    weight, bias = weights(evaluated)
    logits = pixels(data) @ weight.T + bias
    totals = evaluated.evaluate(data, batch)
    assert totals.count == 23
    assert totals.loss == pytest.approx(-log_softmax(logits)[np.arange(23), data.labels].mean(), rel=1e-12)
    assert totals.correct == (logits.argmax(axis=1) == data.labels).sum()
    assert 0 < totals.correct < 23
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (data.labels, logits.argmax(axis=1)), 1)
    np.testing.assert_array_equal(totals.confusion, confusion)
    for mistake in totals.mistakes:
        assert (mistake.true, mistake.predicted) == (data.labels[mistake.image], logits[mistake.image].argmax())
        assert mistake.loss == pytest.approx(-log_softmax(logits)[mistake.image, mistake.true], rel=1e-12)
    assert len(totals.mistakes) == 23 - totals.correct


@pytest.mark.parametrize("size", [2, 5, 30], ids=["two ranks", "uneven ranks", "more ranks than samples"])
def test_the_ranks_evaluate_every_sample_once_between_them(size: int) -> None:
    data = split(23)
    whole = learner().evaluate(data, 500)
    parts = [learner(comm=Rank(rank, size)).evaluate(data, 4) for rank in range(size)]
    assert sum(part.count for part in parts) == 23
    assert max(part.count for part in parts) - min(part.count for part in parts) <= 1
    assert sum(part.correct for part in parts) == whole.correct
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-12)


def test_evaluation_changes_nothing_and_uses_the_running_statistics() -> None:
    data = split(20)
    evaluated = learner(models.build(ModelConfig()))
    for parameter in evaluated.net.collect_params().values():
        parameter.set_data(mx.nd.random.uniform(0.1, 0.5, parameter.shape, dtype="float64"))
    before = parameters(evaluated)
    whole = evaluated.evaluate(data, 20)
    for old, new in zip(before, parameters(evaluated)):
        np.testing.assert_array_equal(old, new)
    # Statistics of the batch would differ from one way of batching to another.
    assert evaluated.evaluate(data, 3).loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
