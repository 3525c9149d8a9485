"""BatchNorm whose statistics are those of the global batch, for MXNet Gluon over Horovod.

The mathematics (docs/sync_batch_norm.md derives it). A channel has n_r values on rank r and n = sum of n_r on all.

forward   each rank reduces its values to (n_r, mean_r, M2_r), M2 being the sum of squared deviations; one allreduce of
          (n_r mean_r, M2_r + n_r mean_r^2, n_r) in float64 merges them:

              mean = sum(n_r mean_r) / n         var = sum(M2_r + n_r mean_r^2) / n - mean^2
              x^ = (x - mean) / sqrt(var + eps)  y = gamma x^ + beta

backward  one allreduce of (sum dy, sum dy (x - mean)):

              dbeta = sum dy                     dgamma = sum dy x^           both of this rank's samples only
              dx = gamma / sqrt(var + eps) (dy - sum dy / n - x^ sum(dy x^) / n)     sums over all ranks

dgamma and dbeta stay local because the trainer sums them over ranks like every other gradient.

Sources: Ioffe and Szegedy, "Batch normalization", 2015, for the gradient; Chan, Golub and LeVeque, 1979, for the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional
from weakref import WeakValueDictionary

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from job.distributed.comm import Comm
from job.errors import PeerLostError
from job.networks.kernels import passes_for

# MXNet hands a custom operator nothing but strings, so that it finds its layer by name.
_LAYERS: WeakValueDictionary[str, SyncBatchNorm] = WeakValueDictionary()


class SyncBatchNorm(nn.BatchNorm):
    """A drop-in for ``gluon.nn.BatchNorm`` that normalizes by the mean and variance of the global batch.

    Takes the arguments of ``gluon.nn.BatchNorm``, and has its parameters, names and shapes. Input: 2-D to 5-D, float16,
    float32 or float64, its channels on ``axis``; ranks may hold different numbers of samples, but the same channels.
    Output: of the input's shape and type. It hybridizes like any other block.

    In training every rank of ``comm`` must run forward and backward, in the same order on all; a rank that never does
    ends the others when the time limit of ``comm`` is over. Inference never communicates.

    Args:
        comm: the ranks that share statistics.
        unbiased: whether running_var takes the unbiased estimate of the variance, n / (n - 1) times the biased one by
            which the batch is normalized. MXNet itself takes the biased one on the CPU, the unbiased one with cuDNN.
    """

    def __init__(self, *args: Any, comm: Comm, unbiased: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._synchronize(comm, unbiased)

    def _synchronize(self, comm: Comm, unbiased: bool) -> None:
        self.comm = comm
        self.unbiased = unbiased
        self.key = comm.fresh_name("sync_batch_norm")
        self.unanswered: set[int] = set()  # numbers of the forwards whose backward is still to come
        _LAYERS[str(id(self))] = self

    def hybrid_forward(self, F: Any, x: Any, **parameters: Any) -> Any:
        """Gluon's hook; ``F`` is ``mx.nd`` or ``mx.sym``."""
        if self._kwargs["use_global_stats"]:
            return super().hybrid_forward(F, x, **parameters)
        ordered = [parameters[name] for name in ("gamma", "beta", "running_mean", "running_var")]
        y = F.Custom(x, *ordered, op_type="sync_batch_norm", layer=str(id(self)), name="fwd")
        return F.relu(y) if self.fuse_relu else y


def convert_sync_batch_norm(net: gluon.Block, comm: Comm, unbiased: bool = False) -> int:
    """Turn every BatchNorm of ``net`` into a :class:`SyncBatchNorm` in place, and return how many there were.

    Parameters, their names and values, and whoever refers to a layer stay as they are. Call it on all ranks, before or
    after initialization, on a network that is hybridized or not.
    """
    layers: dict[int, nn.BatchNorm] = {}
    net.apply(lambda block: layers.setdefault(id(block), block) if type(block) in _CONVERTIBLE else None)
    for layer in layers.values():
        layer._kwargs = {"axis": 1, **{key: layer._kwargs[key] for key in _OPTIONS if key in layer._kwargs}}
        layer.__class__ = SyncBatchNorm
        layer._synchronize(comm, unbiased)
    net.apply(lambda block: block._clear_cached_op() if isinstance(block, gluon.HybridBlock) else None)
    return len(layers)


# gluon.contrib's SyncBatchNorm synchronizes the GPUs of one process; across processes it does nothing.
_CONVERTIBLE = (nn.BatchNorm, nn.BatchNormReLU, gluon.contrib.nn.SyncBatchNorm)
_OPTIONS = ("axis", "eps", "momentum", "fix_gamma", "use_global_stats")


