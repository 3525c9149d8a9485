"""Learning: every step against the same step worked out apart from it, in numpy's float64 wherever that can be done.

Most of it is done on softmax regression, whose gradient is one line of numpy. MXNet hands rates and factors to its
update rules in float32, whatever the weights are, so they are sums of few powers of two here. Every batch is cut into
three shards unless a test says otherwise, so that no test passes by never adding up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from job.config import Config, ModelConfig
from job.data.dataset import Split
from job.data.sampler import Shard, own_shards
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.errors import UsageError
from job.networks import models
from job.operators.kernels import host_view
from job.training.feed import Feed
from job.training.learner import Learner, cross_entropy

CPU = mx.cpu()
Weights = tuple[np.ndarray, np.ndarray]  # (10, 784) and (10,)


class Rank(Comm):
    """One of several ranks, of which the others are silent, or have given ``totals``, in the order of the sums.

    Remembers what it hands over itself, in the same order.
    """

    def __init__(self, rank: int, size: int, totals: Sequence[np.ndarray] = ()) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.handed: list[np.ndarray] = []
        self._totals = list(totals)

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        for array in arrays:
            array[:] = mx.nd.array(self.sum(array.asnumpy(), name), dtype=array.dtype)

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        self.handed.append(values.copy())
        return self._totals.pop(0) if self._totals else values


def summed(ranks: Sequence[Rank]) -> list[np.ndarray]:
    return [np.sum(handed, axis=0) for handed in zip(*(rank.handed for rank in ranks))]


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
    shards: int = 3,
    run: Optional[dict[str, Any]] = None,
    model: Optional[dict[str, Any]] = None,
    augment: Optional[dict[str, Any]] = None,
    **optimizer: Any,
) -> Learner:
    seed_everything(1)
    net = nn.Dense(10) if net is None else net
    models.initialize(net, CPU, dtype)
    config = {
        "data": {"shards": shards, "augment": augment},
        "train": train,
        "optimizer": optimizer,
        "run": run,
        "model": model,
    }
    return Learner(net, comm or Comm(), Feed(CPU, dtype), Config.model_validate(config))


def take_step(
    trained: Learner, data: Split, micros: Sequence[np.ndarray], learning_rate: float, measure: bool = False
) -> None:
    """One step on micro-batches of the given samples, of which the learner has the shards of its rank."""
    comm, shards, first, given = trained.comm, trained._group.shards, 0, []
    for samples in micros:
        cut = []
        for part in np.array_split(samples, shards):
            cut.append(Shard(part, first))
            first += len(part)
        given.append([cut[number] for number in own_shards(comm.rank, comm.size, shards)])
    trained.step(data, given, first, learning_rate, False, measure)


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
    take_step(trained, data, [samples], 0.25)
    np.testing.assert_allclose(weights(trained)[0], weight - 0.25 * expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(weights(trained)[1], bias - 0.25 * expected[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shards", [1, 5, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-13)])
def test_a_step_of_the_tutorials_network_is_gluons_own(dtype: str, tolerance: float, shards: int) -> None:
    data, samples = split(16), np.arange(16)
    trained = learner(models.build(ModelConfig(name="tutorial_without_batch_norm")), dtype, shards=shards)
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
        take_step(trained, data, [samples], 0.25)

    for ours, theirs in zip(parameters(trained), plain.collect_params().values()):
        np.testing.assert_allclose(ours, theirs.data().asnumpy(), rtol=0, atol=tolerance)


# Gluon takes the statistics of a whole batch in one pass over it; so must shards, however many there are.
@pytest.mark.parametrize("shards", [1, 4, 5])
def test_a_step_of_the_network_with_batch_norm_is_gluons_own_of_the_whole_batch(shards: int) -> None:
    data, samples = split(12), np.arange(12)
    config = ModelConfig(dense_batch_norm=True)
    trained = learner(models.build(config), shards=shards)
    plain = models.build(config)
    models.initialize(plain, CPU, "float64")
    random = np.random.default_rng(2)
    for ours, theirs in zip(trained.net.collect_params().values(), plain.collect_params().values()):
        start = mx.nd.array(random.uniform(-0.1, 0.1, ours.shape) + theirs.name.endswith("gamma"), dtype="float64")
        ours.set_data(start)
        theirs.set_data(start)
    begun = parameters(trained)

    images = mx.nd.array(data.images[:, None] / 255, dtype="float64")
    with autograd.record():
        mean = gluon.loss.SoftmaxCrossEntropyLoss()(plain(images), mx.nd.array(data.labels, dtype="float64")).mean()
    mean.backward()
    mx.nd.waitall()  # MXNet's backward writes the running statistics, and reading them does not wait for it
    take_step(trained, data, [samples], 0.25)

    for ours, theirs, start in zip(parameters(trained), plain.collect_params().values(), begun):
        expected, tolerance = theirs.data().asnumpy(), 1e-12
        if theirs.grad_req != "null":
            expected = expected - 0.25 * theirs.grad().asnumpy()
        else:
            assert not np.array_equal(expected, start)  # the running statistics have moved
            tolerance = 1e-6  # MXNet's momentum is a float32, and batches have means of up to 8
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=theirs.name)


@pytest.mark.parametrize("micros", [1, 2])
def test_without_sync_batch_norm_each_shard_is_gluons_own_batch_and_the_running_statistics_follow_their_mean(
    micros: int,
) -> None:
    data, shards = split(12), 3
    config = ModelConfig(dense_batch_norm=True)
    train = {"accumulate_steps": micros}
    trained = learner(models.build(config), train=train, shards=shards, model={"sync_batch_norm": False})
    plain = models.build(config)
    models.initialize(plain, CPU, "float64")
    random = np.random.default_rng(2)
    for ours, theirs in zip(trained.net.collect_params().values(), plain.collect_params().values()):
        start = mx.nd.array(random.uniform(-0.1, 0.1, ours.shape) + theirs.name.endswith("gamma"), dtype="float64")
        ours.set_data(start)
        theirs.set_data(start)
    begun = parameters(trained)

    expected = [value.copy() for value in begun]
    for micro in np.array_split(np.arange(12), micros):
        running = []
        for part in np.array_split(micro, shards):
            for parameter, value in zip(plain.collect_params().values(), begun):
                parameter.set_data(mx.nd.array(value, dtype="float64"))
            with autograd.record():
                logits = plain(mx.nd.array(data.images[part][:, None] / 255, dtype="float64"))
                loss = cross_entropy(logits, mx.nd.array(data.labels[part], dtype="float64")).sum() / 12
            loss.backward()
            mx.nd.waitall()  # MXNet's backward writes the running statistics, and reading them does not wait for it
            running.append([parameter.data().asnumpy() for parameter in plain.collect_params().values()])
            for value, parameter in zip(expected, plain.collect_params().values()):
                if parameter.grad_req != "null":
                    value -= 0.25 * parameter.grad().asnumpy()
        moments = [(np.mean(of_shards, axis=0) - 0.9 * old) / 0.1 for old, of_shards in zip(begun, zip(*running))]
        for value, parameter, moment in zip(expected, plain.collect_params().values(), moments):
            if parameter.grad_req == "null":
                value[:] = 0.9 * value + 0.1 * moment
    take_step(trained, data, np.array_split(np.arange(12), micros), 0.25)

    for ours, theirs, parameter in zip(parameters(trained), expected, plain.collect_params().values()):
        tolerance = 1e-10 if parameter.grad_req != "null" else 1e-6  # MXNet's momentum is a float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=parameter.name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_sync_batch_norm_any_number_of_ranks_has_the_same_bits(dtype: str) -> None:
    data, shares = split(23), [np.arange(12), np.arange(12, 23)]
    options: dict[str, Any] = {
        "dtype": dtype, "shards": 5, "train": {"accumulate_steps": 2}, "model": {"sync_batch_norm": False},
    }  # fmt: skip
    lone = learner(models.build(ModelConfig()), **options)
    take_step(lone, data, shares, 0.1)
    for size in (2, 5):
        ranks = [Rank(rank, size) for rank in range(size)]
        for comm in ranks:
            take_step(learner(models.build(ModelConfig()), comm=comm, **options), data, shares, 0.1)
        trained = learner(models.build(ModelConfig()), comm=Rank(1, size, summed(ranks)), **options)
        take_step(trained, data, shares, 0.1)
        for ours, theirs in zip(parameters(trained), parameters(lone)):
            np.testing.assert_array_equal(ours, theirs)


def with_dropout() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Dropout(0.5), nn.Dense(32, activation="relu"), nn.Dropout(0.25), nn.Dense(10))
    return net


def test_dropout_drops_the_same_of_each_sample_on_any_number_of_ranks_and_goes_on_so_from_any_step() -> None:
    data, samples = split(23), np.arange(23)
    lone = learner(with_dropout(), "float32", shards=5)
    take_step(lone, data, [samples], 0.1)
    first = parameters(lone)
    for size in (2, 5):
        ranks = [Rank(rank, size) for rank in range(size)]
        for comm in ranks:
            take_step(learner(with_dropout(), "float32", comm=comm, shards=5), data, [samples], 0.1)
        trained = learner(with_dropout(), "float32", comm=Rank(1, size, summed(ranks)), shards=5)
        mx.random.seed(size)  # whose draws have no part in it
        take_step(trained, data, [samples], 0.1)
        for ours, theirs in zip(parameters(trained), first):
            np.testing.assert_array_equal(ours, theirs)

    take_step(lone, data, [samples], 0.1)
    resumed = learner(with_dropout(), "float32", shards=5)
    for parameter, value in zip(resumed.net.collect_params().values(), first):
        parameter.set_data(mx.nd.array(value))
    resumed.load_state_dict({"steps": 1, "skipped": 0})
    take_step(resumed, data, [samples], 0.1)
    for ours, theirs in zip(parameters(resumed), parameters(lone)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_a_step_with_dropout_is_numpys_with_the_masks_of_philox(rate: float) -> None:
    data, samples, step = split(12), np.arange(12), 5
    net = nn.HybridSequential()
    net.add(nn.Dropout(rate), nn.Dense(10))
    trained = learner(net, run={"seed": 7})
    trained.load_state_dict({"steps": step, "skipped": 0})
    weight, bias = (value.astype(np.float64) for value in parameters(trained))

    raw = np.random.Philox(key=[7, step << 16]).random_raw(12 * 784).reshape(12, 784)  # of the first Dropout
    keep = raw / 2.0**64 >= rate
    assert abs(keep.mean() - (1 - rate)) < 0.03
    inputs = pixels(data) * keep / (1 - rate)
    error = (np.exp(log_softmax(inputs @ weight.T + bias)) - np.eye(10)[data.labels]) / 12
    take_step(trained, data, [samples], 0.25)
    np.testing.assert_allclose(parameters(trained)[0], weight - 0.25 * error.T @ inputs, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(parameters(trained)[1], bias - 0.25 * error.sum(axis=0), rtol=1e-12, atol=1e-15)


def test_dropout_drops_others_at_the_next_step_and_with_another_seed() -> None:
    data, samples = split(23), np.arange(23)

    def moved(steps: int, seed: int) -> np.ndarray:
        trained = learner(with_dropout(), run={"seed": seed})
        trained.load_state_dict({"steps": steps, "skipped": 0})
        take_step(trained, data, [samples], 0.1)
        return np.concatenate([value.ravel() for value in parameters(trained)])

    assert np.array_equal(moved(0, 0), moved(0, 0))
    assert not np.array_equal(moved(0, 0), moved(1, 0))
    assert not np.array_equal(moved(0, 0), moved(0, 1))


def test_a_network_that_draws_in_other_ways_than_dropout_is_refused_by_the_layer() -> None:
    class Noisy(nn.HybridBlock):
        def hybrid_forward(self, F, x):  # type: ignore[no-untyped-def]
            return x + F.random.normal_like(x, name="noise")

    net = nn.HybridSequential()
    net.add(nn.Flatten(), Noisy(), nn.Dense(10))
    with pytest.raises(UsageError, match=r"noise: the operator _random_normal_like draws random numbers"):
        learner(net)


@pytest.mark.parametrize(("sizes", "shards"), [((10,), 3), ((4, 3, 3), 3), ((1, 8, 1), 1)])
def test_micro_batches_of_any_sizes_are_one_batch(sizes: tuple[int, ...], shards: int) -> None:
    data = split(10)
    train = {"accumulate_steps": len(sizes)}
    trained, numpys = learner(train=train, shards=shards), learner()
    start = weights(numpys)
    expected = gradient(start, data, np.arange(10))
    shares = np.split(np.arange(10), np.cumsum(sizes)[:-1])
    for _ in range(2):  # nothing is left over from one step to the next
        take_step(trained, data, shares, 0.125)
        start = tuple(value - 0.125 * change for value, change in zip(start, expected))
        expected = gradient(start, data, np.arange(10))
    for ours, theirs in zip(weights(trained), start):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("micros", [1, 2])
def test_the_gradients_of_uneven_ranks_add_up_to_that_of_the_global_batch(micros: int, dtype: str) -> None:
    data, samples = split(23), np.arange(23)
    shares = np.array_split(samples, micros)
    options: dict[str, Any] = {"dtype": dtype, "shards": 5, "train": {"accumulate_steps": micros}}
    lone = learner(comm=(alone := Rank(0, 1)), **options)
    start = weights(lone)
    take_step(lone, data, shares, 0.1)
    gradients = [parameter.grad().asnumpy() for parameter in lone.net.collect_params().values()]
    for ours, expected in zip(gradients, gradient(start, data, samples)):
        exact = {"rtol": 1e-12, "atol": 1e-15} if dtype == "float64" else {"rtol": 1e-5, "atol": 3e-7}
        np.testing.assert_allclose(ours, expected, **exact)

    for size in (2, 3, 5):
        ranks = [Rank(rank, size) for rank in range(size)]
        for comm in ranks:
            take_step(learner(comm=comm, **options), data, shares, 0.1)
        (total,) = summed(ranks)
        np.testing.assert_array_equal(total, alone.handed[0])  # integers: not close, but the same
        for rank in range(size):
            trained = learner(comm=Rank(rank, size, [total]), **options)
            take_step(trained, data, shares, 0.1)
            for ours, theirs in zip(weights(trained), weights(lone)):
                np.testing.assert_array_equal(ours, theirs)
            assert trained.vitals()["gradient_norm"] == lone.vitals()["gradient_norm"]
            assert trained.meter.state_dict() == lone.meter.state_dict()


def test_any_ranks_wish_to_stop_is_seen_by_all_after_the_same_step() -> None:
    data, batch = split(6), np.array_split(np.arange(6), 3)
    ranks = [Rank(rank, 3) for rank in range(3)]
    for comm in ranks:
        shard = [Shard(batch[comm.rank], 2 * comm.rank)]
        learner(comm=comm).step(data, [shard], 6, 0.1, stop=comm.rank == 1)
    totals = summed(ranks)
    for rank in range(3):
        told = learner(comm=Rank(rank, 3, totals))
        assert not told.stopping
        told.step(data, [[Shard(batch[rank], 2 * rank)]], 6, 0.1)
        assert told.stopping


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
    take_step(trained, data, [samples], 0.5)
    update = np.concatenate([(old - new).ravel() for old, new in zip(before, weights(trained))]).astype(np.float64)
    assert np.linalg.norm(update) / 0.5 == pytest.approx(limit, rel=1e-4)
    cosine = update @ expected / np.linalg.norm(update) / np.linalg.norm(expected)
    assert cosine == pytest.approx(1, abs=1e-6)  # same direction


def test_a_gradient_below_the_limit_is_left_alone() -> None:
    data, samples = split(30), np.arange(30)
    clipped, free = learner(dtype="float32", train={"clip_gradient_norm": 1e6}), learner(dtype="float32")
    for trained in (clipped, free):
        take_step(trained, data, [samples], 0.5)
    for ours, theirs in zip(weights(clipped), weights(free)):
        np.testing.assert_array_equal(ours, theirs)


def test_the_limit_holds_for_the_sum_over_micro_batches() -> None:
    data, samples = split(30), np.arange(30)
    train = {"clip_gradient_norm": 0.05}
    whole = learner(dtype="float32", train=train)
    parts = learner(dtype="float32", train={**train, "accumulate_steps": 4})
    take_step(whole, data, [samples], 0.5)
    take_step(parts, data, np.array_split(samples, 4), 0.5)
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
        take_step(trained, data, [samples], 0.5)
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
        take_step(trained, data, [samples], rate)
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
    trained = learner(train={"accumulate_steps": 2})
    weight, bias = weights(trained)
    take_step(trained, data, [np.arange(7), np.arange(7, 10)], 0.1)
    totals = trained.totals()
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
        take_step(trained, data, [samples], 0.5)
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
        take_step(trained, data, [np.arange(30)], 0.125, measure=True)
    after = np.concatenate([value.ravel() for value in weights(trained)]).astype(np.float64)
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert trained.vitals()["update_ratio"] == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 1e-12)


def test_a_step_that_was_skipped_has_no_gradient_norm_and_no_update_ratio() -> None:
    data = split(30)
    trained = learner(run={"on_nonfinite": "skip"})
    take_step(trained, data, [np.arange(30)], 0.5, measure=True)
    trained.net.weight.data()[:] = np.nan
    take_step(trained, data, [np.arange(30)], 0.5, measure=True)
    vitals = trained.vitals()
    assert (trained.steps, trained.skipped) == (2, 1)
    assert np.isnan(vitals["gradient_norm"]) and np.isnan(vitals["update_ratio"])


def test_measuring_a_step_changes_nothing_of_it() -> None:
    data = split(30)
    watched, alone = learner(dtype="float32"), learner(dtype="float32")
    for step in range(3):
        take_step(watched, data, [np.arange(30)], 0.5, measure=step % 2 == 0)
        take_step(alone, data, [np.arange(30)], 0.5)
    for ours, theirs in zip(weights(watched), weights(alone)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_that_was_not_measured_has_no_update_ratio() -> None:
    data = split(30)
    trained = learner()
    for measure in (True, False):
        take_step(trained, data, [np.arange(30)], 0.5, measure=measure)
    vitals = trained.vitals()
    assert np.isnan(vitals["update_ratio"]) and vitals["pace"]["compute_seconds"][0] > 0


@pytest.mark.parametrize("batch", [1, 7, 10, 23, 500])
def test_evaluation_counts_every_sample_once(batch: int) -> None:
    data = split(23)
    evaluated = learner(train={"label_smoothing": 0.3})  # which is for training only
    take_step(evaluated, data, [np.arange(8)], 0.125)  # to be right about some of them
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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [2, 5, 30], ids=["two ranks", "uneven ranks", "more ranks than samples"])
def test_the_ranks_evaluate_every_sample_once_between_them(size: int, dtype: str) -> None:
    data = split(23)
    net = ModelConfig(name="tutorial_without_batch_norm")
    whole = learner(models.build(net), dtype).evaluate(data, 4)
    ranks = [Rank(rank, size) for rank in range(size)]
    parts = [learner(models.build(net), dtype, comm=comm, shards=size).evaluate(data, 4) for comm in ranks]
    assert sum(part.count for part in parts) == 23
    chunks = [-(-int(part.count) // 4) for part in parts]
    assert max(chunks) - min(chunks) <= 1
    assert sum(part.correct for part in parts) == whole.correct
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-12)
    told = learner(models.build(net), dtype, comm=Rank(size - 1, size, summed(ranks)), shards=size).evaluate(data, 4)
    assert (told.loss_sum, told.correct, told.count) == (whole.loss_sum, whole.correct, whole.count)  # to the bit
    assert told.mistakes == whole.mistakes
    np.testing.assert_array_equal(told.confusion, whole.confusion)


def test_evaluation_changes_nothing_and_uses_the_running_statistics() -> None:
    data = split(20)
    evaluated = learner(models.build(ModelConfig()))
    for parameter in evaluated.net.collect_params().values():
        parameter.set_data(mx.nd.random.uniform(0.1, 0.5, parameter.shape, dtype="float64"))
    before = parameters(evaluated)
    whole = evaluated.evaluate(data, 20)
    assert evaluated.evaluate(data, 20).loss_sum == whole.loss_sum
    for old, new in zip(before, parameters(evaluated)):
        np.testing.assert_array_equal(old, new)
    # Statistics of the batch would differ from one way of batching to another.
    assert evaluated.evaluate(data, 3).loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)


def test_evaluation_leaves_the_weights_where_they_lie_in_memory() -> None:
    """MXNet's inference on a CPU reorders weights where they lie, those of wide convolutions for one."""
    data = split(20)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(32, 3), nn.Conv2D(64, 3), nn.BatchNorm(), nn.Dense(10))
    evaluated = learner(net, "float32")
    mx.nd.waitall()
    arrays = [parameter.data() for parameter in evaluated.net.collect_params().values()]
    memory = [host_view(array) for array in arrays]  # not asked for again: MXNet would put it in order to answer
    before = [view.copy() for view in memory]
    evaluated.evaluate(data, 7)
    mx.nd.waitall()
    for view, values in zip(memory, before):
        np.testing.assert_array_equal(view, values)


@pytest.mark.parametrize(("sync", "count"), [(True, 30), (False, 10)], ids=["all samples", "those of a shard"])
def test_the_running_variance_may_be_the_unbiased_one_of_the_values_that_it_is_of(sync: bool, count: int) -> None:
    moved = []
    for unbiased in (False, True):
        net = nn.HybridSequential()
        net.add(nn.Flatten(), nn.BatchNorm(), nn.Dense(10))
        trained = learner(net, model={"sync_batch_norm": sync, "unbiased_variance": unbiased})
        take_step(trained, split(30), [np.arange(30)], 0.25)
        moved.append(net[1].running_var.data().asnumpy() - 0.9)
    np.testing.assert_allclose(moved[1], moved[0] * count / (count - 1), rtol=1e-9)
