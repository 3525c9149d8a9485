"""The rewritten graph against the network as its user wrote it, run on the whole batch by MXNet itself in float64."""

from __future__ import annotations

import json
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

from job.distributed.comm import Comm
from job.errors import UsageError
from job.networks.sharded_graph import Dropout, write_sharded
from job.networks.shards import Inference, ShardedNetwork, dropout_mask
from job.operators.fused import RELU, RELU_MAX_POOL
from job.operators.group import Group

SHARDS = 3
SIZES = (3, 2, 2)


def conv(channels: int, **options: Any) -> nn.Conv2D:
    return nn.Conv2D(channels, 3, padding=1, **options)


class Branches(gluon.HybridBlock):
    """BatchNorm in branches that meet, one layer used twice, and an axis at the end."""

    def __init__(self) -> None:
        super().__init__()
        with self.name_scope():
            self.first, self.left, self.right = conv(16), conv(16), conv(16)
            self.norm_left, self.norm_right, self.shared = nn.BatchNorm(), nn.BatchNorm(momentum=0.5), nn.BatchNorm()
            self.last = nn.BatchNorm(axis=-1, epsilon=1e-3)
            self.dense = nn.Dense(4)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        x = self.shared(self.first(x))
        y = F.relu(self.norm_left(self.left(x))) + self.norm_right(self.right(x))
        y = self.last(self.shared(y))
        return self.dense(y)


class TwoOutputs(gluon.HybridBlock):
    def __init__(self) -> None:
        super().__init__()
        with self.name_scope():
            self.conv, self.norm, self.dense = conv(8), nn.BatchNorm(), nn.Dense(4)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        y = self.norm(self.conv(x))
        return self.dense(y), y.mean(axis=(2, 3))


def sequential(*layers: gluon.HybridBlock) -> gluon.HybridBlock:
    net = nn.HybridSequential()
    net.add(*layers)
    return net


NETWORKS = {
    "tutorial's layers": lambda: sequential(
        conv(20), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D(), nn.Dense(4)
    ),
    "oneDNN's blocked layouts": lambda: sequential(conv(64), nn.BatchNorm(), conv(64), nn.BatchNorm(), nn.Dense(4)),
    "relu in the layer": lambda: sequential(conv(16), nn.BatchNormReLU(), nn.Dense(4)),
    "no scale, no center": lambda: sequential(conv(8), nn.BatchNorm(scale=False, center=False), nn.Dense(4)),
    "given statistics": lambda: sequential(conv(8), nn.BatchNorm(use_global_stats=True), nn.Dense(4)),
    "no BatchNorm": lambda: sequential(conv(8), nn.Activation("relu"), nn.Dense(4)),
    "frozen statistics and gamma": lambda: sequential(nn.BatchNorm(gamma_initializer="zeros"), conv(8), nn.Dense(4)),
    "branches, a layer used twice": Branches,
    "two outputs": TwoOutputs,
    "resnet18": lambda: vision.get_resnet(1, 18, thumbnail=True, classes=4),
}
# MXNet's own BatchNorm with ReLU knows no float64.
ORACLES = {
    **NETWORKS,
    "relu in the layer": lambda: sequential(conv(16), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(4)),
}


def build(name: str, dtype: str, networks: Any = NETWORKS) -> gluon.HybridBlock:
    mx.random.seed(3)
    np.random.seed(3)
    net = networks[name]()
    net.initialize(mx.init.Xavier())
    net(mx.nd.zeros((1, 2, 8, 8)))
    net.cast(dtype)
    return net


def sharded(net: gluon.HybridBlock, fuse: bool = False) -> ShardedNetwork:
    """With ``fuse`` convolutions are direct too."""
    outputs = net(mx.sym.var("data"))
    heads = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    loss = sum((head.square().sum() for head in heads[1:]), heads[0].square().sum())
    return ShardedNetwork(net, loss, ["data"], Group(Comm(), range(SHARDS), SHARDS), TAILS if fuse else (), direct=fuse)


def batch() -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, (sum(SIZES), 2, 8, 8))


def shards_of(images: np.ndarray, dtype: str) -> list[dict[str, mx.nd.NDArray]]:
    parts = np.split(images, np.cumsum(SIZES)[:-1])
    return [{"data": mx.nd.array(part, dtype=dtype)} for part in parts]