@mx.operator.register("sync_batch_norm")
class _SyncBatchNormProp(mx.operator.CustomOpProp):
    """What MXNet needs to know of the operator before it runs: names, shapes, types, and what backward depends on."""

    def __init__(self, layer: str) -> None:
        super().__init__(need_top_grad=True)
        self._layer = _LAYERS[layer]

    def list_arguments(self) -> list[str]:
        return ["data", "gamma", "beta"]

    def list_auxiliary_states(self) -> list[str]:
        return ["running_mean", "running_var"]

    def infer_shape(self, in_shape: list[list[int]]) -> tuple[list[Any], list[Any], list[Any]]:
        channels = [in_shape[0][self._layer._kwargs["axis"]]]
        return [in_shape[0], channels, channels], [in_shape[0]], [channels, channels]

    def infer_type(self, in_type: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        data = in_type[0]
        parameter = np.float32 if data == np.float16 else data
        return [data, parameter, parameter], [data], [parameter, parameter]

    def declare_backward_dependency(self, out_grad: list[int], in_data: list[int], out_data: list[int]) -> list[int]:
        # Not gamma: backward may run after the trainer's update of it has been queued, and must use the old one.
        return [out_grad[0], in_data[0]]

    def create_operator(self, ctx: str, in_shapes: Any, in_dtypes: Any) -> mx.operator.CustomOp:
        return _SyncBatchNormOp(self._layer)


class _SyncBatchNormOp(mx.operator.CustomOp):
    """One use of a layer in a forward pass, and its backward."""

    def __init__(self, layer: SyncBatchNorm) -> None:
        super().__init__()
        self._layer = layer
        self._answer: Optional[int] = None  # the number of the allreduce of backward; none after inference

    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        layer = self._layer
        if not is_train:
            self._forward_inference(req, in_data, out_data, aux)
            return
        x = self._flat(in_data[0])
        passes = passes_for(x)
        gamma, beta = self._gamma(in_data[1]), _host(in_data[2])

        local_count = x.shape[0] * x.shape[2]
        local_mean, local_m2 = passes.moments(x)
        first = local_count * local_mean
        first, second, (count,) = self._sum("forward", first, local_m2 + first * local_mean, np.array([local_count]))
        mean = first / count
        var = np.maximum(second / count - mean * mean, 0.0)  # rounding may leave a constant channel just below zero
        inverse_std = 1 / np.sqrt(var + layer._kwargs["eps"])

        center = mean.astype(x.dtype if x.dtype != np.float16 else np.float32).astype(np.float64)
        scale = gamma * inverse_std
        self._write(req[0], out_data[0], lambda y: passes.affine(x, center, scale, beta - (mean - center) * scale, y))
        estimate = var * count / max(count - 1, 1) if layer.unbiased else var
        momentum = layer._kwargs["momentum"]
        for running, value in zip(aux, (mean, estimate)):
            running[:] = momentum * _host(running) + (1 - momentum) * value
        self._saved = (count, mean, center, inverse_std, scale)
        # The backwards of a layer that is used twice may run side by side, and each needs a name for its allreduce that
        # is the same on all ranks. Forward writes the running statistics, so MXNet's engine runs the forwards of a
        # layer one by one in the program's order, and never beside a backward: the smallest free number is the same.
        self._answer = next(index for index in range(len(layer.unanswered) + 1) if index not in layer.unanswered)
        layer.unanswered.add(self._answer)

    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        dy, x = self._flat(out_grad[0]), self._flat(in_data[0])
        passes = passes_for(x)
        count, mean, center, inverse_std, scale = self._saved

        dbeta, product = passes.products(dy, x, center)
        product -= (mean - center) * dbeta
        dgamma = np.zeros_like(product) if self._layer._kwargs["fix_gamma"] else product * inverse_std
        _assign(in_grad[1], req[1], dgamma)
        _assign(in_grad[2], req[2], dbeta)
        if self._answer is None:  # the statistics were given, so that nothing flows through them
            a, b, c = scale, np.zeros_like(scale), np.zeros_like(scale)
        else:
            dbeta, product = self._sum(f"backward.{self._answer}", dbeta, product)
            self._layer.unanswered.discard(self._answer)
            a = scale
            b = -scale * inverse_std**2 * product / count
            c = -scale * dbeta / count - (mean - center) * b
        self._write(req[0], in_grad[0], lambda dx: passes.combine(dy, x, center, a, b, c, dx))

    def _forward_inference(self, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        self.assign(out_data[0], req[0], mx.nd.BatchNorm(*in_data, *aux, **self._layer._kwargs))
        mean, inverse_std = _host(aux[0]), 1 / np.sqrt(_host(aux[1]) + self._layer._kwargs["eps"])
        self._saved = (None, mean, mean, inverse_std, self._gamma(in_data[1]) * inverse_std)
        self._answer = None

    def _gamma(self, gamma: mx.nd.NDArray) -> np.ndarray:
        return np.ones(gamma.shape) if self._layer._kwargs["fix_gamma"] else _host(gamma)

    def _flat(self, array: mx.nd.NDArray) -> mx.nd.NDArray:
        """A view of shape (N, C, S): what is before the channel axis, the channels, what is after it."""
        axis = self._layer._kwargs["axis"] % array.ndim
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

    def _sum(self, direction: str, *vectors: np.ndarray) -> list[np.ndarray]:
        """The sum of each vector over all ranks."""
        layer = self._layer
        packed = np.concatenate(vectors)
        try:
            packed = layer.comm.sum(packed, f"{layer.key}.{direction}")
        except PeerLostError:
            # Raised here, MXNet would print it with a traceback. Nothing is gained by these numbers: the next
            # collective, that of the gradients, fails too and stops the caller, before any weight has changed.
            packed = np.full_like(packed, np.nan)
        return np.split(packed, np.cumsum([len(vector) for vector in vectors])[:-1])


def _host(array: mx.nd.NDArray) -> np.ndarray:
    return array.asnumpy().astype(np.float64)


def _assign(target: mx.nd.NDArray, req: str, values: np.ndarray) -> None:
    if req != "null":
        target[:] = values + _host(target) if req == "add" else values
