"""One process: the layer against gluon.nn.BatchNorm and numpy. What needs several ranks is in tests/parallel/."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

from job.distributed.comm import Comm
from job.errors import UsageError
from job.networks import models, sync_batch_norm
from job.networks.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm, revert_sync_batch_norm
from tests.cuda.queued import queued
from tests.oracles import assert_within, batch_norm


@pytest.fixture(params=["host", "kernels", "graphs"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a CPU computes the operator, or a GPU: with its own kernels, or with MXNet's operators."""
    with nullcontext() if request.param == "host" else queued(request.param):
        yield


ON_EACH_PATH = pytest.mark.usefixtures("path")


class SilentComm(Comm):
    """Fails the test when somebody communicates."""

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        raise AssertionError(f"communication in {name}")

    def allreduce_(self, arrays: Sequence[mx.nd.NDArray], name: str) -> None:
        raise AssertionError(f"communication in {name}")


def draw(shape: tuple[int, ...], offset: float = 0.0, std: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(offset, std, shape).astype(np.float32)


def forward_backward(layer: Any, x: np.ndarray, dy: np.ndarray, dtype: str = "float32") -> tuple[Any, Any]:
    data = mx.nd.array(x, dtype=dtype)
    data.attach_grad()
    with autograd.record():
        y = layer(data)
    y.backward(mx.nd.array(dy, dtype=dtype))
    return y.asnumpy(), data.grad.asnumpy()


def layer_of(**options: Any) -> SyncBatchNorm:
    layer = SyncBatchNorm(comm=options.pop("comm", Comm()), **options)
    layer.initialize()
    return layer


@ON_EACH_PATH
@pytest.mark.parametrize(
    "shape, axis", [((6, 4), 1), ((6, 4, 5), 1), ((3, 4, 5, 5), 1), ((3, 5, 5, 4), -1), ((2, 3, 2, 4, 5), 2)]
)
def test_forward_and_backward_are_those_of_numpy(shape: tuple[int, ...], axis: int) -> None:
    layer = layer_of(axis=axis)
    x, dy = draw(shape, offset=2.0, std=3.0), draw(shape, offset=0.3, seed=1)
    y, dx = forward_backward(layer, x, dy)
    expected = batch_norm(x, dy, axis, 1e-5, None, None)
    assert_within(y, expected.y, 1e-5, "y")
    assert_within(dx, expected.dx, 1e-5, "dx", scale=expected.dx_scale)
    assert_within(layer.gamma.grad().asnumpy(), expected.dgamma, 1e-5, "dgamma")
    assert_within(layer.beta.grad().asnumpy(), expected.dbeta, 1e-5, "dbeta")
    assert_within(layer.running_mean.data().asnumpy(), 0.1 * expected.mean, 1e-5, "running_mean")
    assert_within(layer.running_var.data().asnumpy(), 0.9 + 0.1 * expected.var, 1e-5, "running_var")


@ON_EACH_PATH
def test_mean_10000_std_1_comes_out_as_float64_says() -> None:
    x = draw((32, 3, 8, 8), offset=1e4)
    y, _ = forward_backward(layer_of(), x, np.ones_like(x))
    assert np.abs(y - batch_norm(x, x, 1, 1e-5, None, None).y).max() < 1e-3


@ON_EACH_PATH
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_a_global_count_of_one_gives_beta_and_no_gradient(shape: tuple[int, ...]) -> None:
    layer = layer_of(unbiased=True, beta_initializer=mx.init.Constant(0.25))
    y, dx = forward_backward(layer, draw(shape, offset=7.0), np.ones(shape))
    np.testing.assert_array_equal(y, np.full(shape, 0.25))
    np.testing.assert_allclose(dx, 0, atol=1e-12)
    assert np.isfinite(layer.running_var.data().asnumpy()).all()


@ON_EACH_PATH
def test_a_constant_channel_has_no_negative_variance_and_no_nan() -> None:
    x = np.full((16, 2, 5, 5), 12345.678, np.float32)
    layer = layer_of(momentum=0.0)
    y, dx = forward_backward(layer, x, draw(x.shape))
    assert np.isfinite(y).all() and np.isfinite(dx).all()
    assert (layer.running_var.data().asnumpy() >= 0).all()
    assert np.abs(y).max() < 1e-3


@ON_EACH_PATH
def test_unbiased_running_variance_is_n_over_n_minus_1_times_the_biased_one() -> None:
    x = draw((3, 2, 2, 2))
    biased, unbiased = layer_of(momentum=0.0), layer_of(momentum=0.0, unbiased=True)
    for layer in (biased, unbiased):
        forward_backward(layer, x, x)
    np.testing.assert_allclose(biased.running_var.data().asnumpy(), x.var((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(unbiased.running_var.data().asnumpy(), x.var((0, 2, 3), ddof=1), rtol=1e-5)


def test_inference_is_bit_for_bit_batch_norms_and_never_communicates() -> None:
    plain, sync = nn.BatchNorm(), SyncBatchNorm(comm=SilentComm())
    x = draw((4, 3, 6, 6), offset=1.0)
    for layer in (plain, sync):
        layer.initialize()
        layer(mx.nd.array(x))
        for parameter, value in ((layer.running_mean, 0.7), (layer.running_var, 2.0), (layer.gamma, 1.5)):
            parameter.set_data(mx.nd.full((3,), value))
    np.testing.assert_array_equal(sync(mx.nd.array(x)).asnumpy(), plain(mx.nd.array(x)).asnumpy())
    sync.hybridize(static_alloc=True, static_shape=True)
    np.testing.assert_array_equal(sync(mx.nd.array(x)).asnumpy(), plain(mx.nd.array(x)).asnumpy())


@ON_EACH_PATH
@pytest.mark.parametrize("options", [{"use_global_stats": True}, {}], ids=["use_global_stats", "predict mode"])
def test_gradients_through_given_statistics_are_batch_norms_without_communication(options: dict[str, bool]) -> None:
    results = []
    x, dy = draw((4, 3, 5, 5), offset=1.0), draw((4, 3, 5, 5), seed=1)
    for layer in (nn.BatchNorm(**options), SyncBatchNorm(comm=SilentComm(), **options)):
        layer.initialize()
        data = mx.nd.array(x)
        data.attach_grad()
        with autograd.record(train_mode=bool(options)):
            y = layer(data)
        y.backward(mx.nd.array(dy), train_mode=bool(options))
        results.append([a.asnumpy() for a in (y, data.grad, layer.gamma.grad(), layer.beta.grad())])
    for plain, sync in zip(*results):
        np.testing.assert_allclose(sync, plain, rtol=1e-5, atol=1e-5)


@ON_EACH_PATH
@pytest.mark.parametrize("scale, center", [(False, True), (True, False), (False, False)])
def test_without_scale_or_center_it_is_batch_norm_without_them(scale: bool, center: bool) -> None:
    x, dy = draw((4, 3, 5), offset=1.0), draw((4, 3, 5), seed=1)
    results = []
    for layer in (nn.BatchNorm(scale=scale, center=center), SyncBatchNorm(comm=Comm(), scale=scale, center=center)):
        layer.initialize()
        results.append(forward_backward(layer, x, dy))
        assert [p.grad_req for p in (layer.gamma, layer.beta)] == ["write" if on else "null" for on in (scale, center)]
    for plain, sync in zip(*results):
        np.testing.assert_allclose(sync, plain, rtol=1e-4, atol=1e-5)


def test_float16_input_keeps_float32_statistics_and_parameters() -> None:
    layer = SyncBatchNorm(comm=Comm())
    layer.cast("float16")
    layer.initialize()
    x, dy = draw((32, 3, 8, 8), offset=3.0).astype(np.float16), draw((32, 3, 8, 8), seed=1).astype(np.float16)
    y, dx = forward_backward(layer, x, dy, "float16")
    expected = batch_norm(x, dy, 1, 1e-5, None, None)
    assert y.dtype == dx.dtype == np.float16
    assert layer.gamma.data().dtype == layer.running_mean.data().dtype == np.float32
    assert_within(y, expected.y, 1e-3, "y")
    assert_within(dx, expected.dx, 1e-3, "dx", scale=expected.dx_scale)
    assert_within(layer.running_mean.data().asnumpy(), 0.1 * expected.mean, 1e-5, "running_mean")


@ON_EACH_PATH
def test_gradients_add_up_under_grad_req_add() -> None:
    layer = layer_of()
    x, dy = draw((4, 3, 5, 5)), draw((4, 3, 5, 5), seed=1)
    forward_backward(layer, x, dy)  # fixes the shapes
    once = layer.gamma.grad().asnumpy(), layer.beta.grad().asnumpy()
    for parameter in (layer.gamma, layer.beta):
        parameter.grad_req = "add"
        parameter.zero_grad()
    data = mx.nd.array(x)
    data.attach_grad(grad_req="add")
    for _ in range(2):
        with autograd.record():
            y = layer(data)
        y.backward(mx.nd.array(dy))
    np.testing.assert_allclose(layer.gamma.grad().asnumpy(), 2 * once[0], rtol=1e-6)
    np.testing.assert_allclose(layer.beta.grad().asnumpy(), 2 * once[1], rtol=1e-6)
    expected = batch_norm(x, dy, 1, 1e-5, None, None)
    assert_within(data.grad.asnumpy(), 2 * expected.dx, 1e-5, "dx", scale=expected.dx_scale)


@ON_EACH_PATH
def test_frozen_parameters_get_no_gradient_and_input_gradients_stay_right() -> None:
    layer = layer_of()
    x, dy = draw((4, 3, 5, 5)), draw((4, 3, 5, 5), seed=1)
    layer(mx.nd.array(x))
    layer.gamma.grad_req = layer.beta.grad_req = "null"
    _, dx = forward_backward(layer, x, dy)
    expected = batch_norm(x, dy, 1, 1e-5, None, None)
    assert_within(dx, expected.dx, 1e-5, "dx", scale=expected.dx_scale)


@ON_EACH_PATH
def test_a_pause_or_predict_mode_leaves_running_statistics_alone() -> None:
    layer = layer_of()
    x = mx.nd.array(draw((4, 3, 5, 5), offset=5.0))
    layer(x)
    with autograd.record(), autograd.pause():
        layer(x)
    np.testing.assert_array_equal(layer.running_mean.data().asnumpy(), np.zeros(3))
    with autograd.train_mode():
        layer(x)
    assert (layer.running_mean.data().asnumpy() > 0.1).all()


def test_converting_keeps_parameters_names_references_and_results() -> None:
    net = models.tutorial(dense_batch_norm=True)
    models.initialize(net, mx.cpu())
    x = mx.nd.array(draw((8, 1, 28, 28)))
    before, names = net(x).asnumpy(), list(net.collect_params())
    with autograd.record():
        trained = net(x)
    trained.backward()  # MXNet's own layer updates its running statistics only here, and unseen by its engine
    mx.nd.waitall()
    running = net[1].running_var.data().asnumpy()
    for parameter in (net[1].running_mean, net[1].running_var):
        parameter.initialize(force_reinit=True)
    layer = net[1]
    assert convert_sync_batch_norm(net, Comm()) == 3
    assert list(net.collect_params()) == names
    assert net[1] is layer and isinstance(layer, SyncBatchNorm)
    assert before.shape == net(x).shape
    with autograd.record():
        np.testing.assert_allclose(net(x).asnumpy(), trained.asnumpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(net[1].running_var.data().asnumpy(), running, rtol=1e-4)


def test_converting_reaches_nested_and_shared_blocks_and_counts_each_once() -> None:
    net = gluon.model_zoo.vision.resnet18_v1(classes=10)
    batch_norms = []
    net.apply(lambda block: batch_norms.append(block) if isinstance(block, nn.BatchNorm) else None)
    assert convert_sync_batch_norm(net, Comm()) == len(batch_norms) > 15
    assert convert_sync_batch_norm(net, Comm()) == 0
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    with autograd.record():
        loss = net(mx.nd.array(draw((2, 3, 32, 32)))).sum()
    loss.backward()
    assert np.isfinite(loss.asscalar())


def test_relu_fused_batch_norm_and_contrib_sync_batch_norm_are_converted_too() -> None:
    net = nn.HybridSequential()
    net.add(nn.BatchNormReLU(), gluon.contrib.nn.SyncBatchNorm(num_devices=1))
    assert convert_sync_batch_norm(net, Comm()) == 2
    net.initialize()
    x = draw((8, 3, 4, 4))
    with autograd.record():
        first = net[0](mx.nd.array(x))
        second = net[1](mx.nd.array(x))
    exact = batch_norm(x, x, 1, 1e-5, None, None).y
    np.testing.assert_allclose(first.asnumpy(), np.maximum(exact, 0), atol=1e-5)
    np.testing.assert_allclose(second.asnumpy(), exact, atol=1e-5)


def test_training_with_updates_between_forward_and_backward_does_not_deadlock() -> None:
    """The trap of gamma read in backward behind the trainer's write; under the test's time limit."""
    net = nn.HybridSequential()
    net.add(nn.Dense(8), SyncBatchNorm(comm=Comm()), nn.Dense(2))
    net.initialize()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1}, kvstore=None)
    x = mx.nd.array(draw((16, 4)))
    for _ in range(50):
        with autograd.record():
            loss = net(x).square().sum()
        loss.backward()
        trainer.step(16)
    assert np.isfinite(loss.asscalar())


def small_network(sync: bool = True) -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 3), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(3))
    net.initialize()
    net(mx.nd.zeros((1, 2, 6, 6)))
    if sync:
        convert_sync_batch_norm(net, Comm())
    return net


def test_what_was_converted_and_reverted_exports_without_a_custom_operator(tmp_path: Path) -> None:
    net, x = small_network(), mx.nd.array(draw((4, 2, 6, 6)))
    expected = net(x).asnumpy()
    assert revert_sync_batch_norm(net) == 1 and type(net[1]) is nn.BatchNorm
    net.hybridize()
    net(x)
    net.export(str(tmp_path / "net"))
    assert "Custom" not in (tmp_path / "net-symbol.json").read_text()
    loaded = gluon.SymbolBlock.imports(str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params"))
    np.testing.assert_array_equal(loaded(x).asnumpy(), expected)


def test_a_copy_trains_and_leaves_the_original_alone() -> None:
    net, x = small_network(), draw((4, 2, 6, 6))
    before = net[1].running_mean.data().asnumpy()
    twin = copy.deepcopy(net)
    twin.hybridize(static_alloc=True, static_shape=True)
    forward_backward(twin, x, np.ones((4, 3)))
    np.testing.assert_array_equal(net[1].running_mean.data().asnumpy(), before)
    assert np.abs(twin[1].running_mean.data().asnumpy()).max() > 0


def test_the_ranks_of_a_job_cannot_be_pickled_and_the_layer_is_named() -> None:
    with pytest.raises(TypeError, match=r"batchnorm\d+: the ranks of a job cannot be pickled; revert_sync_batch_norm"):
        pickle.dumps(small_network()[1])


def test_hybridized_without_a_static_plan_training_is_refused_before_a_wrong_number_exists() -> None:
    net = small_network()
    net.hybridize()
    with pytest.raises((UsageError, ValueError), match=r"call net\.hybridize\(static_alloc=True, static_shape=True\)"):
        forward_backward(net, draw((4, 2, 6, 6)), np.ones((4, 3)))


def test_several_devices_of_one_process_are_refused() -> None:
    layer = SyncBatchNorm(comm=Comm(), in_channels=3)
    layer.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    with pytest.raises(UsageError, match="its parameters are on 2 devices; start one rank a device"):
        forward_backward(layer, draw((4, 3)), np.ones((4, 3)))


def test_mxnets_numpy_mode_is_refused() -> None:
    layer = layer_of(in_channels=3)
    with mx.util.np_array(True), pytest.raises(UsageError, match="numpy mode"):
        forward_backward(layer, draw((4, 3)), np.ones((4, 3)))


def test_a_class_made_from_batch_norm_is_refused_by_its_name() -> None:
    class Renormalized(nn.BatchNorm):
        pass

    net = nn.HybridSequential()
    net.add(Renormalized())
    with pytest.raises(UsageError, match="Renormalized is made from BatchNorm"):
        convert_sync_batch_norm(net, Comm())


def gradients_of_resnet(dtype: str, sync: bool, static: bool) -> np.ndarray:
    mx.random.seed(0)
    np.random.seed(0)
    net = vision.get_resnet(1, 18, thumbnail=True, classes=4)
    net.initialize(mx.init.Xavier())
    net(mx.nd.zeros((1, 1, 16, 16)))
    net.cast(dtype)
    if sync:
        convert_sync_batch_norm(net, Comm())
    if static:
        net.hybridize(static_alloc=True, static_shape=True)
    x = mx.nd.array(np.random.default_rng(1).random((16, 1, 16, 16)), dtype=dtype)
    for _ in range(3):  # freed memory is not always reused at once
        with autograd.record():
            loss = net(x).square().mean()
        loss.backward()
    gradients = [p.grad().asnumpy() for p in net.collect_params().values() if p.grad_req != "null"]
    return np.concatenate([gradient.ravel().astype(np.float64) for gradient in gradients])


@pytest.fixture(scope="module")
def resnet_in_float64() -> np.ndarray:
    return gradients_of_resnet("float64", sync=False, static=False)


@pytest.mark.parametrize("static", [False, True], ids=["not hybridized", "static"])
@pytest.mark.parametrize("sync", [False, True], ids=["MXNet's", "ours"])
def test_resnet_18_in_each_way_of_running_it_is_float64_but_for_rounding(
    sync: bool, static: bool, resnet_in_float64: np.ndarray
) -> None:
    gradients = gradients_of_resnet("float32", sync, static)
    assert np.abs(gradients - resnet_in_float64).max() < 0.02 * np.abs(resnet_in_float64).max()


QUEUED = """
import threading
import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn
from job.distributed.comm import Comm
from job.networks.sync_batch_norm import SyncBatchNorm

class LateComm(Comm):
    def sum(self, values, name):
        threading.main_thread().join()  # until the script has come to its end
        return values

layer, net = SyncBatchNorm(comm=LateComm(), in_channels=8), nn.HybridSequential()
net.add(layer, layer)
net.initialize()
net.hybridize(static_alloc=True, static_shape=True)
x = mx.nd.ones((4, 8, 32, 32))
x.attach_grad()
with autograd.record():
    y = net(x)
y.backward()
"""


def test_a_script_that_ends_with_a_backward_queued_ends_well() -> None:
    root = Path(sync_batch_norm.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", QUEUED], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # it aborts, or now and then hangs, if nobody waits for MXNet
