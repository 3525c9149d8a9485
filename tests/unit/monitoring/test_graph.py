"""The graph for TensorBoard, parsed back from its bytes."""

from __future__ import annotations

import mxnet as mx
import pytest
from mxnet.gluon import nn
from tensorboard.compat.proto.graph_pb2 import GraphDef

from job.config import ModelConfig
from job.distributed.comm import Comm
from job.monitoring.graph import graph_of
from job.networks import models
from job.networks.sync_batch_norm import convert_sync_batch_norm


def parsed(net: nn.HybridBlock) -> GraphDef:
    return GraphDef.FromString(graph_of(net, models.IMAGE_SHAPE).SerializeToString())


@pytest.fixture(scope="module", params=["BatchNorm", "sync_batch_norm"])
def batch_norm(request: pytest.FixtureRequest) -> str:
    """The operator: of the network that is trained shard by shard, and of one that was converted."""
    return str(request.param)


@pytest.fixture(scope="module")
def tutorial(batch_norm: str) -> GraphDef:
    net = models.build(ModelConfig(dense_batch_norm=True))
    if batch_norm == "sync_batch_norm":
        convert_sync_batch_norm(net, Comm())
    models.initialize(net, mx.cpu())
    return parsed(net)


def test_every_parameter_and_layer_is_a_node_and_all_inputs_exist(tutorial: GraphDef, batch_norm: str) -> None:
    names = [node.name for node in tutorial.node]
    assert len(set(names)) == len(names)
    assert {name for node in tutorial.node for name in node.input} <= set(names)
    operators = [node.op for node in tutorial.node]
    assert operators.count(batch_norm) == 3 and operators.count("Convolution") == 2
    assert operators.count("VariableV2") == 20 and operators.count("Placeholder") == 1


def test_a_blocks_nodes_fold_into_it(tutorial: GraphDef, batch_norm: str) -> None:
    blocks = {node.name.split("/")[0] for node in tutorial.node}
    assert len(blocks) == 1 + 13  # the data, and the layers of the network
    by_block = [{node.op for node in tutorial.node if node.name.startswith(f"{block}/")} for block in blocks]
    assert by_block.count({"VariableV2", "Convolution"}) == 2
    assert by_block.count({"VariableV2", batch_norm}) == 3


def test_edges_carry_the_shapes_of_what_flows_with_any_number_of_samples(tutorial: GraphDef) -> None:
    flows = {node.op: node.attr["_output_shapes"].list.shape[0] for node in tutorial.node}
    assert [dim.size for dim in flows["Placeholder"].dim] == [-1, 1, 28, 28]
    convolutions = [node for node in tutorial.node if node.op == "Convolution"]
    assert [[d.size for d in node.attr["_output_shapes"].list.shape[0].dim] for node in convolutions] == [
        [-1, 20, 24, 24],
        [-1, 50, 10, 10],
    ]
    weight = next(node for node in tutorial.node if node.name == convolutions[0].input[1])
    assert [dim.size for dim in weight.attr["_output_shapes"].list.shape[0].dim] == [20, 1, 5, 5]
    assert convolutions[0].attr["kernel"].s == b"(5, 5)"


def test_nothing_that_differs_from_process_to_process_is_in_it(tutorial: GraphDef) -> None:
    assert all("layer" not in node.attr for node in tutorial.node)


def test_blocks_within_blocks_fold_within_them() -> None:
    class Residual(nn.HybridBlock):
        def __init__(self) -> None:
            super().__init__(prefix="residual_")
            with self.name_scope():
                self.body = nn.HybridSequential(prefix="body_")
                with self.body.name_scope():
                    self.body.add(nn.Conv2D(1, 1, in_channels=1, prefix="conv_"))

        def hybrid_forward(self, F, x):  # type: ignore[no-untyped-def]
            return x + self.body(x)

    net = nn.HybridSequential()
    net.add(Residual())
    net.initialize()
    names = [node.name for node in parsed(net).node]
    assert "residual/body/conv/weight" in names
    assert [name for name in names if name.startswith("residual/") and "/body/" not in name]  # the addition
