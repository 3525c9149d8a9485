"""Mixed precision against numpy's float16, on numbers whose products float32 adds up exactly, in any order."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from job.errors import UsageError
from job.networks.mixed_precision import in_float16, output_types

CPU, GPU = mx.cpu(), mx.gpu()
HALF, SINGLE = np.float16, np.float32


def operators(symbol: mx.sym.Symbol) -> dict[str, list[str]]:
    """Of each operator that is no cast the names of the types that it reads, and of the one that it gives."""
    types = output_types(symbol)
    nodes = json.loads(symbol.tojson(remove_amp_cast=False))["nodes"]
    names = [node["name"] for node in nodes]
    return {
        node["op"]: [types[names[source[0]]].__name__ for source in node["inputs"]] + [types[node["name"]].__name__]
        for node in nodes
        if node["op"] not in ("null", "Cast", "amp_cast", "amp_multicast")
    }


def traced(*layers: gluon.HybridBlock) -> mx.sym.Symbol:
    net = nn.HybridSequential()
    net.add(*layers)
    return net(mx.sym.var("data"))


def test_convolutions_and_dense_layers_are_in_float16_and_batch_norms_parameters_are_not() -> None:
    symbol = traced(
        nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation("relu"), nn.MaxPool2D(), nn.Dropout(0.5), nn.Dense(3)
    )
    mixed = in_float16(symbol, GPU)
    assert operators(mixed) == {
        "Convolution": ["float16"] * 4,
        "BatchNorm": ["float16"] + ["float32"] * 4 + ["float16"],
        "Activation": ["float16"] * 2,
        "Pooling": ["float16"] * 2,
        "Dropout": ["float32"] * 2,
        "FullyConnected": ["float16"] * 4,
    }
    assert [mixed.list_arguments(), mixed.list_auxiliary_states()] == [
        symbol.list_arguments(),
        symbol.list_auxiliary_states(),
    ]
    assert mixed.infer_type(**dict.fromkeys(mixed.list_arguments(), "float32"))[1] == [SINGLE]


def test_what_sums_much_or_ranges_far_is_in_float32() -> None:
    data = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=4)
    for operator in (mx.sym.softmax, mx.sym.exp, mx.sym.sum, mx.sym.L2Normalization):
        name, types = list(operators(in_float16(operator(data), GPU)).items())[-1]
        assert types == ["float32"] * 2, name


def test_a_cpu_computes_what_it_has_no_float16_for_in_float32_between_casts() -> None:
    dense = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=4, name="dense")
    mixed = in_float16(mx.sym.relu(mx.sym.dot(dense, dense, transpose_b=True)), CPU)
    assert operators(mixed) == {
        "FullyConnected": ["float32"] * 4,
        "dot": ["float32"] * 3,
        "relu": ["float16"] * 2,
    }
    nodes = json.loads(mixed.tojson(remove_amp_cast=False))["nodes"]
    read_by = {node["op"]: [nodes[source[0]]["name"] for source in node["inputs"]] for node in nodes}
    assert read_by["dot"] == ["dot0_input0_float32", "dot0_input1_float32"]
    assert read_by["relu"] == ["dot0_output0_float16"]


def exact(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Eighths from -4 to 4: their products have few digits, so that sums of hundreds are exact in float32."""
    return (random.integers(-32, 33, shape) / 8).astype(SINGLE)


def test_a_dense_layer_rounds_what_it_reads_what_it_gives_and_its_gradients_to_float16_once() -> None:
    random = np.random.default_rng(0)
    x, weight, bias, dy = (exact(random, *shape) for shape in ((7, 30), (5, 30), (5,), (7, 5)))
    x += SINGLE(2**-13)  # is rounded away
    mixed = in_float16(mx.sym.FullyConnected(mx.sym.var("x"), num_hidden=5, name="dense"), CPU)
    arrays = [mx.nd.array(values) for values in (x, weight, bias)]
    for array in arrays:
        array.attach_grad()
    op = mx.nd.CachedOp(mixed)
    with autograd.record():
        y = op(*arrays)
    y.backward(mx.nd.array(dy))

    near = x.astype(HALF).astype(SINGLE)
    expected = [near @ weight.T + bias, dy @ weight, dy.T @ near, dy.sum(axis=0)]
    assert any((values.astype(HALF) != values).any() for values in expected)  # or nothing would be rounded
    for found, values in zip([y, *(array.grad for array in arrays)], expected):
        assert found.dtype == SINGLE
        np.testing.assert_array_equal(found.asnumpy(), values.astype(HALF).astype(SINGLE))


def test_what_float16_cannot_hold_is_infinite() -> None:
    op = mx.nd.CachedOp(in_float16(mx.sym.FullyConnected(mx.sym.var("x"), num_hidden=1, no_bias=True), CPU))
    x, weight = mx.nd.array([[256.0], [255.0]]), mx.nd.array([[256.0]])
    assert op(x, weight).asnumpy().ravel().tolist() == [np.inf, 65280.0]


def test_layers_with_weights_of_their_own_are_taken() -> None:
    symbol = traced(nn.Conv2D(4, 3), nn.PReLU(), nn.LayerNorm(), nn.GroupNorm(2), nn.InstanceNorm(), nn.Dense(3))
    for ctx in (CPU, GPU):
        in_float16(symbol, ctx)


def test_a_network_that_cannot_be_converted_is_refused_in_one_line() -> None:
    dense = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=4)
    picked = mx.sym.take(dense, mx.sym.zeros((1,)))
    with pytest.raises(UsageError, match=r"^model\.dtype=float16 cannot be had for this network: .*take operator$"):
        in_float16(picked, CPU)
