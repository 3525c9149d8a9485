"""The tutorial's network: shapes, sizes and initial weights worked out by hand."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn

from job.config import ModelConfig
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.networks import models
from job.networks.kernels import host_view
from job.networks.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

# Output of each layer for (N, 1, 28, 28): 28 - 5 + 1 = 24, / 2 = 12, 12 - 3 + 1 = 10, / 2 = 5, 50 * 5 * 5 = 1250.
LAYERS = [
    ("Conv2D", (20, 24, 24)),
    ("BatchNorm", (20, 24, 24)),
    ("Activation", (20, 24, 24)),
    ("MaxPool2D", (20, 12, 12)),
    ("Conv2D", (50, 10, 10)),
    ("BatchNorm", (50, 10, 10)),
    ("Activation", (50, 10, 10)),
    ("MaxPool2D", (50, 5, 5)),
    ("Flatten", (1250,)),
    ("Dense", (128,)),
    ("Activation", (128,)),
    ("Dense", (10,)),
]
WITHOUT = [layer for layer in LAYERS if layer[0] != "BatchNorm"]
EXERCISE = [*LAYERS[:10], ("BatchNorm", (128,)), *LAYERS[10:]]

CONVOLUTIONS = (20 * 1 * 5 * 5 + 20) + (50 * 20 * 3 * 3 + 50)  # 520 + 9,050
DENSE = (1250 * 128 + 128) + (128 * 10 + 10)  # 160,128 + 1,290
NORMALIZED = 2 * (20 + 50)  # scale and shift; as many running means and variances

CASES = {
    "tutorial": (ModelConfig(), LAYERS, CONVOLUTIONS + DENSE + NORMALIZED, NORMALIZED),
    "without BatchNorm": (ModelConfig(name="tutorial_without_batch_norm"), WITHOUT, CONVOLUTIONS + DENSE, 0),
    "dense BatchNorm": (
        ModelConfig(dense_batch_norm=True), EXERCISE, CONVOLUTIONS + DENSE + NORMALIZED + 256, NORMALIZED + 256,
    ),
}  # fmt: skip


def initialized(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> nn.HybridSequential:
    seed_everything(seed)
    net = models.build(config)
    models.initialize(net, mx.cpu(), dtype)
    return net


def numbers(net: nn.HybridSequential, trained: bool) -> int:
    parameters = net.collect_params().values()
    return sum(int(np.prod(p.shape)) for p in parameters if (p.grad_req != "null") == trained)


@pytest.mark.parametrize("case", CASES)
def test_each_layer_has_the_shape_worked_out_by_hand(case: str) -> None:
    config, expected, _, _ = CASES[case]
    value = mx.nd.ones((3, 1, 28, 28))
    seen = []
    for layer in initialized(config):
        value = layer(value)
        seen.append((type(layer).__name__, value.shape))
    assert seen == [(kind, (3, *shape)) for kind, shape in expected]


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_parameters_is_that_worked_out_by_hand(case: str) -> None:
    config, _, trained, running = CASES[case]
    net = initialized(config)
    assert (numbers(net, trained=True), numbers(net, trained=False)) == (trained, running)


def test_the_tutorials_network_has_171128_trained_parameters() -> None:
    assert numbers(initialized(ModelConfig()), trained=True) == 171_128


def test_activations_and_pooling_are_those_of_the_tutorial() -> None:
    net = models.build(ModelConfig())
    assert {layer._act_type for layer in net if isinstance(layer, nn.Activation)} == {"relu"}
    image = mx.nd.arange(16).reshape((1, 1, 4, 4))
    for pool in (layer for layer in net if isinstance(layer, nn.MaxPool2D)):
        np.testing.assert_array_equal(pool(image).asnumpy(), [[[[5, 7], [13, 15]]]])


def test_the_network_returns_logits_and_no_probabilities() -> None:
    net = initialized(ModelConfig())
    logits = net(mx.nd.random.uniform(shape=(4, 1, 28, 28))).asnumpy()
    assert (logits < 0).any()


def test_weights_are_drawn_from_a_normal_distribution_of_deviation_0_01() -> None:
    parameters = initialized(ModelConfig()).collect_params()
    weights = [p.data().asnumpy().ravel() for name, p in parameters.items() if name.endswith("weight")]
    assert [weight.size for weight in weights] == [500, 9000, 160_000, 1280]
    for weight in weights:
        # Four standard errors of the estimates from so many draws.
        assert weight.std() == pytest.approx(0.01, rel=4 / np.sqrt(2 * weight.size))
        assert weight.mean() == pytest.approx(0, abs=4 * 0.01 / np.sqrt(weight.size))
    largest = np.abs(np.concatenate(weights)).max()
    assert 0.035 < largest < 0.06  # of 170,780 normal draws; a uniform one would end at 0.0173


def test_all_else_starts_at_zero_or_one() -> None:
    starts = {"bias": 0, "gamma": 1, "beta": 0, "running_mean": 0, "running_var": 1}
    seen = set()
    for name, parameter in initialized(ModelConfig()).collect_params().items():
        for ending, start in starts.items():
            if name.endswith(ending):
                seen.add(ending)
                np.testing.assert_array_equal(parameter.data().asnumpy(), start, err_msg=name)
    assert seen == set(starts)


def test_the_same_seed_draws_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> np.ndarray:
        return initialized(ModelConfig(), seed)[0].weight.data().asnumpy()

    np.testing.assert_array_equal(weights(3), weights(3))
    assert not np.array_equal(weights(3), weights(4))


@pytest.mark.parametrize("case", CASES)
def test_float64_reaches_every_parameter_and_the_logits(case: str) -> None:
    net = initialized(CASES[case][0], dtype="float64")
    assert {parameter.data().dtype for parameter in net.collect_params().values()} == {np.float64}
    assert net(mx.nd.ones((2, 1, 28, 28), dtype="float64")).dtype == np.float64


def test_weights_lie_in_memory_as_they_are_read() -> None:
    """Inference on a CPU would have reordered them, and gradients are written next to what is read there."""
    mx.nd.waitall()
    for name, parameter in initialized(ModelConfig()).collect_params().items():
        np.testing.assert_array_equal(host_view(parameter.data()), parameter.data().asnumpy(), err_msg=name)


def test_a_network_that_was_converted_before_is_initialized_and_trains() -> None:
    seed_everything(0)
    net = models.build(ModelConfig())
    assert convert_sync_batch_norm(net, Comm()) == 2
    models.initialize(net, mx.cpu())
    with mx.autograd.record():
        loss = net(mx.nd.random.uniform(shape=(4, 1, 28, 28))).square().sum()
    loss.backward()
    assert all(np.isfinite(p.grad().asnumpy()).all() for p in net.collect_params().values() if p.grad_req != "null")
    assert sum(isinstance(layer, SyncBatchNorm) for layer in net) == 2
    plain = initialized(ModelConfig())
    for converted, own in zip(net.collect_params().values(), plain.collect_params().values()):
        if "running" not in own.name:
            np.testing.assert_array_equal(converted.data().asnumpy(), own.data().asnumpy())  # drawn alike


def test_batches_of_any_size_follow_one_another() -> None:
    net = initialized(ModelConfig())
    image = mx.nd.random.uniform(shape=(1, 1, 28, 28))
    alone = net(image).asnumpy()
    for size in (5, 2, 7):  # compiled for static shapes, which must not be those of an earlier batch
        rows = net(image.repeat(size, axis=0)).asnumpy()
        np.testing.assert_allclose(rows, alone.repeat(size, axis=0), rtol=1e-4, atol=1e-7)
