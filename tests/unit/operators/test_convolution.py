"""Direct convolution against its definition in plain numpy and float64, and which convolutions become one."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn
from numpy.lib.stride_tricks import sliding_window_view

from job.distributed.comm import Comm
from job.networks.sharded_graph import write_sharded
from job.operators import convolution_loops
from job.operators.convolution import DIRECT
from job.operators.group import Group
from tests.oracles import assert_within


class Case(NamedTuple):
    images: int
    channels: int
    side: tuple[int, int]
    filters: int
    kernel: tuple[int, int]
    pad: tuple[int, int] = (0, 0)


CASES = {
    "the tutorial's first": Case(9, 1, (28, 28), 20, (5, 5)),
    "the tutorial's second": Case(5, 20, (12, 12), 50, (3, 3)),
    "padded": Case(3, 3, (9, 9), 13, (3, 3), (1, 1)),
    "uneven": Case(2, 5, (7, 31), 7, (2, 4), (1, 0)),
    "long rows, and more images than lie side by side": Case(40, 2, (20, 40), 17, (3, 3)),
    "one number": Case(1, 1, (1, 1), 1, (1, 1)),
    "as large as the image": Case(2, 3, (6, 4), 33, (6, 4)),
    "more rows of zeros than of pixels": Case(2, 2, (1, 2), 3, (3, 3), (2, 2)),
}


def expected(case: Case, x: Any, weight: Any, bias: Any, dy: Any) -> list[np.ndarray]:
    """Out, dx, dweight and dbias."""
    (up, left), (height, width) = case.pad, case.kernel
    framed = np.pad(x, ((0, 0), (0, 0), (up, up), (left, left)))
    windows = sliding_window_view(framed, case.kernel, axis=(2, 3))  # (n, channels, rows, columns, kernel)
    out = np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]
    dframed = np.zeros_like(framed)
    for i in range(height):
        for j in range(width):
            rows, columns = slice(i, i + out.shape[2]), slice(j, j + out.shape[3])
            dframed[:, :, rows, columns] += np.einsum("nohw,oc->nchw", dy, weight[:, :, i, j])
    dx = dframed[:, :, up : up + x.shape[2], left : left + x.shape[3]]
    return [out, dx, np.einsum("nohw,nchwij->ocij", dy, windows), dy.sum((0, 2, 3))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_definition(name: str, dtype: str, tolerance: float) -> None:
    case = CASES[name]
    random = np.random.default_rng(0)
    x = random.normal(size=(case.images, case.channels, *case.side)).astype(dtype)
    weight = random.normal(size=(case.filters, case.channels, *case.kernel)).astype(dtype)
    bias = random.normal(size=case.filters).astype(dtype)
    sides = (side + 2 * around - length + 1 for side, around, length in zip(case.side, case.pad, case.kernel))
    dy = random.normal(size=(case.images, case.filters, *sides)).astype(dtype)
    found = [np.full_like(array, np.nan) for array in (dy, x, weight, bias)]
    convolution_loops.forward(x, convolution_loops.pack(weight), bias, case.pad, found[0])
    convolution_loops.backward_data(dy, convolution_loops.turn(weight), case.pad, found[1])
    convolution_loops.backward_weight(dy, x, case.pad, found[2])
    convolution_loops.backward_bias(dy, found[3])
    wide = [array.astype(np.float64) for array in (x, weight, bias, dy)]
    for what, own, of_numpy in zip(("out", "dx", "dweight", "dbias"), found, expected(case, *wide)):
        terms = np.sqrt(max(wide[0].size, wide[3].size))  # of random signs, of which a sum may be small
        assert_within(own, of_numpy, tolerance, what, scale=float(terms) if "d" in what else 0.0)


def test_nan_and_infinity_reach_only_what_is_computed_from_them() -> None:
    x = np.ones((2, 1, 6, 6), np.float32)
    x[0, 0, 2, 2], x[1, 0, 5, 5] = np.nan, np.inf
    out = np.empty((2, 3, 5, 5), np.float32)
    weight = np.ones((3, 1, 2, 2), np.float32)
    convolution_loops.forward(x, convolution_loops.pack(weight), np.zeros(3, np.float32), (0, 0), out)
    assert np.isnan(out[0, :, 1:3, 1:3]).all() and np.isnan(out).sum() == 12
    assert np.isinf(out[1, :, 4, 4]).all() and np.isinf(out).sum() == 3


@pytest.mark.parametrize(
    ("layer", "direct"),
    [
        (lambda: nn.Conv2D(20, 5), True),
        (lambda: nn.Conv2D(50, (3, 2), padding=(2, 1), use_bias=False), True),
        (lambda: nn.Conv2D(32, 5), False),
        (lambda: nn.Conv2D(20, 1), False),
        (lambda: nn.Conv2D(20, 3, strides=2), False),
        (lambda: nn.Conv2D(20, 3, dilation=2), False),
        (lambda: nn.Conv2D(20, 3, groups=2), False),
        (lambda: nn.Conv2D(20, 3, padding=3), False),
        (lambda: nn.Conv1D(20, 3), False),
        (lambda: nn.Conv3D(20, 3), False),
    ],
)
def test_only_what_the_loops_compute_and_compute_sooner_is_computed_by_them(layer: Any, direct: bool) -> None:
    net = layer()
    net.initialize()
    written = write_sharded(net(mx.sym.var("data")), 2, Group(Comm(), range(2), 2), direct=True)
    operators = [
        node.get("attrs", {}).get("op_type", node["op"]) for node in json.loads(written.symbol.tojson())["nodes"]
    ]
    assert operators.count(DIRECT) == direct
    assert operators.count("Convolution") == (0 if direct else 2)