def gradients_of_shards(net: gluon.HybridBlock, dtype: str, fuse: bool = False) -> tuple[float, dict[str, np.ndarray]]:
    network = sharded(net, fuse)
    with autograd.record():
        losses = [loss for (loss,) in network(shards_of(batch(), dtype))]
    autograd.backward(losses)
    sums = {name: sum(g.asnumpy().astype(np.float64) for g in all_) for name, all_ in network.gradients.items()}
    return sum(float(loss.asscalar()) for loss in losses), sums


def gradients_of_the_whole(net: gluon.HybridBlock, dtype: str) -> tuple[float, dict[str, np.ndarray]]:
    with autograd.record():
        outputs = net(mx.nd.array(batch(), dtype=dtype))
        heads = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        loss = sum((head.square().sum() for head in heads[1:]), heads[0].square().sum())
    loss.backward()
    trained = {p.name: p.grad().asnumpy() for p in net.collect_params().values() if p.grad_req != "null"}
    return float(loss.asscalar()), trained


@pytest.mark.parametrize("fuse", [False, True], ids=["as written", "fused"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_shards_gradients_add_up_to_those_of_the_whole_batch(name: str, fuse: bool) -> None:
    whole, ours = build(name, "float64", ORACLES), build(name, "float64")
    loss, expected = gradients_of_the_whole(whole, "float64")
    got, sums = gradients_of_shards(ours, "float64", fuse)
    assert got == pytest.approx(loss, rel=1e-9)
    renamed = dict(zip((p.name for p in ours.collect_params().values()), whole.collect_params().values()))
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for own, gradient in sums.items():
        np.testing.assert_allclose(gradient, expected[renamed[own].name], rtol=0, atol=1e-8 * largest, err_msg=own)
    for own, other in renamed.items():  # running statistics
        mine = ours.collect_params()[own].data().asnumpy()
        if "batchnorm2" in own and isinstance(ours, Branches):
            continue  # used twice: MXNet updates the running statistics in backward, and so the last use first
        # MXNet keeps momentum as a float32, whatever it multiplies.
        np.testing.assert_allclose(mine, other.data().asnumpy(), rtol=1e-6, atol=1e-10, err_msg=own)


@pytest.mark.parametrize("name", ["tutorial's layers", "oneDNN's blocked layouts", "branches, a layer used twice"])
def test_float32_is_float64_but_for_rounding(name: str) -> None:
    loss, expected = gradients_of_shards(build(name, "float64"), "float64")
    got, sums = gradients_of_shards(build(name, "float32"), "float32")
    assert got == pytest.approx(loss, rel=1e-5)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for gradient, other in zip(sums.values(), expected.values()):
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-4 * largest)


def fused(net: gluon.HybridBlock) -> list[str]:
    """What became part of the BatchNorms of a network, and the ReLU and pooling that are left."""
    net.initialize()
    outputs = net(mx.sym.var("data"))
    symbol = mx.sym.Group(outputs) if isinstance(outputs, (list, tuple)) else outputs
    nodes = json.loads(write_sharded(symbol, 2, Group(Comm(), range(2), 2), TAILS).symbol.tojson())
    return [node.get("attrs", {}).get("tail", node["op"]) for node in nodes["nodes"] if node["op"] in OF_A_TAIL]


TAILS = (RELU, RELU_MAX_POOL)
OF_A_TAIL = ("Custom", "Activation", "relu", "Pooling")
BATCH_NORM_RELU = (nn.BatchNorm, lambda: nn.Activation("relu"))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((*BATCH_NORM_RELU, lambda: nn.MaxPool2D(2, 2)), ["relu+max_pool"]),
        ((nn.BatchNormReLU, lambda: nn.MaxPool2D(2, 2)), ["relu+max_pool"]),
        (BATCH_NORM_RELU, ["relu"]),
        ((*BATCH_NORM_RELU, lambda: nn.MaxPool2D(3, 2)), ["relu", "Pooling", "Pooling"]),
        ((*BATCH_NORM_RELU, lambda: nn.MaxPool2D(2, 1)), ["relu", "Pooling", "Pooling"]),
        ((*BATCH_NORM_RELU, lambda: nn.MaxPool2D(2, 2, padding=1)), ["relu", "Pooling", "Pooling"]),
        ((*BATCH_NORM_RELU, lambda: nn.MaxPool2D(2, 2, ceil_mode=True)), ["relu", "Pooling", "Pooling"]),
        ((*BATCH_NORM_RELU, lambda: nn.AvgPool2D(2, 2)), ["relu", "Pooling", "Pooling"]),
        ((nn.BatchNorm, lambda: nn.Activation("tanh")), ["", "Activation", "Activation"]),
        ((nn.BatchNorm, lambda: nn.MaxPool2D(2, 2)), ["", "Pooling", "Pooling"]),
    ],
)
def test_relu_and_small_max_pooling_become_part_of_a_batch_norm(layers: Any, expected: list[str]) -> None:
    assert fused(sequential(*(layer() for layer in layers))) == expected


