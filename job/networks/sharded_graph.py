"""A network's traced graph, written once for each shard of a rank.

Every shard has operators of its own, whose shapes follow from the batch alone and not from the number of ranks. Only
BatchNorm (:mod:`job.operators.batch_norm`) and convolutions in loops of our own (:mod:`job.operators.convolution`) are
written once for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Optional

import mxnet as mx

from job.errors import UsageError
from job.operators.batch_norm import SYNC_BATCH_NORM
from job.operators.convolution import DIRECT, is_better_direct
from job.operators.fused import RELU, RELU_MAX_POOL
from job.operators.group import Group

_BATCH_NORMS = {"BatchNorm", "_contrib_SyncBatchNorm", "_contrib_BatchNormWithReLU"}
_OPTIONS = {"axis": "1", "eps": "0.001", "momentum": "0.9", "fix_gamma": "True"}  # of MXNet's BatchNorm
# What draws from MXNet's generator, whose state can be neither read nor shared out by sample.
_RANDOM = re.compile(r"_?(random|sample)_|_shuffle|_image_random|_contrib_(boolean_)?rand|_npi_(uniform|normal|choice)")
_OPAQUE = {"Custom", "_CustomFunction", "_foreach", "_while_loop", "_cond", "_CachedOp"}


class Dropout(NamedTuple):
    """A Dropout of the network, whose mask is an input of the graph: ``mask@K`` of shard K."""

    mask: str
    source: tuple[str, int]  # what shard 0's is multiplied with: an operator, and which of its outputs
    rate: float
    axes: tuple[int, ...]  # along which one draw serves all


class Norm(NamedTuple):
    """A BatchNorm in training mode, by the names of its running statistics."""

    key: str
    momentum: float
    running_mean: str
    running_var: str


class Graph(NamedTuple):
    """A graph written for several shards. Its outputs are those of the first shard, then of the second, and so on."""

    symbol: mx.sym.Symbol
    dropouts: list[Dropout]
    norms: list[Norm]


def shard(name: str, index: int) -> str:
    """The name in a sharded graph of what every shard has one of."""
    return f"{name}@{index}"


def write_sharded(
    symbol: mx.sym.Symbol,
    count: int,
    group: Group,
    tails: Collection[str] = (),
    direct: bool = False,
    trains: bool = True,
) -> Graph:
    """Write ``symbol`` for ``count`` shards.

    Every argument ``x`` becomes ``x@0`` to ``x@{count - 1}``; auxiliary states, the running statistics, stay one. What
    is in ``tails``, ReLU and max pooling behind a BatchNorm (:mod:`job.operators.fused`), becomes part of its operator
    where nothing else reads what lies between. With ``direct``, convolutions that loops of our own compute sooner are
    one operator for all shards (:mod:`job.operators.convolution`). A graph that no longer ``trains`` has no masks.

    Raises:
        UsageError: the graph holds an operator that cannot be computed shard by shard with the same bits.
    """
    traced = json.loads(symbol.tojson(remove_amp_cast=False))
    found = _tails(traced["nodes"], traced["heads"], tails)
    writer = _Writer(traced["nodes"], count, group, set(symbol.list_auxiliary_states()), found, direct, trains)
    for index in range(len(traced["nodes"])):
        writer.write(index)
    return writer.graph(traced["heads"], traced["attrs"])


class _Tail(NamedTuple):
    """What becomes part of a BatchNorm's operator."""

    kind: str
    nodes: list[int]


