"""The device path in one process: the GPU's own kernels, run on the CPU, and MXNet's operators, against numpy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mxnet import autograd

from job.distributed.comm import Comm
from job.operators import cuda_kernels, tried_passes
from job.operators.batch_norm import SYNC_BATCH_NORM
from job.operators.fused import RELU
from job.operators.graphs import Graphs
from job.operators.group import Group
from job.operators.queued_batch_norm import QueuedOp
from job.operators.queued_passes import QueuedPasses
from tests.cuda.queued import counted_waits, kernels, queued
from tests.oracles import assert_within, batch_norm

BOTH = pytest.mark.parametrize("kind", ["kernels", "graphs"])
TOLERANCE = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-12}


class Case(NamedTuple):
    """A batch, how it is cut into shards, and the options of the layer."""

    samples: list[int]  # of each shard
    shape: tuple[int, ...]  # of a sample, with its channels on axis - 1
    axis: int
    dtype: str
    offset: float
    momentum: float
    fix_gamma: bool
    unbiased: bool
    relu: bool
    adds: bool  # gradients add up, those of beta are not wanted
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    """One to four shards; few channels or many; planes of one value or thousands, which several blocks share."""
    channels, length = draw(st.integers(1, 6)), draw(st.sampled_from([(), (1,), (2, 5), (37,), (255, 3)]))
    channels = draw(st.sampled_from([channels, 300])) if not length else channels
    last = draw(st.booleans())
    shape = (*length, channels) if last else (channels, *length)
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    return Case(
        samples=draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)),
        shape=shape,
        axis=len(shape) if last else 1,
        dtype=dtype,
        offset=draw(st.sampled_from([0.0, -3.0, 1e4] if dtype == "float32" else [0.0, -3.0])),
        momentum=draw(st.sampled_from([0.0, 0.9])),
        fix_gamma=draw(st.booleans()),
        unbiased=draw(st.booleans()),
        relu=draw(st.booleans()),
        adds=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


class Layer(NamedTuple):
    """The operator with its arrays: of each shard data, gamma and beta, which have gradients; running statistics."""

    group: Group
    xs: list[Any]
    gammas: list[Any]
    betas: list[Any]
    running: list[Any]

    def __call__(self, **options: Any) -> list[Any]:
        arrays = [*self.xs, *self.gammas, *self.betas, *self.running]
        named = {"op_type": SYNC_BATCH_NORM, "group": self.group.key, "layer": "0", "shards": str(len(self.xs))}
        found = mx.nd.Custom(*arrays, **named, **{name: str(value) for name, value in options.items()})
        return found if isinstance(found, list) else [found]


def layer_of(
    xs: list[np.ndarray], gamma: np.ndarray, beta: np.ndarray, dtype: str, unbiased: bool = False, size: Any = None
) -> Layer:
    shards, wide = len(xs), "float32" if dtype == "float16" else dtype

    def copies(values: list[np.ndarray], kind: str) -> list[Any]:
        arrays = [mx.nd.array(of_shard, dtype=kind) for of_shard in values]
        for array in arrays:
            array.attach_grad()
        return arrays

    running = [mx.nd.zeros(len(gamma), dtype=wide), mx.nd.ones(len(gamma), dtype=wide)]
    group = Group(Comm(), range(shards), shards, size, unbiased=unbiased)
    return Layer(group, copies(xs, dtype), copies([gamma] * shards, wide), copies([beta] * shards, wide), running)


def check(kind: str, case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    channels = case.shape[case.axis - 1]
    gamma, beta = rng.normal(1, 0.5, channels).astype(np.float32), rng.normal(0, 1, channels).astype(np.float32)
    ends = np.cumsum(case.samples)
    x, dy = (rng.normal(offset, 2, (ends[-1], *case.shape)).astype(case.dtype) for offset in (case.offset, 0.3))
    weight = None if case.fix_gamma else gamma
    exact = batch_norm(x, dy, case.axis, 1e-5, weight, beta)
    relu = case.relu and kind == "kernels"
    if relu:
        assume(np.abs(exact.y).min() > 1e-4 * max(1, np.abs(x).max()))  # else rounding decides what is set to 0
        dy = np.where(exact.y > 0, dy, np.zeros_like(dy))
        exact = batch_norm(x, dy, case.axis, 1e-5, weight, beta)

    layer = layer_of(np.split(x, ends[:-1]), gamma, beta, case.dtype, case.unbiased)
    if case.adds:
        for data, of_beta in zip(layer.xs, layer.betas):
            data.attach_grad("add")
            of_beta.attach_grad("null")
    options = {"axis": case.axis, "eps": 1e-5, "momentum": case.momentum, "fix_gamma": case.fix_gamma}
    times = 2 if case.adds else 1
    with queued(kind):
        for _ in range(times):
            with autograd.record():
                ys = layer(**options, tail=RELU if relu else "")
            autograd.backward(ys, [mx.nd.array(part, dtype=case.dtype) for part in np.split(dy, ends[:-1])])
        mx.nd.waitall()

    tolerance, size = TOLERANCE[case.dtype], np.abs(dy).astype(np.float64).sum()
    expected = np.maximum(exact.y, 0) if relu else exact.y
    scale = 1 + abs(case.offset) * 0.01
    assert_within(np.concatenate([y.asnumpy() for y in ys]), expected, tolerance * scale, "y", scale=1.0)
    dx = np.concatenate([data.grad.asnumpy() for data in layer.xs])
    assert_within(dx, exact.dx * times, tolerance * scale, "dx", scale=exact.dx_scale * times)
    dgamma = sum(parameter.grad.asnumpy().astype(np.float64) for parameter in layer.gammas)
    assert_within(dgamma, exact.dgamma * (not case.fix_gamma), tolerance * scale, "dgamma", scale=size)
    if not case.adds:
        dbeta = sum(parameter.grad.asnumpy().astype(np.float64) for parameter in layer.betas)
        assert_within(dbeta, exact.dbeta, tolerance, "dbeta", scale=size)
    count, keep = x.size / channels, case.momentum**times
    var = exact.var * count / max(count - 1, 1) if case.unbiased else exact.var
    assert_within(layer.running[0].asnumpy(), (1 - keep) * exact.mean, tolerance, "running mean", scale=1.0)
    assert_within(layer.running[1].asnumpy(), keep + (1 - keep) * var, tolerance * scale, "running variance")


@BOTH
def test_any_shards_of_any_type_are_numpy_on_the_whole_batch(kind: str) -> None:
    @settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @example(Case([7, 8], (2, 255, 9), 1, "float32", 1e4, 0.9, False, True, True, True, 1))
    @given(cases())
    def holds(case: Case) -> None:
        check(kind, case)

    holds()


def test_no_gradient_passes_where_the_value_before_relu_is_exactly_0() -> None:
    layer = layer_of([np.full((3, 2, 5), 7.0), np.full((2, 2, 5), 7.0)], np.ones(2), np.array([0.0, 1.0]), "float32")
    with queued("kernels"):
        with autograd.record():
            ys = layer(tail=RELU)
        autograd.backward(ys, [mx.nd.ones_like(y) for y in ys])
        mx.nd.waitall()
    plain = mx.nd.zeros((5, 2))
    plain.attach_grad()
    with autograd.record():
        relu = plain.relu()
    relu.backward()
    assert not plain.grad.asnumpy().any()  # MXNet's own rule
    assert [y.asnumpy()[:, 0].any() for y in ys] == [False, False]
    assert [beta.grad.asnumpy().tolist() for beta in layer.betas] == [[0.0, 15.0], [0.0, 10.0]]


def trained(
    kind: str, xs: list[np.ndarray], dys: list[np.ndarray], beta: float = 0.0, dtype: str = "float32"
) -> tuple[Layer, list[np.ndarray]]:
    """A layer with gamma 1 after forward and backward, and what it gave for each shard."""
    channels = xs[0].shape[1]
    layer = layer_of(xs, np.ones(channels), np.full(channels, beta), dtype)
    with queued(kind):
        with autograd.record():
            ys = layer()
        autograd.backward(ys, [mx.nd.array(dy, dtype=dtype) for dy in dys])
        mx.nd.waitall()
    return layer, [y.asnumpy() for y in ys]


@BOTH
def test_no_gradient_flows_through_statistics_that_were_given(kind: str) -> None:
    layer = small_layer()
    layer.running[0][:], layer.running[1][:] = mx.nd.array([1.0, 0.0, -1.0]), mx.nd.array([4.0, 1.0, 0.25])
    with queued(kind):
        step(layer, train_mode=False)
        mx.nd.waitall()
    std = np.sqrt(np.array([4.0, 1.0, 0.25]) + 1e-5)
    for x, gamma in zip(layer.xs, layer.gammas):
        dy, deviation = x.asnumpy() + 1, x.asnumpy() - np.array([1.0, 0.0, -1.0])[:, None]
        np.testing.assert_allclose(x.grad.asnumpy(), dy * (gamma.asnumpy() / std)[:, None], rtol=1e-12)
        np.testing.assert_allclose(gamma.grad.asnumpy(), (dy * deviation).sum((0, 2)) / std, rtol=1e-12)


@BOTH
def test_a_constant_channel_is_beta_though_rounding_leaves_its_variance_below_0(kind: str) -> None:
    values = np.random.default_rng(0).uniform(1e6, 1e8, 64)
    xs = [np.broadcast_to(values[:, None], (n, 64, 5)) for n in (3, 2, 2)]
    _, ys = trained(kind, xs, xs, beta=0.5, dtype="float64")
    for y in ys:
        np.testing.assert_allclose(y, 0.5, atol=1e-4)


@BOTH
def test_a_mean_that_float32_cannot_hold_is_subtracted_exactly(kind: str) -> None:
    x = np.random.default_rng(0).normal(1e4, 1, (12, 6, 50)).astype(np.float32)
    exact = batch_norm(x, x, 1, 1e-5, np.ones(6), None)
    assert np.abs(exact.mean - exact.mean.astype(np.float32)).max() > 1e-4  # or it would not matter
    _, (y,) = trained(kind, [x], [x])
    np.testing.assert_allclose(y, exact.y, atol=3e-6)


def test_the_sums_of_a_long_channel_are_not_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_BLOCKS", 1)  # so that a thread has thousands of values, as on large images
    dy = np.full((1, 1, 256 * 4096), 0.1, np.float32)
    x = np.random.default_rng(0).normal(0, 1, dy.shape).astype(np.float32)
    layer, _ = trained("kernels", [x], [dy])
    exact = dy.astype(np.float64).sum()
    assert abs(layer.betas[0].grad.asscalar() - exact) < 1e-6 * exact


def small_layer(shards: int = 3, size: Any = None) -> Layer:
    xs = [np.random.default_rng(k).normal(k, 1, (4 + k, 3, 5)) for k in range(shards)]
    return layer_of(xs, np.array([0.5, 1.0, -2.0]), np.array([0.0, 1.0, 2.0]), "float64", size=size)


def step(layer: Layer, train_mode: bool = True) -> list[Any]:
    """Forward and backward, begun."""
    with autograd.record(train_mode=train_mode):
        ys = layer()
    autograd.backward(ys, [x + 1 for x in layer.xs], train_mode=train_mode)
    return ys


@BOTH
@pytest.mark.parametrize("train_mode", [True, False], ids=["training", "inference"])
def test_neither_forward_nor_backward_waits(kind: str, train_mode: bool) -> None:
    layer = small_layer()
    with queued(kind), counted_waits() as counts:
        step(layer, train_mode)
        mx.nd.waitall()
    assert counts == {"forward": 1, "backward": 1}


def test_a_wait_would_be_counted() -> None:
    layer = small_layer()
    layer.xs[1].attach_grad("null")  # so that backward has to wait for the sums, which nothing else follows
    with queued("graphs"), counted_waits() as counts:
        step(layer)
        mx.nd.waitall()
    assert counts == {"forward": 1, "backward": 1, "MXNDArrayWaitToRead": 1}


@BOTH
def test_groups_of_shards_have_their_own_statistics_which_whoever_trains_gets(kind: str) -> None:
    layer = small_layer(shards=3, size=2)
    with queued(kind):
        ys = [y.asnumpy() for y in step(layer)]
    (moments,) = layer.group.take_moments("0")
    for shards in ([0, 1], [2]):
        values = np.concatenate([layer.xs[k].asnumpy() for k in shards])
        gamma, beta = layer.gammas[0].asnumpy(), layer.betas[0].asnumpy()
        exact = batch_norm(values, values + 1, 1, 1e-5, gamma, beta)
        np.testing.assert_allclose(np.concatenate([ys[k] for k in shards]), exact.y, atol=1e-12)
        dx = np.concatenate([layer.xs[k].grad.asnumpy() for k in shards])
        np.testing.assert_allclose(dx, exact.dx, atol=1e-11)
        for k in shards:
            np.testing.assert_allclose(moments[k], [exact.mean, exact.var], rtol=1e-12)
    np.testing.assert_array_equal(layer.running[0].asnumpy(), 0)


@BOTH
def test_nan_stays_in_its_channel(kind: str) -> None:
    layer = small_layer()
    layer.xs[1][0, 2, 0] = np.nan
    with queued(kind):
        ys = step(layer)
    for array in (*ys, *(x.grad for x in layer.xs)):
        assert np.isnan(array.asnumpy()).all(axis=(0, 2)).tolist() == [False, False, True]
        assert np.isfinite(array.asnumpy()[:, :2]).all()
    assert [np.isnan(array.asnumpy()).tolist() for array in layer.running] == [[False, False, True]] * 2


@mx.operator.register("test_gate")
class _GateProp(mx.operator.CustomOpProp):
    """Zero, in some time, or as soon as the gate is opened; no thread of MXNet's engine waits for it."""

    opened = threading.Event()
    seconds = 0.1

    def create_operator(self, ctx: Any, shapes: Any, dtypes: Any) -> mx.operator.CustomOp:
        return _Gate()


