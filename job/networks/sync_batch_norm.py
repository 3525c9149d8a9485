"""BatchNorm whose statistics are those of the global batch, for MXNet Gluon over Horovod.

The mathematics (docs/sync_batch_norm.md derives it). A channel has n_k values in shard k and n = sum of n_k in all.

forward   each shard is reduced to (n_k, mean_k, M2_k), M2 being the sum of squared deviations. A table with a row for
          each shard, (n_k mean_k, M2_k + n_k mean_k^2, n_k) in float64, is summed over ranks, each of which knows its
          own rows and has zeros elsewhere, which is exact; then its rows are added up in their order:

              mean = sum(n_k mean_k) / n         var = sum(M2_k + n_k mean_k^2) / n - mean^2
              x^ = (x - mean) / sqrt(var + eps)  y = gamma x^ + beta

backward  likewise with the rows (sum dy, sum dy (x - mean)):

              dbeta = sum dy                     dgamma = sum dy x^           both of each shard's samples only
              dx = gamma / sqrt(var + eps) (dy - sum dy / n - x^ sum(dy x^) / n)     sums over all shards

So no number depends on how many ranks there are, or on who computes which shard. dgamma and dbeta stay those of a
shard because whoever trains sums them like every other gradient.

Sources: Ioffe and Szegedy, "Batch normalization", 2015, for the gradient; Chan, Golub and LeVeque, 1979, for the merge.
"""

from __future__ import annotations

import atexit
import copy
import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from job.distributed.comm import Comm
from job.errors import PeerLostError, UsageError
from job.networks.kernels import passes_for

# MXNet hands a custom operator nothing but strings, so that it finds its group by name. Groups stay: an operator may
# outlive whoever made it.
_GROUPS: dict[str, Group] = {}


class Group:
    """The shards that share statistics, and which of them are this rank's.

    Args:
        comm: the ranks that hold the shards.
        own: this rank's shards.
        shards: how many there are on all ranks.
        synchronize: whether the statistics are those of all shards; otherwise each shard has its own, nothing is
            communicated, and whoever trains updates the running statistics from :attr:`moments`.
        unbiased: whether running_var takes the unbiased estimate of the variance, n / (n - 1) times the biased one by
            which the batch is normalized. MXNet itself takes the biased one on the CPU, the unbiased one with cuDNN.
    """

    def __init__(self, comm: Comm, own: range, shards: int, synchronize: bool = True, unbiased: bool = False) -> None:
        self.comm = comm
        self.own = own
        self.shards = shards
        self.synchronize = synchronize
        self.unbiased = unbiased
        self.key = f"{comm.fresh_name('batch_norm')}.{id(self)}"
        self.moments: dict[str, list[np.ndarray]] = {}  # by layer: of each forward (2, channels), see synchronize
        self.unanswered: dict[str, set[int]] = {}  # by layer: numbers of the forwards whose backward is still to come
        self._name = self.key.rpartition(".")[0]  # the same on all ranks
        _GROUPS[self.key] = self
        # What is still queued when a script ends needs Python and the other ranks: without them it aborts or hangs.
        # This is registered after the hooks of MXNet and of Horovod, and so runs before them.
        atexit.register(mx.nd.waitall)

    def total(self, name: str, rows: np.ndarray) -> np.ndarray:
        """For each of this rank's shards the sum that concerns it, (len(own), width), from ``rows`` of that shape.

        Waits for the other ranks. NaN if one has failed.
        """
        if not self.synchronize:
            return rows
        table = np.zeros((self.shards, rows.shape[1]))
        table[self.own.start : self.own.stop] = rows
        try:
            table = self.comm.sum(table, f"{self._name}.{name}")
        except PeerLostError:
            # Raised here, MXNet would print it with a traceback. Nothing is gained by these numbers: the next
            # collective, that of the gradients, fails too and stops the caller, before any weight has changed.
            table = np.full_like(table, np.nan)
        # One after the other: numpy's own sum would be as exact, but in an order that it does not promise.
        return np.broadcast_to(functools.reduce(np.add, table), rows.shape)