def _tails(nodes: list[dict[str, Any]], heads: list[list[int]], wanted: Collection[str]) -> dict[int, _Tail]:
    """Of each BatchNorm the ReLU behind it, and the pooling behind that, where they alone read what it computes."""
    if RELU not in wanted:
        return {}
    readers: dict[int, list[int]] = {index: [] for index in range(len(nodes))}
    for index, node in enumerate(nodes):
        for source in node["inputs"]:
            readers[source[0]].append(index)
    for head in heads:
        readers[head[0]].append(-1)

    def only_reader(index: int) -> Optional[int]:
        return readers[index][0] if len(readers[index]) == 1 and readers[index] != [-1] else None

    found = {}
    for index, node in enumerate(nodes):
        if node["op"] not in _BATCH_NORMS:
            continue
        relu = index if node["op"] == "_contrib_BatchNormWithReLU" else only_reader(index)
        if relu is None or not (relu == index or _is_relu(nodes[relu])):
            continue
        pool = only_reader(relu)
        on_channels = node.get("attrs", {}).get("axis", "1") == "1"
        pools = RELU_MAX_POOL in wanted and pool is not None and on_channels and _is_small_max_pool(nodes[pool])
        members = [relu, pool] if pools else [relu]
        found[index] = _Tail(RELU_MAX_POOL if pools else RELU, [n for n in members if n not in (None, index)])
    return found


def _is_relu(node: dict[str, Any]) -> bool:
    return node["op"] == "relu" or (node["op"] == "Activation" and node.get("attrs", {}).get("act_type") == "relu")


def _is_small_max_pool(node: dict[str, Any]) -> bool:
    """2x2 with stride 2 over whole windows."""
    options = {"pool_type": "max", "stride": "(1, 1)", "pad": "(0, 0)", "global_pool": "False", **node.get("attrs", {})}
    return node["op"] == "Pooling" and (
        options["pool_type"] == "max"
        and options.get("kernel") == options["stride"] == "(2, 2)"
        and options["pad"] in ("(0, 0)", "()")
        and options["global_pool"] in ("False", "0")
        and options.get("pooling_convention", "valid") == "valid"
        and options.get("layout", "None") in ("None", "NCHW")
    )


