"""The operator of a convolution: of one layer, for all of a rank's shards at once."""

from __future__ import annotations

import re
from typing import Any

import mxnet as mx
import numpy as np

from job.operators import convolution_loops
from job.operators.kernels import HostViews
from job.operators.side_by_side import side_by_side, write

DIRECT = "direct_convolution"
_VECTOR = 16  # numbers of float32; of as many channels, or a multiple, oneDNN has fast kernels


def is_better_direct(node: dict[str, Any]) -> bool:
    """Whether our own loops compute an operator of a traced graph, and sooner than MXNet does."""
    options = {"dilate": "(1, 1)", "stride": "(1, 1)", "num_group": "1", "layout": "NCHW", **node.get("attrs", {})}
    return (
        node["op"] == "Convolution"
        and len(_numbers(options["kernel"])) == 2
        and options["kernel"] != "(1, 1)"  # for which multiplying matrices is right
        and {*_numbers(options["stride"]), *_numbers(options["dilate"]), int(options["num_group"])} == {1}
        and options["layout"] in ("NCHW", "None")
        and int(options["num_filter"]) % _VECTOR > 0
        and all(around < side for around, side in zip(_pad(options), _numbers(options["kernel"])))
    )


def _pad(options: dict[str, str]) -> tuple[int, ...]:
    return _numbers(options.get("pad", "")) or (0, 0)


def _numbers(text: str) -> tuple[int, ...]:
    """Of ``(3, 3)``, as the attributes of a graph have it."""
    return tuple(map(int, re.findall(r"\d+", text)))


@mx.operator.register(DIRECT)
class _DirectConvolutionProp(mx.operator.CustomOpProp):
    """What MXNet needs to know of the operator before it runs.

    Its inputs are the data of each shard of this rank, then the weight once a shard (so that each shard has its
    gradient), then the bias likewise, unless ``no_bias``. Its outputs are the results of each shard.
    """

    def __init__(self, shards: str, num_filter: str, kernel: str, pad: str = "", no_bias: str = "False") -> None:
        super().__init__(need_top_grad=True)
        self._shards, self._channels = int(shards), int(num_filter)
        self._kernel, self._around = _numbers(kernel), _pad({"pad": pad})
        self._has_bias = no_bias not in ("True", "1")

    def list_arguments(self) -> list[str]:
        names = ("data", "weight", "bias") if self._has_bias else ("data", "weight")
        return [f"{name}{k}" for name in names for k in range(self._shards)]

    def list_outputs(self) -> list[str]:
        return [f"output{k}" for k in range(self._shards)]

    def infer_shape(self, in_shape: list[list[int]]) -> tuple[list[Any], list[Any], list[Any]]:
        data = in_shape[: self._shards]
        weight = [self._channels, data[0][1], *self._kernel]
        sides = [
            [side + 2 * around - length + 1 for side, around, length in zip(shape[2:], self._around, self._kernel)]
            for shape in data
        ]
        inputs = [*data, *([weight] * self._shards), *([[self._channels]] * self._shards * self._has_bias)]
        return inputs, [[shape[0], self._channels, *of] for shape, of in zip(data, sides)], []

    def create_operator(self, ctx: str, in_shapes: Any, in_dtypes: Any) -> mx.operator.CustomOp:
        return _DirectConvolution(self._shards, self._around, self._has_bias)

    def declare_backward_dependency(self, out_grad: list[int], in_data: list[int], out_data: list[int]) -> list[int]:
        # Not the weight: backward may run after the trainer's update of it has been queued, and must use the old one.
        return [*out_grad, *in_data[: self._shards]]


class _DirectConvolution(mx.operator.CustomOp):
    def __init__(self, shards: int, pad: tuple[int, ...], has_bias: bool) -> None:
        super().__init__()
        self._shards, self._has_bias = shards, has_bias
        self._pad = (pad[0], pad[1])
        self._weight = np.empty(0)  # of the last forward
        self._memory = HostViews()

    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        n = self._shards
        xs, ys = self._memory("x", in_data[:n]), self._memory("y", out_data)
        self._weight = self._memory.one("weight", 0, in_data[n]).copy()
        channels = len(self._weight)
        bias = self._memory.one("bias", 0, in_data[2 * n]) if self._has_bias else np.zeros(channels, xs[0].dtype)
        packed = convolution_loops.pack(self._weight)

        def compute(k: int) -> None:
            write(req[k], ys[k], lambda y: convolution_loops.forward(xs[k], packed, bias, self._pad, y))

        side_by_side(compute, range(n))

    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        n, pad = self._shards, self._pad
        xs, dys, gradients = self._memory("x", in_data[:n]), self._memory("dy", out_grad), self._memory("dx", in_grad)
        turned = convolution_loops.turn(self._weight)

        def compute(k: int) -> None:
            x, dy = xs[k], dys[k]
            write(req[k], gradients[k], lambda dx: convolution_loops.backward_data(dy, turned, pad, dx))
            write(req[n + k], gradients[n + k], lambda dw: convolution_loops.backward_weight(dy, x, pad, dw))
            if self._has_bias:
                write(req[2 * n + k], gradients[2 * n + k], lambda db: convolution_loops.backward_bias(dy, db))

        side_by_side(compute, range(n))
