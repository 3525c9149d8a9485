"""The graph that leaves a run: from uint8 pixels to probabilities, plain MXNet operators and nothing else.

Every name in it follows from its place, so that the same network gives the same bytes, whoever traced what before.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np

from job.data.dataset import Description
from job.errors import CheckpointError
from job.exporting.served import Model, input_shape
from job.exporting.trained import Trained
from job.networks import models
from job.networks.others import said

IMAGES, PROBABILITIES = "images", "probabilities"  # what goes in, what comes out
_BATCH_NORMS = {"BatchNorm", "_contrib_SyncBatchNorm", "_contrib_BatchNormWithReLU"}
_OTHER_NETWORK = "the network has changed since the run; the weights are of another one"
_BATCH_NORM_OPTIONS = ("axis", "eps", "momentum", "fix_gamma", "use_global_stats")


class Graph(NamedTuple):
    """A symbol, and the arrays that it needs beside its input, by name."""

    symbol: mx.sym.Symbol
    arrays: dict[str, np.ndarray]


def network(trained: Trained) -> Graph:
    """The network alone: of scaled pixels ``images`` (N, channels, height, width) it makes (N, classes), no softmax.

    Raises:
        UsageError: the network cannot be built.
        CheckpointError: it is not the one that the weights are of.
    """
    return _traced(trained, mx.sym.var(IMAGES), trained.about.shape, trained.weights, softmax=False)


def classifier(trained: Trained, dtype: str, guarded: bool) -> Graph:
    """Of ``images``, uint8 as in :func:`~job.exporting.served.input_shape`, it makes ``probabilities`` (N, classes).

    Args:
        trained: the network.
        dtype: of weights and activations.
        guarded: whether the graph itself refuses pixels of another type or size, where its format does not say them.

    Raises:
        UsageError: the network cannot be built.
        CheckpointError: it is not the one that the weights are of.
    """
    channels, height, width = trained.about.shape
    pixels = mx.sym.reshape(mx.sym.var(IMAGES), shape=(0, 0, 0, -1))  # grey ones have no axis of channels
    if guarded:  # a sum takes neither another type nor another size
        pixels = mx.sym.broadcast_add(pixels, mx.sym.zeros((1, height, width, channels), dtype="uint8"))
    arrays = {name: array.astype(dtype) for name, array in trained.weights.items()}
    scaled = _scaled(pixels.transpose(axes=(0, 3, 1, 2)), trained.about, dtype, arrays)
    return _traced(trained, scaled, input_shape(trained.about), arrays, softmax=True)


def _scaled(pixels: mx.sym.Symbol, about: Description, dtype: str, arrays: dict[str, np.ndarray]) -> mx.sym.Symbol:
    """As a :class:`~job.data.dataset.Description` says that a network is fed."""
    scaled = pixels.astype(dtype) / 255
    if about.scales_only:
        return scaled
    for name in ("mean", "std"):
        arrays[f"{IMAGES}.{name}"] = np.array(getattr(about, name), dtype).reshape(1, -1, 1, 1)
    centred = mx.sym.broadcast_sub(scaled, mx.sym.var(f"{IMAGES}.mean"))
    return mx.sym.broadcast_div(centred, mx.sym.var(f"{IMAGES}.std"))


def _traced(
    trained: Trained, data: mx.sym.Symbol, fed: tuple[int, ...], arrays: Mapping[str, np.ndarray], softmax: bool
) -> Graph:
    net = models.build(trained.model, len(trained.about.classes), trained.about.shape)
    parameters = net._collect_params_with_prefix()
    if differing := sorted({*parameters} ^ {*trained.weights}):
        raise CheckpointError(f"{_OTHER_NETWORK}: only one of the two has {', '.join(differing[:5])}")
    symbol = net(data)
    places: dict[str, str] = {}
    for place, parameter in parameters.items():
        places.setdefault(parameter.name, place)  # one that is used twice has two places
    symbol = _named_by_place(mx.sym.softmax(symbol, axis=1) if softmax else symbol, places)
    _require_alike(symbol, fed, arrays)
    return Graph(symbol, {name: arrays[name] for name in symbol.list_inputs() if name != IMAGES})


def _named_by_place(symbol: mx.sym.Symbol, places: Mapping[str, str]) -> mx.sym.Symbol:
    """The graph with plain BatchNorm and with names that nothing but the graph decides."""
    traced = json.loads(symbol.tojson())
    nodes: list[dict[str, Any]] = []
    moved: list[int] = []  # where the nodes of the traced graph have gone
    seen: Counter[str] = Counter()

    def add(operator: str, attributes: Mapping[str, str], inputs: list[list[int]]) -> None:
        nodes.append(
            {"op": operator, "name": f"{operator}_{seen[operator]}", "attrs": dict(attributes), "inputs": inputs}
        )
        seen[operator] += 1

    for node in traced["nodes"]:
        operator, attributes = node["op"], node.get("attrs", {})
        inputs = [[moved[source[0]], source[1], 0] for source in node["inputs"]]
        if operator == "null":
            nodes.append({"op": "null", "name": places.get(node["name"], node["name"]), "inputs": []})
        elif operator in _BATCH_NORMS:
            add("BatchNorm", {key: attributes[key] for key in _BATCH_NORM_OPTIONS if key in attributes}, inputs)
            if operator.endswith("ReLU"):
                add("Activation", {"act_type": "relu"}, [[len(nodes) - 1, 0, 0]])
        else:
            add(operator, attributes, inputs)
        moved.append(len(nodes) - 1)
    head = moved[traced["heads"][0][0]]
    nodes[head]["name"] = PROBABILITIES
    variables = [index for index, node in enumerate(nodes) if node["op"] == "null"]
    heads = [[head, traced["heads"][0][1], 0]]
    return mx.sym.load_json(
        json.dumps({"nodes": nodes, "arg_nodes": variables, "heads": heads, "attrs": traced["attrs"]})
    )


def _require_alike(symbol: mx.sym.Symbol, fed: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> None:
    shapes = {name: arrays[name].shape for name in symbol.list_inputs() if name != IMAGES}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where MXNet lists the arguments of what it refuses
            symbol.infer_shape(**{IMAGES: (1, *fed)}, **shapes)
    except mx.MXNetError as error:
        raise CheckpointError(f"{_OTHER_NETWORK}: {said(error)}") from None


def model(trained: Trained) -> Model:
    """The classifier that would be exported, computed as it is by MXNet."""
    graph = classifier(trained, trained.model.weights_dtype, guarded=True)
    operator = mx.nd.CachedOp(graph.symbol)
    arrays = {name: mx.nd.array(array, dtype=array.dtype) for name, array in graph.arrays.items()}
    order = graph.symbol.list_inputs()

    def probabilities(pixels: np.ndarray) -> np.ndarray:
        images = mx.nd.array(pixels, dtype=np.uint8)
        found: np.ndarray = operator(*(images if name == IMAGES else arrays[name] for name in order)).asnumpy()
        return found

    return Model(trained.about, probabilities)
