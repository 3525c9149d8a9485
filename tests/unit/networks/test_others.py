"""Networks of the zoo and of the user's own: what is built, and one message for each thing that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon.model_zoo import vision

from job import cli
from job.config import ModelConfig, load_config
from job.distributed.comm import Comm
from job.distributed.device import seed_everything
from job.errors import UsageError
from job.networks import models, others
from job.networks.check import check
from job.networks.sharded_graph import write_sharded
from job.operators.fused import RELU, RELU_MAX_POOL
from job.operators.group import Group

FILE = """
import mxnet as mx
from mxnet.gluon import nn
from beside import WIDTH

def small(classes, layers=1):
    net = nn.HybridSequential()
    for _ in range(layers):
        net.add(nn.Conv2D(WIDTH, 3), nn.BatchNorm(), nn.Activation("relu"))
    net.add(nn.Dense(classes))
    return net

def block(classes): return nn.Sequential()
def nothing(classes): pass
def fails(classes): raise RuntimeError("no luck")
def wide(classes): return nn.Dense(classes + 1)
def per_pixel(classes): return nn.Conv2D(classes, 1)
def large(classes): return nn.Conv2D(classes, 99)
def random(classes): return nn.HybridLambda(lambda F, x: F.random.uniform(shape=(2, 10)) + x.mean())
def custom(classes): return nn.HybridLambda(lambda F, x: F.Custom(x, op_type="sync_batch_norm", group="x", layer="0"))
def branches(classes): return nn.HybridLambda(lambda F, x: x if x.asnumpy().sum() > 0 else -x)
def two(classes): return nn.HybridLambda(lambda F, x: F.split(x, num_outputs=2, axis=2))
number = 3
"""

WRONG: dict[str, tuple[list[str], list[str]]] = {
    "an unknown name, nearly right": (["model.name=resnet18"], ["resnet18", "did you mean resnet18_v"]),
    "an unknown name": (["model.name=transformer"], ["no such network", "FILE.py:FUNCTION"]),
    "a helper of the zoo": (["model.name=get_resnet"], ["no such network"]),
    "no file": (["model.name=nowhere.py:small"], ["no such file", "nowhere.py"]),
    "no Python file": (["model.name=net.txt:small"], ["FILE.py:FUNCTION"]),
    "no function": (["model.name=net.py:"], ["FILE.py:FUNCTION"]),
    "an unknown function": (["model.name=net.py:tall"], ["no function tall", "small"]),
    "not a function": (["model.name=net.py:number"], ["no function number"]),
    "not Python": (["model.name=broken.py:small"], ["cannot be loaded", "SyntaxError"]),
    "a file that raises": (["model.name=raises.py:small"], ["cannot be loaded", "ModuleNotFoundError", "nowhere"]),
    "an option that it lacks": (["model.name=net.py:small", "model.options={depth: 2}"], ["depth", "model.options"]),
    "an option of the wrong kind": (["model.name=net.py:small", "model.options={layers: x}"], ["cannot be built"]),
    "an option that the zoo lacks": (["model.name=resnet18_v1", "model.options={depth: 2}"], ["depth"]),
    "weights from the web": (["model.name=resnet18_v1", "model.options={pretrained: true}"], ["takes no pretrained"]),
    "options of the tutorial": (["model.options={layers: 2}"], ["model", "takes none"]),
    "options that are a list": (["model.name=net.py:small", "model.options=[2]"], ["model.options"]),
    "BatchNorm on which dense layer": (["model.name=net.py:small", "model.dense_batch_norm=true"], ["contradicts"]),
    "not hybrid": (["model.name=net.py:block"], ["gives a Sequential", "HybridBlock"]),
    "nothing": (["model.name=net.py:nothing"], ["NoneType", "HybridBlock"]),
    "a function that raises": (["model.name=net.py:fails"], ["cannot be built", "no luck"]),
    "another number of classes": (["model.name=net.py:wide"], ["(N, 11)", "(N, 10)"]),
    "no vector": (["model.name=net.py:per_pixel"], ["(N, 10, 28, 28)", "(N, 10)"]),
    "too large for the images": (["model.name=net.py:large"], ["takes no images of 28x28"]),
    "the zoo's, too large for the images": (
        ["model.name=vgg11_bn"],
        ["images of 28x28 with 1 channel", "pool"],
    ),
    "random numbers": (["model.name=net.py:random"], ["draws random numbers"]),
    "a custom operator": (["model.name=net.py:custom"], ["cannot be looked into"]),
    "asks for values": (["model.name=net.py:branches"], ["cannot be hybridized", "asnumpy"]),
    "two outputs": (["model.name=net.py:two"], ["several outputs"]),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("net", FILE), ("beside", "WIDTH = 4"), ("broken", "def small(:"), ("raises", "import nowhere")):
        (tmp_path / f"{name}.py").write_text(text)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_network_is_one_message_before_anything_starts(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, words = WRONG[case]
    with pytest.raises(UsageError) as error:
        cli.parse(["run.dir=run", *overrides])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 2 and "Stack trace" not in message
    assert "infer_shape" not in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides", [["model.name=net.py:small", "model.options.layers=2"], ["model.name=resnet18_v1"]]
)
def test_a_right_one_passes_the_check(overrides: list[str]) -> None:
    assert cli.parse(["run.dir=run", *overrides]) == load_config(overrides=["run.dir=run", *overrides])


def initialized(model: ModelConfig, classes: int = 10, shape: tuple[int, int, int] = (1, 28, 28)) -> Any:
    seed_everything(0)
    net = models.build(model, classes, shape)
    models.initialize(net, mx.cpu(), "float32", shape)
    return net


def test_options_reach_the_users_function(tmp_path: Path) -> None:
    net = initialized(ModelConfig(name="net.py:small", options={"layers": 3}), classes=7, shape=(3, 12, 16))
    assert [type(layer).__name__ for layer in net].count("BatchNorm") == 3
    assert net(mx.nd.ones((2, 3, 12, 16))).shape == (2, 7)


def test_small_images_get_the_zoos_stem_for_them_and_large_ones_do_not() -> None:
    small, large = (others.build(ModelConfig(name="resnet18_v1"), 10, (3, side, side)) for side in (32, 64))
    asked = others.build(ModelConfig(name="resnet18_v1", options={"thumbnail": False}), 10, (3, 32, 32))
    assert [net.features[0]._kwargs["kernel"] for net in (small, large, asked)] == [(3, 3), (7, 7), (7, 7)]


def test_every_name_of_the_zoo_is_one_of_ours_and_passes_for_images_of_its_size() -> None:
    assert {name.replace(".", "_") for name in others.names()} == set(others.names())
    assert len(others.names()) == 34 and all(callable(getattr(vision, name)) for name in others.names())
    for name in ("alexnet", "vgg11_bn", "squeezenet1_0", "densenet121", "mobilenet1_0", "mobilenet_v2_1_0"):
        check(ModelConfig(name=name), 5, (3, 224, 224))
    check(ModelConfig(name="inception_v3"), 5, (3, 299, 299))


def test_names_and_weights_do_not_depend_on_what_was_built_before() -> None:
    first, second = (initialized(ModelConfig(name="net.py:small")).collect_params() for _ in range(2))
    assert list(first) == list(second)
    for one, other in zip(first.values(), second.values()):
        np.testing.assert_array_equal(one.data().asnumpy(), other.data().asnumpy())


def test_weights_are_drawn_as_he_et_al_do() -> None:
    weight = initialized(ModelConfig(name="resnet18_v1")).features[1][1].body[0].weight.data().asnumpy()
    assert weight.std() == pytest.approx(np.sqrt(2 / (64 * 9)), rel=0.05)


def test_the_compact_network_is_made_of_operators_that_are_fused() -> None:
    net = others.build(ModelConfig(name="compact", options={"stages": [[4], [6, 6]], "hidden": 8}), 7, (1, 28, 28))
    models.initialize(net, mx.cpu())
    shapes = {place: parameter.shape for place, parameter in net._collect_params_with_prefix().items()}
    assert shapes["0.weight"] == (4, 1, 5, 5) and shapes["4.weight"] == (6, 4, 3, 3)
    assert shapes["13.weight"] == (8, 6 * 7 * 7) and shapes["16.weight"] == (7, 8)
    assert net(mx.nd.zeros((3, 1, 28, 28))).shape == (3, 7)
    graph = json.loads(
        write_sharded(net(mx.sym.var("data")), 2, Group(Comm(), range(2), 2), (RELU, RELU_MAX_POOL)).symbol.tojson()
    )
    custom = [node["attrs"]["tail"] for node in graph["nodes"] if node["op"] == "Custom"]
    assert custom == [RELU_MAX_POOL, RELU, RELU_MAX_POOL, RELU]


def test_the_best_recipe_is_a_configuration_that_can_start() -> None:
    cli._check_data(load_config(Path(cli.__file__).parents[1] / "configs" / "best.yaml"))
