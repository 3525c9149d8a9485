"""The operator of synchronized BatchNorm: of one layer, for all of a rank's shards at once.

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

Two classes compute this. :class:`_HostOp`, for the CPU, does it at once, in numpy and compiled loops, and waits for the
other ranks in between. :class:`job.operators.queued_batch_norm.QueuedOp`, for GPUs, queues all of it on the device.
:meth:`_SyncBatchNormProp.create_operator` takes one of them.

Sources: Ioffe and Szegedy, "Batch normalization", 2015, for the gradient; Chan, Golub and LeVeque, 1979, for the merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import mxnet as mx
import numpy as np

from job.distributed.comm import Comm
from job.operators.fused import RELU, RELU_MAX_POOL, can_fuse, passes_for
from job.operators.group import GROUPS, Group
from job.operators.kernels import HostViews, Kept
from job.operators.queued_batch_norm import QueuedOp
from job.operators.queued_passes import Options
from job.operators.side_by_side import side_by_side, write
from job.operators.tried_passes import queued_passes

SYNC_BATCH_NORM = "sync_batch_norm"


def tails_for(ctx: mx.Context, dtype: Any) -> Sequence[str]:
    """What the operator can do behind BatchNorm in the same passes, on that device and for that type."""
    passes = queued_passes(ctx, dtype)
    if passes is not None:
        return passes.tails
    return (RELU, RELU_MAX_POOL) if can_fuse(ctx, dtype) else ()


@mx.operator.register(SYNC_BATCH_NORM)
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
        tail: str = "",
    ) -> None:
        super().__init__(need_top_grad=True)
        if group not in GROUPS:  # an exception here would be printed by MXNet, and end in a crash
            GROUPS[group] = Group(Comm(), range(int(shards)), int(shards))
        self._shards = int(shards)
        self._axis = int(axis)
        self._tail = tail
        self._options = (GROUPS[group], layer, self._shards, self._axis, float(eps), float(momentum))
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
        outputs = [[n, c, h // 2, w // 2] for n, c, h, w in data] if self._tail == RELU_MAX_POOL else data
        return [*data, *([channels] * 2 * self._shards)], outputs, [channels, channels]

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

    def create_operator(self, ctx: mx.Context, in_shapes: Any, in_dtypes: Any) -> mx.operator.CustomOp:
        group, layer, shards, axis, eps, momentum = self._options
        dtype = mx.nd.ndarray._DTYPE_MX_TO_NP[in_dtypes[0]]  # MXNet's numbers of types, whatever its documentation says
        passes = queued_passes(ctx, dtype)
        if passes is None:
            return _HostOp(group, layer, shards, axis, eps, momentum, self._fix_gamma, self._tail, dtype)
        options = Options(eps, momentum, self._fix_gamma, group.unbiased, group.whole, self._tail == RELU)
        return QueuedOp(group, layer, shards, axis, options, passes)


class _Statistics(NamedTuple):
    """What the values are normalized by, in float64: a row for all shards together, or one for each of them."""

    values: np.ndarray  # how many, (rows, 1); the rest (rows, channels)
    mean: np.ndarray
    var: np.ndarray
    center: np.ndarray  # the mean as rounded to the type that is computed in
    inverse_std: np.ndarray
    scale: np.ndarray


class _HostOp(mx.operator.CustomOp):
    """One use of a layer in a forward pass, and its backward, on the CPU."""

    def __init__(
        self,
        group: Group,
        layer: str,
        shards: int,
        axis: int,
        eps: float,
        momentum: float,
        fix_gamma: bool,
        tail: str,
        dtype: Any,
    ) -> None:
        super().__init__()
        self._group, self._layer, self._shards = group, layer, shards
        self._axis, self._eps, self._momentum, self._fix_gamma = axis, eps, momentum, fix_gamma
        self._tail, self._dtype = tail, dtype
        self._saved: Optional[_Statistics] = None
        self._kept: list[Kept] = [None] * shards
        self._answer: Optional[int] = None  # the number of the allreduce of backward; none after inference
        self._memory = HostViews()

    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        n = self._shards
        passes = passes_for(self._tail)
        xs, ys = self._views("x", in_data[:n]), self._views("y", out_data)
        running = self._memory("running", aux)
        gamma, beta = (of.astype(np.float64) for of in self._memory("vectors", [in_data[n], in_data[2 * n]]))
        if self._fix_gamma:
            gamma = np.ones_like(gamma)

        if is_train:
            rows = np.stack(side_by_side(lambda k: _row(xs[k], *passes.moments(xs[k])), range(n)))
            totals = self._group.total(f"{self._layer}.forward", rows)
            saved = self._statistics(totals[:1] if self._group.whole else totals, gamma)
            self._update_running(saved, running)
            self._answer = self._group.number_backward(self._layer)
        else:
            saved = self._given_statistics(running, gamma)
            self._answer = None
        self._saved = saved

        shift = beta - (saved.mean - saved.center) * saved.scale
        vectors = self._of_each_shard(saved.center, saved.scale, shift)

        def normalize(k: int) -> None:
            def compute(y: Any) -> None:
                own_center, own_scale, own_shift = vectors[k]
                self._kept[k] = passes.affine(xs[k], own_center, own_scale, own_shift, y)

            write(req[k], ys[k], compute)

        side_by_side(normalize, range(n))

    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        n, saved, kept = self._shards, self._saved, self._kept
        assert saved is not None, "MXNet runs a backward after its forward"
        passes = passes_for(self._tail)
        xs, dys, dxs = self._views("x", in_data[:n]), self._views("dy", out_grad), self._views("dx", in_grad[:n])
        centers = self._of_each_shard(saved.center)

        found = side_by_side(lambda k: passes.products(dys[k], xs[k], kept[k], *centers[k]), range(n))
        dbeta, product = (np.stack(vectors) for vectors in zip(*found))
        product -= (saved.mean - saved.center) * dbeta
        dgamma = np.zeros_like(product) if self._fix_gamma else product * saved.inverse_std
        for gradient, how, values in zip(self._memory("gradients", in_grad[n:]), req[n:], (*dgamma, *dbeta)):
            if how != "null":
                gradient[:] = values + gradient.astype(np.float64) if how == "add" else values

        if self._answer is None:  # the statistics were given, so that nothing flows through them
            b = c = np.zeros_like(dbeta)
        else:
            totals = self._group.total(f"{self._layer}.backward.{self._answer}", np.hstack([dbeta, product]))
            self._group.unanswered[self._layer].discard(self._answer)
            dbeta, product = np.split(totals[: len(saved.mean)], 2, axis=1)
            b = -saved.scale * saved.inverse_std**2 * product / saved.values
            c = -saved.scale * dbeta / saved.values - (saved.mean - saved.center) * b
        vectors = self._of_each_shard(saved.center, saved.scale, b, c)

        def combine(k: int) -> None:
            center, scale, own_b, own_c = vectors[k]
            write(req[k], dxs[k], lambda dx: passes.combine(dys[k], xs[k], kept[k], center, scale, own_b, own_c, dx))

        side_by_side(combine, range(n))

    def _statistics(self, totals: np.ndarray, gamma: np.ndarray) -> _Statistics:
        first, second, count = np.split(totals, [len(gamma), 2 * len(gamma)], axis=1)
        mean = first / count
        var = np.maximum(second / count - mean * mean, 0.0)  # rounding may leave a constant channel just below zero
        inverse_std = 1 / np.sqrt(var + self._eps)
        center = mean.astype(self._dtype).astype(np.float64)
        return _Statistics(count, mean, var, center, inverse_std, gamma * inverse_std)

    def _views(self, name: str, arrays: list[Any]) -> list[np.ndarray]:
        """As the passes take them."""
        passes = passes_for(self._tail)
        return [passes.view(memory, self._axis) for memory in self._memory(name, arrays)]

    def _given_statistics(self, running: list[np.ndarray], gamma: np.ndarray) -> _Statistics:
        mean, var = (of.astype(np.float64)[None] for of in running)
        inverse_std = 1 / np.sqrt(var + self._eps)
        return _Statistics(np.ones((1, 1)), mean, var, mean, inverse_std, gamma * inverse_std)

    def _of_each_shard(self, *vectors: np.ndarray) -> list[list[np.ndarray]]:
        """For each shard its rows of the vectors, (channels,), in the type that is computed in."""
        narrow = [vector.astype(self._dtype) for vector in vectors]
        return [[rows[min(k, len(rows) - 1)] for rows in narrow] for k in range(self._shards)]

    def _update_running(self, saved: _Statistics, running: list[np.ndarray]) -> None:
        unbiased = self._group.unbiased
        var = saved.var * saved.values / np.maximum(saved.values - 1, 1) if unbiased else saved.var
        if not self._group.whole:
            self._group.moments.setdefault(self._layer, []).append(np.stack([saved.mean, var], axis=1))
            return
        for of, values in zip(running, (saved.mean, var)):
            of[:] = self._momentum * of.astype(np.float64) + (1 - self._momentum) * values[0]


def _row(x: Any, mean: np.ndarray, m2: np.ndarray) -> np.ndarray:
    """Of a shard: n mean, M2 + n mean^2, n."""
    count = math.prod(x.shape) // x.shape[1]
    return np.concatenate([count * mean, m2 + count * mean * mean, [count]])