class ReadTwice(gluon.HybridBlock):
    """What lies between BatchNorm and pooling is read elsewhere, or is an output."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        with self.name_scope():
            self.norm = nn.BatchNorm()

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        y = self.norm(x)
        z = F.relu(y)
        pooled = F.Pooling(z, kernel=(2, 2), stride=(2, 2), pool_type="max")
        return {"norm": (pooled, y.sum()), "relu": (pooled, z.sum()), "output": (pooled, z)}[self.which]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("norm", ["", *["relu", "Pooling"] * 2]),
        ("relu", ["relu", "Pooling", "Pooling"]),
        ("output", ["relu", "Pooling", "Pooling"]),
    ],
)
def test_what_others_read_stays_an_operator_of_its_own(which: str, expected: list[str]) -> None:
    assert sorted(fused(ReadTwice(which))) == sorted(expected)


def with_dropout(networks: Any) -> dict[str, Any]:
    def of(make: Any) -> Any:
        return lambda: sequential(make(), nn.Dropout(0.5), nn.Dense(3))

    return {name: of(make) for name, make in networks.items() if name != "two outputs"}


@pytest.mark.parametrize("direct", [False, True], ids=["mxnet's operators", "own loops"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("name", with_dropout(NETWORKS))
def test_a_network_that_no_longer_trains_gives_what_mxnet_gives(
    name: str, dtype: str, tolerance: float, direct: bool
) -> None:
    net, oracle = build(name, dtype, with_dropout(NETWORKS)), build(name, "float64", with_dropout(ORACLES))
    inference = Inference(net(mx.sym.var("data")), TAILS if direct else (), direct)
    for turn, images in enumerate((batch(), batch()[:3], batch())):  # other shapes and other weights each time
        for of in (net, oracle):
            random = np.random.default_rng(turn)
            for parameter in of.collect_params().values():
                if parameter.grad_req == "null" or parameter.name.endswith("gamma"):
                    parameter.set_data(mx.nd.array(random.uniform(0.5, 2, parameter.shape), dtype=parameter.dtype))
        inference.load({name: parameter.data() for name, parameter in net.collect_params().items()})
        got = [inference(mx.nd.array(images, dtype=dtype)) for _ in range(2)]
        expected = oracle(mx.nd.array(images, dtype="float64")).asnumpy()
        for output in got:
            np.testing.assert_allclose(output.asnumpy(), expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_the_same_graph_twice_gives_the_same_bits() -> None:
    first, second = (gradients_of_shards(build("resnet18", "float32"), "float32") for _ in range(2))
    assert first[0] == second[0]
    for one, other in zip(first[1].values(), second[1].values()):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("size", "groups"), [(1, SIZES), (2, (SIZES[0] + SIZES[1], SIZES[2]))])
def test_shards_of_a_group_are_normalized_by_the_statistics_of_their_group(size: int, groups: tuple[int, ...]) -> None:
    net = sequential(nn.BatchNorm())
    net.initialize()
    net(mx.nd.zeros((1, 2, 8, 8)))
    group = Group(Comm(), range(SHARDS), SHARDS, size)
    network = ShardedNetwork(net, net(mx.sym.var("data")), ["data"], group)
    with autograd.record():
        outputs = network(shards_of(batch(), "float32"))
    parts = np.split(batch(), np.cumsum(groups)[:-1])
    mean, var = ([part_of(part, axis=(0, 2, 3), keepdims=True) for part in parts] for part_of in (np.mean, np.var))
    expected = [(part - of_mean) / np.sqrt(of_var + 1e-5) for part, of_mean, of_var in zip(parts, mean, var)]
    found = np.concatenate([y.asnumpy() for (y,) in outputs])
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-5)
    (moments,) = group.take_moments("0")
    for k in range(SHARDS):
        np.testing.assert_allclose(moments[k], [mean[k // size].ravel(), var[k // size].ravel()], rtol=1e-5)
    np.testing.assert_array_equal(net[0].running_mean.data().asnumpy(), 0)  # whoever trains updates them


@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (lambda x: mx.sym.random.uniform(shape=(1,)) + x.sum(), "_random_uniform"),
        (lambda x: mx.sym.LeakyReLU(x, act_type="rrelu"), "LeakyReLU"),
        (lambda x: mx.sym.Deconvolution(x, kernel=(3, 3), num_filter=2), "transposed convolution"),
        (lambda x: mx.sym.shuffle(x), "_shuffle"),
        (lambda x: mx.sym.BatchNorm(x, output_mean_var=True)[0], "output_mean_var"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(make: Any, operator: str) -> None:
    group = Group(Comm(), range(2), 2)
    with pytest.raises(UsageError, match=operator):
        write_sharded(make(mx.sym.var("data")), 2, group)


DROPPED = Dropout("mask", ("x", 0), 0.3, ())


def test_a_mask_keeps_its_share_and_the_mean() -> None:
    mask = dropout_mask(DROPPED, (200, 50), first=0, seed=1, step=2, layer=0)
    assert set(np.unique(mask)) == {0.0, 1 / 0.7}
    assert mask.mean() == pytest.approx(1.0, abs=0.02)


def test_a_samples_mask_does_not_depend_on_its_shard() -> None:
    whole = dropout_mask(DROPPED, (10, 3, 5), first=0, seed=1, step=2, layer=4)
    parts = [dropout_mask(DROPPED, (n, 3, 5), first=at, seed=1, step=2, layer=4) for at, n in ((0, 4), (4, 1), (5, 5))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_masks_differ_by_seed_step_layer_and_sample() -> None:
    def mask(**change: int) -> bytes:
        return dropout_mask(DROPPED, (1, 64), **{"first": 0, "seed": 0, "step": 0, "layer": 0, **change}).tobytes()

    masks = {mask(), mask(first=1), mask(seed=1), mask(step=1), mask(layer=1)}
    assert len(masks) == 5


def test_the_shape_of_a_mask_is_known_behind_batch_norm() -> None:
    net = sequential(conv(8), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(4), nn.BatchNorm(), nn.Dropout(0.2))
    net.initialize()
    net(mx.nd.zeros((1, 2, 8, 8)))
    for count in (1, 2):
        network = ShardedNetwork(net, net(mx.sym.var("data")), ["data"], Group(Comm(), range(count), count))
        assert network.mask_shapes(data=(3, 2, 8, 8)) == [(3, 8, 8, 8), (3, 4)]


def test_a_network_with_dropout_multiplies_by_the_masks_that_it_is_given() -> None:
    net = sequential(nn.Dense(6), nn.Dropout(0.5), nn.Dropout(0.5, axes=(1,)))
    net.initialize()
    net(mx.nd.zeros((1, 5)))
    network = ShardedNetwork(net, net(mx.sym.var("data")), ["data"], Group(Comm(), range(1), 1))
    assert network.mask_shapes(data=(3, 5)) == [(3, 6), (3, 1)]
    first, second = (mx.nd.array(np.random.default_rng(k).random(shape)) for k, shape in enumerate([(3, 6), (3, 1)]))
    x = mx.nd.array(np.random.default_rng(9).random((3, 5)))
    masks = {dropout.mask: array for dropout, array in zip(network.graph.dropouts, (first, second))}
    with autograd.record():
        [[y]] = network([{"data": x, **masks}])
    expected = net[0](x).asnumpy() * first.asnumpy() * second.asnumpy()
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=1e-6)
