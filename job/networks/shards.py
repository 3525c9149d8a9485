"""A network trained shard by shard: the same arithmetic whoever computes it.

The global batch of a step is cut into shards; a rank computes whole shards. All shards of a rank are one graph
(:mod:`job.networks.sharded_graph`): MXNet's engine knows every dependency, and computes them side by side.

VirtualFlow (Or et al., 2022) calls such shards virtual nodes, EasyScale (Li et al., 2022) logical workers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon

from job.distributed.comm import Comm
from job.networks.sharded_graph import Dropout, shard, write_sharded
from job.operators.group import Group


class ShardedNetwork:
    """The training graph of a network: for each shard of this rank its outputs, and its own gradients.

    Args:
        net: initialized; its parameters are the weights, and receive the running statistics.
        symbol: what is computed of a shard: the network's output, or a loss made of it.
        inputs: the names of those arguments of ``symbol`` that are no parameters.
        group: whose statistics are shared; it says how many shards this rank has.
        tails: see :func:`write_sharded`; of those that :func:`job.operators.batch_norm.tails_for` has.
        direct: see there; only where :func:`job.operators.fused.can_fuse` allows it.

    Raises:
        UsageError: the network cannot be trained shard by shard (:func:`write_sharded`).
    """

    def __init__(
        self,
        net: gluon.HybridBlock,
        symbol: mx.sym.Symbol,
        inputs: Sequence[str],
        group: Group,
        tails: Collection[str] = (),
        direct: bool = False,
    ) -> None:
        self.count = len(group.own)
        self.graph = write_sharded(symbol, self.count, group, tails, direct)
        self._parameters = dict(net.collect_params().items())
        self._order = self.graph.symbol.list_inputs()
        masks = [dropout.mask for dropout in self.graph.dropouts]
        fed = {shard(name, k) for name in (*inputs, *masks) for k in range(self.count)}
        self._op = _compile(self.graph.symbol, fed)
        self._arrays, self.gradients = self._weights()
        self._mask_shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}

    def __call__(self, feeds: Sequence[Mapping[str, mx.nd.NDArray]]) -> list[list[mx.nd.NDArray]]:
        """The outputs of each shard, of this rank's shards in turn. In ``autograd.record()`` they have gradients."""
        fed = {shard(name, k): array for k, feed in enumerate(feeds) for name, array in feed.items()}
        outputs = self._op(*(fed[name] if name in fed else self._arrays[name] for name in self._order))
        outputs = outputs if isinstance(outputs, list) else [outputs]
        each = len(outputs) // self.count
        return [outputs[k * each : (k + 1) * each] for k in range(self.count)]

    def mask_shapes(self, **shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each Dropout's mask for one shard, whose inputs have the given shapes."""
        key = tuple(sorted(shapes.items()))
        if key not in self._mask_shapes and self.graph.dropouts:
            self._mask_shapes[key] = self._infer_masks(shapes)
        return self._mask_shapes.get(key, [])

    def _infer_masks(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """One after the other, since what a Dropout reads may come of another one: as if all shards were alike."""
        known = {shard(name, k): shape for name, shape in shapes.items() for k in range(self.count)}
        internals = self.graph.symbol.get_internals()
        outputs = set(internals.list_outputs())
        found = []
        for dropout in self.graph.dropouts:
            name, output = dropout.source
            source = internals[next(n for n in (name, f"{name}_output", f"{name}_output{output}") if n in outputs)]
            _, (shape,), _ = source.infer_shape(**{name: known[name] for name in source.list_inputs() if name in known})
            found.append(tuple(1 if axis in dropout.axes else length for axis, length in enumerate(shape)))
            known.update({shard(dropout.mask, k): found[-1] for k in range(self.count)})
        return found

    def _weights(self) -> tuple[dict[str, mx.nd.NDArray], dict[str, list[mx.nd.NDArray]]]:
        """Each parameter once a shard: an array that shares its memory and has a gradient of its own."""
        arrays: dict[str, mx.nd.NDArray] = {}
        gradients: dict[str, list[mx.nd.NDArray]] = {}
        for name, parameter in self._parameters.items():
            arrays[name] = parameter.data()  # as a running statistic
            for k in range(self.count):
                arrays[shard(name, k)] = parameter.data()
                if parameter.grad_req != "null" and shard(name, k) in self._order:
                    alias = parameter.data().reshape(parameter.shape).detach()
                    gradient = mx.nd.zeros(parameter.shape, alias.context, dtype=alias.dtype)
                    autograd.mark_variables([alias], [gradient])
                    arrays[shard(name, k)] = alias
                    gradients.setdefault(name, []).append(gradient)
        return arrays, gradients


class Inference:
    """A network that no longer trains, in the operators of the training graph.

    Args:
        symbol: its output, of an argument ``data``.
        tails: see :func:`write_sharded`.
        direct: see there.
    """

    def __init__(self, symbol: mx.sym.Symbol, tails: Collection[str] = (), direct: bool = False) -> None:
        alone = Group(Comm(), range(1), 1)
        written = write_sharded(symbol, 1, alone, tails, direct, trains=False).symbol
        self._order = [name.partition("@")[0] for name in written.list_inputs()]
        self._op = _compile(written, {shard("data", 0)})
        # Of its own: inference on a CPU reorders weights where they lie, into a layout of its own.
        self._weights: dict[str, mx.nd.NDArray] = {}

    def load(self, weights: Mapping[str, mx.nd.NDArray]) -> None:
        """Take weights and running statistics, by the names of their parameters."""
        for name, array in weights.items():
            if name in self._weights:
                array.copyto(self._weights[name])
            else:
                self._weights[name] = array.copy()

    def __call__(self, images: mx.nd.NDArray) -> mx.nd.NDArray:
        """The output for images."""
        return self._op(*(images if name == "data" else self._weights[name] for name in self._order))


def _compile(symbol: mx.sym.Symbol, fed: Collection[str]) -> mx.nd.CachedOp:
    """An operator of the whole graph, of which other arrays come at each call for the inputs that are ``fed``."""
    # An input that is in neither list would make all that read it run outside the static plan, where MXNet hands
    # custom operators memory that is already freed.
    order = symbol.list_inputs()
    data = [index for index, name in enumerate(order) if name in fed]
    parameters = [index for index, name in enumerate(order) if name not in fed]
    flags = [("data_indices", data), ("param_indices", parameters), ("static_alloc", True), ("static_shape", True)]
    return mx.nd.CachedOp(symbol, flags)


def dropout_mask(dropout: Dropout, shape: tuple[int, ...], first: int, seed: int, step: int, layer: int) -> np.ndarray:
    """What a Dropout multiplies by, for the samples from ``first`` on of a step's global batch: 0 or 1 / (1 - rate).

    The draws of a sample follow from (seed, step, layer, its place in the batch) alone, through the counter-based
    generator Philox (Salmon et al., 2011).
    """
    blocks = -(-int(np.prod(shape[1:], dtype=np.int64)) // 4)  # of a sample; Philox yields four numbers a block
    generator = np.random.Philox(key=[seed, (step << 16) + layer])
    generator.advance(first * blocks)
    raw = generator.random_raw(shape[0] * blocks * 4).reshape(shape[0], -1)[:, : int(np.prod(shape[1:]))]
    keep = (raw >> np.uint64(11)).reshape(shape) * 2.0**-53 >= dropout.rate
    return keep / (1 - dropout.rate) if dropout.rate < 1 else np.zeros(shape)
