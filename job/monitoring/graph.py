"""A Gluon network as the graph that TensorBoard draws, whose nodes fold as the blocks are nested."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import mxnet as mx
from mxnet import gluon
from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.proto.versions_pb2 import VersionDef


def graph_of(net: gluon.HybridBlock, image_shape: Sequence[int]) -> GraphDef:
    """The operators and parameters of an initialized network, for inputs of (n, ...)."""
    symbol = net(mx.sym.var("data"))
    nodes = json.loads(symbol.tojson())["nodes"]
    internals = symbol.get_internals()
    _, shapes, _ = internals.infer_shape(data=(1, *image_shape))
    shape_of = dict(zip(internals.list_outputs(), shapes))
    scopes = dict(_scopes(net, "", ""))
    names = [_path(node["name"], scopes) for node in nodes]
    graph = GraphDef(versions=VersionDef(producer=22))
    for node, name in zip(nodes, names):
        inputs = [names[source] for source, *_ in node["inputs"]]
        parameter = node["op"] == "null" and node["name"] != "data"
        shape = shape_of.get(node["name"]) or shape_of.get(f"{node['name']}_output", ())
        sizes = list(shape) if parameter else [-1, *shape[1:]]  # any number of samples
        graph.node.append(
            NodeDef(name=name, op=_operator(node), input=inputs, attr={"_output_shapes": _shape(sizes), **_text(node)})
        )
    return graph


def _scopes(block: gluon.Block, path: str, prefix: str) -> Iterator[tuple[str, str]]:
    """The prefix that Gluon gives the names of each block's parameters and operators, and the block's path."""
    for child in block._children.values():
        own = child.prefix[len(prefix) :] if prefix and child.prefix.startswith(prefix) else child.prefix
        inner = f"{path}{own.rstrip('_')}/"
        yield child.prefix, inner
        yield from _scopes(child, inner, child.prefix)


def _path(name: str, scopes: dict[str, str]) -> str:
    """``conv0_weight`` as ``conv0/weight``: within the innermost block that it belongs to."""
    prefix = max((prefix for prefix in scopes if prefix and name.startswith(prefix)), key=len, default="")
    return scopes.get(prefix, "") + name[len(prefix) :]


def _operator(node: dict[str, Any]) -> str:
    if node["op"] == "null":
        return "Placeholder" if node["name"] == "data" else "VariableV2"
    return str(node["attrs"]["op_type"] if node["op"] == "Custom" else node["op"])


def _text(node: dict[str, Any]) -> dict[str, AttrValue]:
    """The operator's own attributes. A custom operator's ``layer`` is a number that means nothing outside."""
    attributes = {} if node["op"] == "null" else node.get("attrs", {})
    return {key: AttrValue(s=value.encode()) for key, value in attributes.items() if key not in ("layer", "op_type")}


def _shape(sizes: Sequence[int]) -> AttrValue:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])
    return AttrValue(list=AttrValue.ListValue(shape=[shape]))
