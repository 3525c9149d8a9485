"""BatchNorm whose statistics are those of the global batch: a layer for any training loop of MXNet Gluon over Horovod.

The operator and its mathematics are in :mod:`job.operators.batch_norm`.
"""

from __future__ import annotations

import copy
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from job.distributed.comm import Comm
from job.errors import UsageError
from job.operators.batch_norm import SYNC_BATCH_NORM
from job.operators.group import Group


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
        # Where no static plan holds it, MXNet 1.9.1 frees what it makes of an array in oneDNN's layout, that of a CPU,
        # before a custom operator reads it. A product is in the plain layout, and so is the gradient of one.
        names = {"op_type": SYNC_BATCH_NORM, "group": self.group.key, "layer": "0", "name": "fwd"}
        plain = F is mx.nd and x.context.device_type == "cpu"
        y = F.Custom(x * 1.0 if plain else x, *ordered, **names, **options)
        y = y * 1.0 if plain else y
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