class SyncBatchNorm(nn.BatchNorm):
    """A drop-in for ``gluon.nn.BatchNorm`` that normalizes by the mean and variance of the global batch.

    Takes the arguments of ``gluon.nn.BatchNorm``, and has its parameters, names and shapes. Input: 2-D to 5-D, float16,
    float32 or float64, its channels on ``axis``; ranks may hold different numbers of samples, but the same channels.
    Output: of the input's shape and type.

    In training every rank of ``comm`` must run forward and backward, in the same order on all; a rank that never does
    ends the others when the time limit of ``comm`` is over. Inference is MXNet's own, and never communicates.

    A network that is hybridized must be so with ``static_alloc=True, static_shape=True`` (on a CPU in float32):
    otherwise MXNet 1.9.1 hands custom operators memory that it has freed. Training it is refused.

    Args:
        comm: the ranks that share statistics.
        unbiased: see :class:`Group`.

    Raises:
        UsageError: in training, where it cannot be right: see above; parameters on several devices of one process;
            MXNet's numpy mode (``npx.set_np``).
    """

    def __init__(self, *args: Any, comm: Comm, unbiased: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = Group(comm, range(comm.rank, comm.rank + 1), comm.size, unbiased=unbiased)

    def hybrid_forward(self, F: Any, x: Any, **parameters: Any) -> Any:
        """Gluon's hook; ``F`` is ``mx.nd`` or ``mx.sym``."""
        if self._kwargs["use_global_stats"] or (F is mx.nd and not mx.autograd.is_training()):
            return super().hybrid_forward(F, x, **parameters)
        self._require_safe(F)
        ordered = [parameters[name] for name in ("gamma", "beta", "running_mean", "running_var")]
        options = {name: str(self._kwargs[name]) for name in ("axis", "eps", "momentum", "fix_gamma")}
        # Where no static plan holds it, MXNet 1.9.1 frees what it makes of an array in oneDNN's layout before a custom
        # operator reads it. A product is in the plain layout, and so is the gradient that flows into one.
        names = {"op_type": "sync_batch_norm", "group": self.group.key, "layer": "0", "name": "fwd"}
        y = F.Custom(x * 1.0 if F is mx.nd else x, *ordered, **names, **options)
        y = y * 1.0 if F is mx.nd else y
        return F.relu(y) if self.fuse_relu else y

    def _require_safe(self, F: Any) -> None:
        contexts = self.gamma.list_ctx()
        if len(contexts) > 1:
            raise UsageError(f"{self.name}: its parameters are on {len(contexts)} devices; start one rank a device")
        if mx.util.is_np_array():
            raise UsageError(f"{self.name}: MXNet's numpy mode has other operators; call npx.reset_np() before")
        static = {"static_alloc", "static_shape"} <= {name for name, on in self._flags if on}
        on_cpu = contexts[0].device_type == "cpu" and np.dtype(self.gamma.dtype) == np.float32
        if F is not mx.nd and on_cpu and self._active and not static:
            raise UsageError(
                f"{self.name}: hybridized without a static plan MXNet 1.9.1 hands custom operators memory that is"
                " already freed; call net.hybridize(static_alloc=True, static_shape=True), or do not hybridize"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"{self.name}: the ranks of a job cannot be pickled; revert_sync_batch_norm(net) first")

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        own = {name: value for name, value in self.__dict__.items() if name != "group"}
        twin.__dict__.update(copy.deepcopy(own, memo))
        twin.group = Group(self.group.comm, self.group.own, self.group.shards, unbiased=self.group.unbiased)
        return twin


def convert_sync_batch_norm(net: gluon.Block, comm: Comm, unbiased: bool = False) -> int:
    """Turn every BatchNorm of ``net`` into a :class:`SyncBatchNorm` in place, and return how many there were.

    Parameters, their names and values, and whoever refers to a layer stay as they are. Call it on all ranks, before or
    after initialization, on a network that is hybridized or not. :func:`revert_sync_batch_norm` is the way back.

    Raises:
        UsageError: a layer is of a class made from BatchNorm, whose meaning is not known here.
    """
    layers = _layers(net, nn.basic_layers._BatchNorm)
    for layer in layers:
        if type(layer) not in (*_CONVERTIBLE, SyncBatchNorm):
            raise UsageError(
                f"{layer.name}: {type(layer).__name__} is made from BatchNorm, and what it changes would be lost;"
                " replace it by nn.BatchNorm or write it with SyncBatchNorm"
            )
    converted = [layer for layer in layers if type(layer) in _CONVERTIBLE]
    for layer in converted:
        layer._kwargs = {"axis": 1, **{key: layer._kwargs[key] for key in _OPTIONS if key in layer._kwargs}}
        layer.__class__ = SyncBatchNorm
        layer.group = Group(comm, range(comm.rank, comm.rank + 1), comm.size, unbiased=unbiased)
    _forget_graphs(net)
    return len(converted)


def revert_sync_batch_norm(net: gluon.Block) -> int:
    """Turn every :class:`SyncBatchNorm` of ``net`` into MXNet's own in place, and return how many there were.

    What is then exported, copied or pickled holds nothing of this module.
    """
    layers = _layers(net, SyncBatchNorm)
    for layer in layers:
        layer.__class__ = nn.BatchNormReLU if layer.fuse_relu else nn.BatchNorm
        del layer.group
    _forget_graphs(net)
    return len(layers)


# gluon.contrib's SyncBatchNorm synchronizes the GPUs of one process; across processes it does nothing.
_CONVERTIBLE = (nn.BatchNorm, nn.BatchNormReLU, gluon.contrib.nn.SyncBatchNorm)
_OPTIONS = ("axis", "eps", "momentum", "fix_gamma", "use_global_stats")


def _layers(net: gluon.Block, kind: type) -> list[Any]:
    found: dict[int, Any] = {}
    net.apply(lambda block: found.setdefault(id(block), block) if isinstance(block, kind) else None)
    return list(found.values())


def _forget_graphs(net: gluon.Block) -> None:
    net.apply(lambda block: block._clear_cached_op() if isinstance(block, gluon.HybridBlock) else None)


@mx.operator.register("sync_batch_norm")
class _SyncBatchNormProp(mx.operator.CustomOpProp):
    """What MXNet needs to know of the operator before it runs: names, shapes, types, and what backward depends on.

    Its inputs are the data of each shard of this rank, then gamma once a shard (so that each shard has its gradient),
    then beta likewise. Its outputs are the results of each shard.
    """

    def __init__(
        self,
        group: str,
        layer: str,
        shards: str = "1",
        axis: str = "1",
        eps: str = "1e-5",
        momentum: str = "0.9",
        fix_gamma: str = "False",
    ) -> None:
        super().__init__(need_top_grad=True)
        if group not in _GROUPS:  # an exception here would be printed by MXNet, and end in a crash
            _GROUPS[group] = Group(Comm(), range(int(shards)), int(shards))
        self._shards = int(shards)
        self._axis = int(axis)
        self._options = (_GROUPS[group], layer, self._shards, self._axis, float(eps), float(momentum))
        self._fix_gamma = fix_gamma in ("True", "1")

    def list_arguments(self) -> list[str]:
        return [f"{name}{k}" for name in ("data", "gamma", "beta") for k in range(self._shards)]

    def list_outputs(self) -> list[str]:
        return [f"output{k}" for k in range(self._shards)]

    def list_auxiliary_states(self) -> list[str]:
        return ["running_mean", "running_var"]

    def infer_shape(self, in_shape: list[list[int]]) -> tuple[list[Any], list[Any], list[Any]]:
        data = in_shape[: self._shards]
        channels = [data[0][self._axis]]
        return [*data, *([channels] * 2 * self._shards)], data, [channels, channels]

    def infer_type(self, in_type: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        data = in_type[0]
        parameter = np.float32 if data == np.float16 else data
        return (
            [data] * self._shards + [parameter] * 2 * self._shards,
            [data] * self._shards,
            [parameter, parameter],
        )

    def declare_backward_dependency(self, out_grad: list[int], in_data: list[int], out_data: list[int]) -> list[int]:
        # Not gamma: backward may run after the trainer's update of it has been queued, and must use the old one.
        return [*out_grad, *in_data[: self._shards]]

    def create_operator(self, ctx: str, in_shapes: Any, in_dtypes: Any) -> mx.operator.CustomOp:
        return _SyncBatchNormOp(*self._options, self._fix_gamma)


class _Statistics(NamedTuple):
    """Of the values that a shard is normalized by, as float64 vectors (channels,)."""

    values: float  # how many
    mean: np.ndarray
    var: np.ndarray
    center: np.ndarray  # the mean as rounded to the type of the data
    inverse_std: np.ndarray
    scale: np.ndarray


class _SyncBatchNormOp(mx.operator.CustomOp):
    """One use of a layer in a forward pass, and its backward."""

    def __init__(
        self, group: Group, layer: str, shards: int, axis: int, eps: float, momentum: float, fix_gamma: bool
    ) -> None:
        super().__init__()
        self._group, self._layer, self._shards = group, layer, shards
        self._axis, self._eps, self._momentum, self._fix_gamma = axis, eps, momentum, fix_gamma
        self._saved: list[_Statistics] = []
        self._answer: Optional[int] = None  # the number of the allreduce of backward; none after inference

    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        n = self._shards
        xs = [self._flat(x) for x in in_data[:n]]
        gamma, beta = self._gamma(in_data[n]), _host(in_data[2 * n])
        if is_train:
            totals = self._group.total(f"{self._layer}.forward", np.stack(_side_by_side(_moments, xs)))
            merged = totals[:1] if self._group.synchronize else totals
            saved = [self._statistics(total, gamma, xs[0].dtype) for total in merged]
            self._update_running(saved, aux)
            self._number_backward()
        else:
            saved = [self._given_statistics(aux, gamma)]
            self._answer = None
        self._saved = saved * (n // len(saved))

        def normalize(k: int) -> None:
            passes, own = passes_for(xs[k]), self._saved[k]
            shift = beta - (own.mean - own.center) * own.scale
            self._write(req[k], out_data[k], lambda y: passes.affine(xs[k], own.center, own.scale, shift, y))

        _side_by_side(normalize, range(n))

    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        n, saved = self._shards, self._saved
        xs = [self._flat(x) for x in in_data[:n]]
        dys = [self._flat(dy) for dy in out_grad]

        def products(k: int) -> np.ndarray:
            dbeta, product = passes_for(xs[k]).products(dys[k], xs[k], saved[k].center)
            product -= (saved[k].mean - saved[k].center) * dbeta
            dgamma = np.zeros_like(product) if self._fix_gamma else product * saved[k].inverse_std
            _assign(in_grad[n + k], req[n + k], dgamma)
            _assign(in_grad[2 * n + k], req[2 * n + k], dbeta)
            return np.concatenate([dbeta, product])

        rows = np.stack(_side_by_side(products, range(n)))
        if self._answer is None:  # the statistics were given, so that nothing flows through them
            totals = np.zeros_like(rows)
        else:
            totals = self._group.total(f"{self._layer}.backward.{self._answer}", rows)
            self._group.unanswered[self._layer].discard(self._answer)

        def combine(k: int) -> None:
            passes, own = passes_for(xs[k]), saved[k]
            dbeta, product = np.split(totals[k], 2)
            b = -own.scale * own.inverse_std**2 * product / own.values
            c = -own.scale * dbeta / own.values - (own.mean - own.center) * b
            self._write(req[k], in_grad[k], lambda dx: passes.combine(dys[k], xs[k], own.center, own.scale, b, c, dx))

        _side_by_side(combine, range(n))

    def _statistics(self, total: np.ndarray, gamma: np.ndarray, dtype: Any) -> _Statistics:
        first, second, (count,) = np.split(total, [len(gamma), 2 * len(gamma)])
        mean = first / count
        var = np.maximum(second / count - mean * mean, 0.0)  # rounding may leave a constant channel just below zero
        inverse_std = 1 / np.sqrt(var + self._eps)
        center = mean.astype(dtype if dtype != np.float16 else np.float32).astype(np.float64)
        return _Statistics(count, mean, var, center, inverse_std, gamma * inverse_std)

    def _given_statistics(self, aux: list[Any], gamma: np.ndarray) -> _Statistics:
        mean, var = _host(aux[0]), _host(aux[1])
        inverse_std = 1 / np.sqrt(var + self._eps)
        return _Statistics(1.0, mean, var, mean, inverse_std, gamma * inverse_std)

    def _update_running(self, saved: list[_Statistics], aux: list[Any]) -> None:
        unbiased = self._group.unbiased
        found = [(own.mean, own.var * own.values / max(own.values - 1, 1) if unbiased else own.var) for own in saved]
        if not self._group.synchronize:
            self._group.moments.setdefault(self._layer, []).append(np.array(found))
            return
        for running, value in zip(aux, found[0]):
            running[:] = self._momentum * _host(running) + (1 - self._momentum) * value

    def _number_backward(self) -> None:
        # The backwards of a layer that is used twice may run side by side, and each needs a name for its allreduce that
        # is the same on all ranks. Forward writes the running statistics, so MXNet's engine runs the forwards of a
        # layer one by one in the program's order, and never beside a backward: the smallest free number is the same.
        unanswered = self._group.unanswered.setdefault(self._layer, set())
        self._answer = next(index for index in range(len(unanswered) + 1) if index not in unanswered)
        unanswered.add(self._answer)

    def _gamma(self, gamma: mx.nd.NDArray) -> np.ndarray:
        return np.ones(gamma.shape) if self._fix_gamma else _host(gamma)

    def _flat(self, array: mx.nd.NDArray) -> mx.nd.NDArray:
        """A view of shape (N, C, S): what is before the channel axis, the channels, what is after it."""
        axis = self._axis % array.ndim
        shape = array.shape
        return array.reshape((math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])))

    def _write(self, req: str, target: mx.nd.NDArray, compute: Callable[[mx.nd.NDArray], None]) -> None:
        """Let ``compute`` write into ``target`` as MXNet requests: not at all, over what is there, or added to it."""
        if req == "add":
            addend = mx.nd.empty(target.shape, ctx=target.context, dtype=target.dtype)
            compute(self._flat(addend))
            target += addend
        elif req != "null":
            compute(self._flat(target))


def _moments(x: mx.nd.NDArray) -> np.ndarray:
    """The row of a shard: n mean, M2 + n mean^2, n."""
    count = x.shape[0] * x.shape[2]
    mean, m2 = passes_for(x).moments(x)
    return np.concatenate([count * mean, m2 + count * mean * mean, [count]])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="batch_norm")


def _side_by_side(function: Callable[[Any], Any], shards: Iterable[Any]) -> list[Any]:
    """``function`` of each shard, on as many threads as MXNet computes operators with."""
    shards = list(shards)
    threads = min(len(shards), int(os.environ.get("MXNET_CPU_WORKER_NTHREADS") or 1))
    if threads == 1:
        return [function(one) for one in shards]
    try:
        return list(_pool(threads).map(function, shards))
    except RuntimeError:  # a backward that nobody waited for, while the interpreter ends and takes no more work
        return [function(one) for one in shards]


def _host(array: mx.nd.NDArray) -> np.ndarray:
    return array.asnumpy().astype(np.float64)


def _assign(target: mx.nd.NDArray, req: str, values: np.ndarray) -> None:
    if req != "null":
        target[:] = values + _host(target) if req == "add" else values
