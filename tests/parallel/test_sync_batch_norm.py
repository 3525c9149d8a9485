"""SyncBatchNorm on real ranks, against numpy in float64 and gluon.nn.BatchNorm on the concatenated batch."""

from __future__ import annotations

import subprocess
import threading
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mxnet import autograd, gluon
from mxnet.gluon import nn

from job.distributed.comm import Comm, HorovodComm
from job.networks.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm
from tests.oracles import assert_within, batch_norm
from tests.parallel.conftest import ROOT, environment, launcher

TOLERANCE = 1e-5


class Case(NamedTuple):
    """A global batch, how it is split over ranks, and the options of the layer."""

    split: list[int]
    shape: tuple[int, ...]  # of the global batch; the split is along axis 0
    axis: int
    offset: float
    std: float
    momentum: float
    epsilon: float
    scale: bool
    center: bool
    unbiased: bool
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    """Splits over 1 to 4 ranks, even and uneven, down to one sample a rank; 2-D to 5-D; any axis but the batch's."""
    split = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ndim = draw(st.integers(2, 5))
    shape = (sum(split), *(draw(st.integers(1, 5)) for _ in range(ndim - 1)))
    axis = draw(st.integers(1, ndim - 1))
    return Case(
        split=split,
        shape=shape,
        axis=axis - ndim if draw(st.booleans()) else axis,
        offset=draw(st.sampled_from([0.0, -3.0, 100.0])),
        std=draw(st.sampled_from([0.1, 1.0, 20.0])),
        momentum=draw(st.sampled_from([0.0, 0.9, 0.5])),
        epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        scale=draw(st.booleans()),
        center=draw(st.booleans()),
        unbiased=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def outputs(layer: Any, x: np.ndarray, dy: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dtype: str) -> list[Any]:
    """y, dx, dgamma, dbeta, running_mean, running_var after one step of ``layer`` on ``x`` in ``dtype``."""
    layer.cast(dtype)
    layer.initialize()
    layer(mx.nd.array(x, dtype=dtype))
    layer.gamma.set_data(mx.nd.array(gamma, dtype=dtype))
    layer.beta.set_data(mx.nd.array(beta, dtype=dtype))
    data = mx.nd.array(x, dtype=dtype)
    data.attach_grad()
    with autograd.record():
        y = layer(data)
    y.backward(mx.nd.array(dy, dtype=dtype))
    mx.nd.waitall()
    zeros = mx.nd.zeros(gamma.shape)
    gradients = [p.grad() if p.grad_req != "null" else zeros for p in (layer.gamma, layer.beta)]
    running = [layer.running_mean.data(), layer.running_var.data()]
    return [array.asnumpy().astype(np.float64) for array in (y, data.grad, *gradients, *running)]


def check(case: Case, comm: Comm) -> None:
    """This rank's part of the case; the expected values are those of the whole batch, known to every rank."""
    generator = np.random.default_rng(case.seed)
    x = generator.normal(case.offset, case.std, case.shape).astype(np.float32)
    dy = generator.normal(0.2, 1.0, case.shape).astype(np.float32)
    channels = case.shape[case.axis]
    gamma = generator.normal(1.0, 0.5, channels) if case.scale else np.ones(channels)
    beta = generator.normal(0.0, 1.0, channels) if case.center else np.zeros(channels)
    options = {name: getattr(case, name) for name in ("axis", "momentum", "epsilon", "scale", "center")}

    start = sum(case.split[: comm.rank])
    own = slice(start, start + case.split[comm.rank])
    layer = SyncBatchNorm(comm=comm, unbiased=case.unbiased, **options)
    y, dx, dgamma, dbeta, running_mean, running_var = outputs(layer, x[own], dy[own], gamma, beta, "float32")
    if case.scale:
        dgamma = comm.sum(dgamma, "test.dgamma")
    if case.center:
        dbeta = comm.sum(dbeta, "test.dbeta")

    exact = batch_norm(x, dy, case.axis, case.epsilon, gamma.astype(np.float32), beta.astype(np.float32))
    count = x.size // channels
    var = exact.var * count / max(count - 1, 1) if case.unbiased else exact.var
    size = float(np.abs(dy).sum())  # of what is added up to dgamma and dbeta
    assert_within(y, exact.y[own], TOLERANCE, "y", scale=float(np.abs(exact.y).max()))
    assert_within(dx, exact.dx[own], TOLERANCE, "dx", scale=exact.dx_scale)
    assert_within(dgamma, exact.dgamma * case.scale, TOLERANCE, "dgamma", scale=size)
    assert_within(dbeta, exact.dbeta * case.center, TOLERANCE, "dbeta", scale=size)
    assert_within(running_mean, (1 - case.momentum) * exact.mean, TOLERANCE, "running_mean", scale=case.std)
    assert_within(running_var, case.momentum + (1 - case.momentum) * var, TOLERANCE, "running_var")

    gluon_y, gluon_dx, *_ = outputs(nn.BatchNorm(**options), x, dy, gamma, beta, "float64")
    assert_within(y, gluon_y[own], TOLERANCE, "y against gluon", scale=float(np.abs(gluon_y).max()))
    assert_within(dx, gluon_dx[own], TOLERANCE, "dx against gluon", scale=exact.dx_scale)


def property_on_all_ranks(comm: Comm) -> int:
    """Run the property on every rank in step: derandomized, all draw the same cases, and all vote on each outcome."""
    groups = _groups(comm)
    tried = []

    @settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(cases())
    def holds(case: Case) -> None:
        failure = ""
        if comm.rank < len(case.split):
            try:
                check(case, groups[len(case.split)])
            except AssertionError as error:
                failure = str(error)
        failures = comm.sum(np.array([bool(failure)], np.float64), "vote")[0]
        tried.append(len(case.split))
        assert not failures, f"{case}: {failure or 'another rank failed'}"

    holds()
    assert {1, 2, 3, 4} <= set(tried)
    return len(tried)


def _groups(comm: Comm) -> dict[int, Comm]:
    """The first n ranks, as a communicator of their own, for every n."""
    import horovod.mxnet as hvd

    sets = {n: hvd.add_process_set(list(range(n))) for n in range(2, comm.size)}
    own = {n: HorovodComm(60.0, chosen) for n, chosen in sets.items() if comm.rank < n}
    return {1: Comm(), **own, comm.size: comm}


def test_any_split_over_1_to_4_ranks_is_one_process_on_the_concatenated_batch(
    run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    counts = run_ranks(property_on_all_ranks, 4)
    assert min(counts) >= 150


def offset_error(comm: Comm) -> float:
    """The largest error of y against float64 with mean 1e4 and standard deviation 1."""
    x = np.random.default_rng(0).normal(1e4, 1.0, (17, 3, 9, 9)).astype(np.float32)
    own = np.array_split(np.arange(17), comm.size)[comm.rank]
    layer = SyncBatchNorm(comm=comm)
    layer.initialize()
    with autograd.record():
        y = layer(mx.nd.array(x[own])).asnumpy()
    return float(np.abs(y - batch_norm(x, x, 1, 1e-5, None, None).y[own]).max())


def test_mean_10000_std_1_is_right_at_three_ranks(run_ranks: Any) -> None:
    assert max(run_ranks(offset_error, 3)) < 1e-3


def robust_uses(comm: Comm) -> dict[str, float]:
    """Uses that have hung or broken other implementations; the largest error of each against one process."""
    return {
        "a layer used twice in one forward": _against_one_process(comm, _Twice, dtype="float64"),
        "two layers with one name": _two_layers_with_one_name(comm),
        "hybridized whole": _against_one_process(comm, _Plain, dtype="float64", hybridize=True),
        "gradients that add up": _against_one_process(comm, _Plain, dtype="float64", grad_req="add"),
    }


class _Plain(gluon.HybridBlock):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.HybridSequential()
        self.body.add(nn.Dense(6), nn.BatchNorm(), nn.Activation("tanh"), nn.Dense(5), nn.BatchNorm())

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.body(x)


class _Twice(gluon.HybridBlock):
    """Two uses that do not depend on one another, so that their backwards may run side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Dense(6), nn.Dense(6), nn.BatchNorm()

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return F.tanh(self.norm(self.first(x))) * self.norm(self.second(x))


def _against_one_process(comm: Comm, block: Any, dtype: str, hybridize: bool = False, grad_req: str = "write") -> float:
    """The largest difference in outputs and summed gradients, after three forwards and backwards, two of them added."""
    x = np.random.default_rng(0).normal(size=(11, 4))
    own = np.array_split(np.arange(11), comm.size)[comm.rank]
    results = []
    for sync, rows in ((False, np.arange(11)), (True, own)):
        net = block()
        mx.random.seed(1)
        net.initialize(mx.init.Xavier())
        net.cast(dtype)
        net(mx.nd.array(x, dtype=dtype))
        for index, parameter in enumerate(net.collect_params().values()):
            if parameter.grad_req != "null":
                values = np.random.default_rng(index).normal(0.5, 1.0, parameter.shape)
                parameter.set_data(mx.nd.array(values, dtype=dtype))
                parameter.grad_req = grad_req
        if sync:
            convert_sync_batch_norm(net, comm)
        if hybridize:
            net.hybridize(static_alloc=True, static_shape=True)
        for _ in range(3):
            with autograd.record():
                y = net(mx.nd.array(x[rows], dtype=dtype))
                loss = (y * mx.nd.array(np.cos(x[rows]).sum(1, keepdims=True), dtype=dtype)).square().sum()
            loss.backward()
        gradients = [p.grad().asnumpy() for p in net.collect_params().values() if p.grad_req != "null"]
        if sync:
            gradients = [comm.sum(g.astype(np.float64).ravel(), "test.gradient").reshape(g.shape) for g in gradients]
        results.append([y.asnumpy() if sync else y.asnumpy()[own], *gradients])
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(a).max())) for a, b in zip(*results))


def _two_layers_with_one_name(comm: Comm) -> float:
    """In one forward and backward, with different inputs, so that a mix-up shows."""
    x = np.random.default_rng(0).normal(size=(2, 11, 3))
    own = np.array_split(np.arange(11), comm.size)[comm.rank]
    layers = [SyncBatchNorm(comm=comm, prefix="same_") for _ in range(2)]
    inputs = [mx.nd.array(part[own], dtype="float64") for part in x]
    for layer, data in zip(layers, inputs):
        layer.cast("float64")
        layer.initialize()
        data.attach_grad()
    with autograd.record():
        y = mx.nd.concat(*(layer(data) for layer, data in zip(layers, inputs)), dim=1)
    y.backward(y.square())
    expected = [batch_norm(part, part, 1, 1e-5, None, None).y for part in x]
    gradients = [batch_norm(part, y**2, 1, 1e-5, None, None).dx[own] for part, y in zip(x, expected)]
    errors = [np.abs(y.asnumpy() - np.concatenate(expected, 1)[own]).max()]
    errors += [np.abs(data.grad.asnumpy() - gradient).max() for data, gradient in zip(inputs, gradients)]
    return float(max(errors))


def test_uses_that_break_other_implementations_are_one_process_too(run_ranks: Any) -> None:
    for errors in run_ranks(robust_uses, 3):
        assert set(errors) == {
            "a layer used twice in one forward",
            "two layers with one name",
            "hybridized whole",
            "gradients that add up",
        }
        for use, error in errors.items():
            assert error < 1e-9, (use, error)


def many_steps(comm: Comm, steps: int, micros: int) -> float:
    """Train a small network with gradient accumulation of ``micros`` and updates in between."""
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(8), nn.BatchNorm(), nn.Dense(2))
    convert_sync_batch_norm(net, comm)
    mx.random.seed(0)
    net.initialize()
    net.hybridize(static_alloc=True, static_shape=True)
    x = mx.nd.random.normal(shape=(comm.rank + 1, 1, 8, 8))
    net(x)
    parameters = net.collect_params()
    comm.broadcast_([p.data() for p in parameters.values()], "parameters")
    trained = [p for p in parameters.values() if p.grad_req != "null"]
    for parameter in trained:
        parameter.grad_req = "add" if micros > 1 else "write"
    trainer = gluon.Trainer(parameters, "sgd", {"learning_rate": 0.01}, kvstore=None)
    for _ in range(steps):
        for _ in range(micros):
            with autograd.record():
                loss = net(x).square().mean()
            loss.backward()
        comm.allreduce_([p.grad() for p in trained], "gradients")
        trainer.update(comm.size)
        for parameter in trained:
            if micros > 1:
                parameter.zero_grad()
    return float(sum(p.data().asnumpy().astype(np.float64).sum() for p in parameters.values()))


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_thirty_steps_with_accumulation_at_four_ranks_end_with_the_same_weights_everywhere(
    run_ranks: Any, controller: str
) -> None:
    results = run_ranks(many_steps, 4, controller=controller, steps=30, micros=2)
    assert len(set(results)) == 1 and np.isfinite(results[0])


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["gloo", "mpi"])
@pytest.mark.parametrize("micros", [1, 3])
def test_a_thousand_steps_at_four_ranks_end_with_the_same_weights_everywhere(
    run_ranks: Any, micros: int, controller: str
) -> None:
    results = run_ranks(many_steps, 4, controller=controller, steps=1000, micros=micros)
    assert len(set(results)) == 1 and np.isfinite(results[0])


def forward_on_rank_0_only(timeout_seconds: float) -> None:
    """What a user must not do: the body of a script for two ranks."""
    import horovod.mxnet as hvd

    comm = HorovodComm(timeout_seconds)
    layer = SyncBatchNorm(comm=comm)
    layer.initialize()
    if comm.rank == 0:
        with autograd.record():
            layer(mx.nd.ones((2, 3))).wait_to_read()
    else:
        hvd.allreduce(mx.nd.ones(1), name="something else").wait_to_read()


def test_a_training_forward_on_some_ranks_only_ends_within_the_bound_and_says_what_it_waited_for() -> None:
    script = "from tests.parallel.test_sync_batch_norm import forward_on_rank_0_only as f; f(3.0)"
    done = subprocess.run(
        [*launcher(2), "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90
    )
    assert done.returncode != 0
    assert "waiting for the other ranks in 'batch_norm.0.0.forward'" in done.stdout + done.stderr


class LateComm(HorovodComm):
    """Lets MXNet's threads wait until the script has come to its end."""

    def sum(self, values: np.ndarray, name: str) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            threading.main_thread().join()
        return super().sum(values, name)


def end_with_a_backward_queued() -> None:
    """The body of a script that waits for nothing."""
    layer = SyncBatchNorm(comm=LateComm(timeout_seconds=30))
    layer.initialize()
    with autograd.record():
        y = layer(layer(mx.nd.ones((2, 3))))
    y.backward()


def test_a_script_that_ends_with_a_backward_queued_still_has_the_other_ranks() -> None:
    script = "from tests.parallel.test_sync_batch_norm import end_with_a_backward_queued as f; f()"
    done = subprocess.run(
        [*launcher(2), "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Error" not in done.stdout + done.stderr