class _Writer:
    def __init__(
        self,
        nodes: list[dict[str, Any]],
        count: int,
        group: Group,
        states: set[str],
        tails: dict[int, _Tail],
        direct: bool,
        trains: bool,
    ) -> None:
        self._nodes = nodes
        self._count = count
        self._group = group
        self._states = states
        self._tails = tails
        self._direct = direct
        self._trains = trains
        self._absorbed = {member for tail in tails.values() for member in tail.nodes}
        self._written: list[dict[str, Any]] = []
        self._places: dict[tuple[int, int], tuple[int, int]] = {}  # (node, shard) -> (written node, its first output)
        self._dropouts: list[Dropout] = []
        self._norms: list[Norm] = []

    def write(self, index: int) -> None:
        node = self._nodes[index]
        operator, attributes = node["op"], node.get("attrs", {})
        _refuse(node)
        if index in self._absorbed:
            return
        if operator in _BATCH_NORMS and attributes.get("use_global_stats", "False") not in ("True", "1"):
            self._batch_norm(index, node)
        elif operator == "Dropout" and self._trains:
            self._dropout(index, node)
        elif self._direct and is_better_direct(node):
            self._convolution(index, node)
        elif operator == "null" and node["name"] in self._states:
            place = self._add(node)
            self._places.update({(index, k): (place, 0) for k in range(self._count)})
        else:
            for k in range(self._count):
                place = self._add({**node, "name": shard(node["name"], k)}, self._inputs(node, k))
                self._places[index, k] = (place, 0)

    def graph(self, heads: list[list[int]], attributes: dict[str, Any]) -> Graph:
        outputs = [self._entry([head[0], head[1]], k) for k in range(self._count) for head in heads]
        arguments = [index for index, node in enumerate(self._written) if node["op"] == "null"]
        text = json.dumps({"nodes": self._written, "arg_nodes": arguments, "heads": outputs, "attrs": attributes})
        return Graph(mx.sym.load_json(text), self._dropouts, self._norms)

    def _add(self, node: dict[str, Any], inputs: Sequence[list[int]] = ()) -> int:
        self._written.append({**node, "inputs": list(inputs)})
        return len(self._written) - 1

    def _entry(self, source: Sequence[int], k: int) -> list[int]:
        node, first = self._places[source[0], k]
        return [node, first + source[1], 0]

    def _inputs(self, node: dict[str, Any], k: int) -> list[list[int]]:
        return [self._entry(source, k) for source in node["inputs"]]

    def _batch_norm(self, index: int, node: dict[str, Any]) -> None:
        attributes = {**_OPTIONS, **node.get("attrs", {})}
        if attributes.get("output_mean_var", "False") in ("True", "1"):
            raise UsageError(f"{node['name']}: output_mean_var=True has no meaning for statistics of several shards")
        data, gamma, beta, running_mean, running_var = node["inputs"]
        own = [self._entry(source, k) for source in (data, gamma, beta) for k in range(self._count)]
        key = str(len(self._norms))
        options = {name: attributes[name] for name in _OPTIONS}
        custom = {"op_type": SYNC_BATCH_NORM, "group": self._group.key, "layer": key, "shards": str(self._count)}
        tail = self._tails.get(index, _Tail("", []))
        place = self._add(
            {"op": "Custom", "name": node["name"], "attrs": {**custom, **options, "tail": tail.kind}},
            [*own, self._entry(running_mean, 0), self._entry(running_var, 0)],
        )
        last = tail.nodes[-1] if tail.nodes else index
        self._places.update({(last, k): (place, k) for k in range(self._count)})
        names = (self._nodes[source[0]]["name"] for source in (running_mean, running_var))
        self._norms.append(Norm(key, float(options["momentum"]), *names))
        if node["op"] == "_contrib_BatchNormWithReLU" and not tail.kind:
            for k in range(self._count):
                relu = {"op": "Activation", "name": shard(f"{node['name']}_relu", k), "attrs": {"act_type": "relu"}}
                self._places[index, k] = (self._add(relu, [[place, k, 0]]), 0)

    def _convolution(self, index: int, node: dict[str, Any]) -> None:
        options = ("num_filter", "kernel", "pad", "no_bias")
        kept = {name: value for name, value in node["attrs"].items() if name in options}
        inputs = [self._entry(source, k) for source in node["inputs"] for k in range(self._count)]
        attributes = {"op_type": DIRECT, "shards": str(self._count), **kept}
        place = self._add({"op": "Custom", "name": node["name"], "attrs": attributes}, inputs)
        self._places.update({(index, k): (place, k) for k in range(self._count)})

    def _dropout(self, index: int, node: dict[str, Any]) -> None:
        attributes = node.get("attrs", {})
        axes = tuple(json.loads(attributes.get("axes", "[]").replace("(", "[").replace(",)", "]").replace(")", "]")))
        mask = f"dropout.{len(self._dropouts)}"
        for k in range(self._count):
            variable = self._add({"op": "null", "name": shard(mask, k)})
            product = {"op": "broadcast_mul", "name": shard(node["name"], k)}
            self._places[index, k] = (self._add(product, [*self._inputs(node, k), [variable, 0, 0]]), 0)
        place, output, _ = self._entry(node["inputs"][0], 0)
        source = (self._written[place]["name"], output)
        self._dropouts.append(Dropout(mask, source, float(attributes.get("p", "0.5")), axes))


def _refuse(node: dict[str, Any]) -> None:
    operator, attributes = node["op"], node.get("attrs", {})
    if (
        _RANDOM.match(operator)
        or (operator == "LeakyReLU" and attributes.get("act_type") == "rrelu")
        or (operator == "RNN" and float(attributes.get("p", "0")) > 0)
    ):
        raise UsageError(
            f"{node['name']}: the operator {operator} draws random numbers that would depend on the number of ranks;"
            " of those only Dropout can be trained with"
        )
    if operator == "Deconvolution":
        raise UsageError(
            f"{node['name']}: a transposed convolution (Conv2DTranspose) of several shards side by side fails in MXNet"
            " 1.9.1 now and then; enlarge with UpSampling and a convolution instead"
        )
    if operator in _OPAQUE:
        raise UsageError(f"{node['name']}: the operator {operator} cannot be looked into, so that it cannot be sharded")