class _Gate(mx.operator.CustomOp):
    def forward(self, is_train: bool, req: Any, in_data: Any, out_data: Any, aux: Any) -> None:
        _GateProp.opened.wait(_GateProp.seconds)
        out_data[0][:] = 0


class Late:
    """Passes of which one reads its inputs behind the gate, for all shards but the first. Keeps the rows."""

    def __init__(self, passes: QueuedPasses, late: str) -> None:
        self._passes, self._late, self.tails = passes, late, passes.tails
        self.rows: list[Any] = []
        self._calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._calls[name] = self._calls.get(name, 0) + 1
            if name == self._late and self._calls[name] > 1:
                read = {"moments": 1, "affine": 1, "products": 2, "combine": 2}[name]
                arguments = (*map(_behind_gate, arguments[:read]), *arguments[read:])
            if name in ("moments", "products"):
                self.rows.append(arguments[1] if name == "moments" else arguments[3])
            return getattr(self._passes, name)(*arguments)

        return call


def _behind_gate(x: mx.nd.NDArray) -> mx.nd.NDArray:
    return mx.nd.broadcast_add(x, mx.nd.Custom(mx.nd.zeros((1, 1, 1), dtype=x.dtype), op_type="test_gate"))


def overwritten(kind: str, late: str, wanted: Callable[[Layer], list[Any]], train_mode: bool = True) -> list[Any]:
    """All that a step gives, if its inputs are overwritten as soon as MXNet takes the operator for done."""
    layer = small_layer()
    for array in (*layer.xs, *layer.gammas, *layer.betas):
        array.attach_grad("null")
    for array in wanted(layer):
        array.attach_grad()
    heads = [x + 1 for x in layer.xs]
    made: list[Late] = []
    _GateProp.opened.clear()
    with queued(kind, change=lambda passes: made.append(Late(passes, late)) or made[0]):
        with autograd.record(train_mode=train_mode):
            ys = layer()
        autograd.backward(ys, heads, train_mode=train_mode)
        results = [*(y.copy() for y in ys), *(array.grad for array in wanted(layer)), *layer.running]
        for array in (*layer.xs, *heads):
            array[:] = 999
        for array in (*layer.xs, *heads):
            array.wait_to_read()
        _GateProp.opened.set()
        return [array.asnumpy() for array in (*results, *made[0].rows)]


