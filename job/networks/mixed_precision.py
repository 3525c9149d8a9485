"""Mixed precision: a network whose convolutions and dense layers compute in float16, from weights in float32.

What runs in which type is MXNet's own judgement, that of its ``contrib.amp``: convolutions and dense layers in float16,
what sums many numbers or has a large range (softmax, norms, exponentials) in float32, and the rest in the type of what
it reads. Casts stand where types meet. So the parameters stay float32, and so do their gradients: they are the master
weights, and whoever updates, keeps, averages or exports them sees no difference.

Source: Micikevicius et al., "Mixed precision training", 2018.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np

from job.errors import UsageError
from job.networks.others import said

_IN_FLOAT32 = ["Dropout"]  # as its mask is
_IN_FLOAT32_IF = [("LeakyReLU", "act_type", ["elu", "selu", "prelu"])]  # amp forgets that the last one has a weight
# What MXNet 1.9.1 computes in float16 on GPUs alone (the others that a CPU lacks amp leaves in float32 everywhere).
_LACKING_ON_CPU = {"Convolution", "FullyConnected", "RNN", "dot", "batch_dot"}


def in_float16(symbol: mx.sym.Symbol, ctx: mx.Context) -> mx.sym.Symbol:
    """``symbol``, of inputs and parameters in float32, with float16 in between. Its outputs are float32 again.

    On a CPU what it has no float16 for computes in float32 from what was rounded to float16, and its results are
    rounded likewise: the same types between operators as on a GPU, and no gain in speed.

    Raises:
        UsageError: operators would get types that they do not take.
    """
    from mxnet.contrib import amp  # which takes its time, and most runs are in float32

    lists = {
        "fp32_ops": [*amp.list_fp32_ops("float16"), *_IN_FLOAT32],
        "conditional_fp32_ops": [
            *(rule for rule in amp.list_conditional_fp32_ops("float16") if rule[0] != "LeakyReLU"),
            *_IN_FLOAT32_IF,
        ],
    }
    try:
        mixed = amp.convert_symbol(symbol, "float16", **lists)
        types = output_types(mixed)
    except mx.MXNetError as error:
        raise UsageError(f"model.dtype=float16 cannot be had for this network: {said(error)}") from None
    return _with_casts(mixed, types) if ctx.device_type == "cpu" else mixed


def _with_casts(symbol: mx.sym.Symbol, types: Mapping[str, Any]) -> mx.sym.Symbol:
    """``symbol`` with casts around what a CPU has no float16 for."""
    graph = json.loads(symbol.tojson(remove_amp_cast=False))
    written: list[dict[str, Any]] = []
    places: dict[tuple[int, int], list[int]] = {}  # of an output, where it stands now

    def add(node: dict[str, Any], inputs: Sequence[list[int]]) -> int:
        written.append({**node, "inputs": list(inputs)})
        return len(written) - 1

    def cast(entry: list[int], name: str, dtype: str) -> list[int]:
        node = {"op": "Cast", "name": f"{name}_{dtype}", "attrs": {"dtype": dtype}}
        return [add(node, [entry]), 0, 0]

    for index, node in enumerate(graph["nodes"]):
        name, inputs = node["name"], [places[source[0], source[1]] for source in node["inputs"]]
        lacking = node["op"] in _LACKING_ON_CPU and types[name] == np.float16
        if lacking:
            inputs = [cast(entry, f"{name}_input{k}", "float32") for k, entry in enumerate(inputs)]
        place = add(node, inputs)
        outputs = graph["node_row_ptr"][index + 1] - graph["node_row_ptr"][index]
        for k in range(outputs):
            entry = [place, k, 0]
            places[index, k] = cast(entry, f"{name}_output{k}", "float16") if lacking else entry

    heads = [places[head[0], head[1]] for head in graph["heads"]]
    arguments = [index for index, node in enumerate(written) if node["op"] == "null"]
    text = json.dumps({"nodes": written, "arg_nodes": arguments, "heads": heads, "attrs": graph["attrs"]})
    return mx.sym.load_json(text)


def output_types(symbol: mx.sym.Symbol) -> dict[str, Any]:
    """The type of the first output of each operator, and of each variable, by name; all variables are float32.

    Raises:
        mxnet.MXNetError: an operator gets a type that it does not take.
    """
    internals = symbol.get_internals()
    _, types, _ = internals.infer_type(**dict.fromkeys(symbol.list_arguments(), "float32"))
    found: dict[str, Any] = {}
    for output, dtype in zip(internals.list_outputs(), types):
        found.setdefault(output.rpartition("_output")[0] or output, dtype)
    return found