def of_data(layer: Layer) -> list[Any]:
    return layer.xs


def of_one_gamma(layer: Layer) -> list[Any]:
    return layer.gammas[:1]


@BOTH
@pytest.mark.parametrize("wanted", [of_data, of_one_gamma])
@pytest.mark.parametrize("late", ["moments", "affine", "products", "combine"])
def test_what_is_only_read_may_be_overwritten_when_the_operator_is_done(
    kind: str, late: str, wanted: Callable[[Layer], list[Any]]
) -> None:
    expected = overwritten(kind, "", wanted)
    for found, values in zip(overwritten(kind, late, wanted), expected):
        np.testing.assert_array_equal(found, values)


@BOTH
def test_without_the_wait_for_what_no_output_follows_from_it_would_be_overwritten_too_early(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In backward, where of the first shard only the gradient of gamma is wanted, and of the others nothing."""
    expected = overwritten(kind, "", of_one_gamma)
    monkeypatch.setattr(_GateProp, "seconds", 30.0)
    monkeypatch.setattr(QueuedOp, "wait", lambda self, array: None)
    found = overwritten(kind, "products", of_one_gamma)
    assert any((array != values).any() for array, values in zip(found, expected))


def test_kernels_that_compute_what_mxnets_operators_do_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tried_passes, "Kernels", kernels)
    assert tried_passes._tried_kernels.__wrapped__(mx.cpu(), "float32") is not None
    assert capsys.readouterr().err == ""


class Shifted(cuda_kernels.Kernels):
    """Of a driver that compiles them wrong."""

    def __init__(self, dtype: str) -> None:
        self._kernels = kernels(dtype)._kernels

    def affine(self, x: Any, saved: Any, y: Any, req: str, options: Any) -> None:
        super().affine(x, saved + 0.5, y, req, options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MXNet's __del__ of what failed
@pytest.mark.parametrize(
    ("make", "reason"), [(Shifted, "their y of a trial is off by"), (cuda_kernels.Kernels, "USE_CUDA=1")]
)
def test_kernels_that_cannot_be_trusted_are_told_and_not_taken(
    make: Any, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tried_passes, "Kernels", make)
    monkeypatch.setattr(os, "environ", {})
    assert tried_passes._tried_kernels.__wrapped__(mx.cpu(), "float32") is None
    assert os.environ == {"MXNET_USE_FUSION": "0"}  # what MXNet compiles itself would fail as well
    told = capsys.readouterr().err
    assert told.startswith("warning: cpu(0): the kernels of SyncBatchNorm cannot be used (") and reason in told


def test_the_cpu_has_loops_of_its_own_but_not_for_float16() -> None:
    assert tried_passes.queued_passes(mx.cpu(), np.float32) is None
    assert isinstance(tried_passes.queued_passes(mx.cpu(), np.float16), Graphs)
