"""What is exported of networks made by hand: the scaling, plain BatchNorm, names, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import mxnet as mx
import numpy as np
import onnx
import pytest
from mxnet import gluon
from safetensors.numpy import save

from job.config import ModelConfig
from job.data.dataset import Description
from job.errors import CheckpointError, JobError, UsageError
from job.exporting.formats import FORMATS, open_model, target, unfinished
from job.exporting.served import metadata
from job.exporting.trained import Trained
from job.networks import models

ABOUT = Description(("cat", "dog"), (3, 5, 4), (0.5, 0.25, 0.125), (0.5, 1.0, 2.0))
NETWORKS = """
from mxnet import gluon
from safetensors.numpy import save
from mxnet.gluon import nn

def linear(classes):
    return nn.Dense(classes)

class Odd(gluon.HybridBlock):
    def __init__(self, classes):
        super().__init__()
        self.out = nn.Dense(classes)
    def hybrid_forward(self, F, x):
        return F.rcbrt(self.out(x) + 100)

def odd(classes):
    return Odd(classes)

def normalized(classes):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=3), gluon.contrib.nn.SyncBatchNorm(in_channels=4))
    net.add(nn.Conv2D(4, 1, in_channels=4), nn.BatchNormReLU(in_channels=4), nn.Dropout(0.5))
    net.add(nn.Dense(classes, in_units=24))
    return net
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORKS)
    return path


def trained(file: Path, function: str, about: Description = ABOUT, dtype: str = "float32", seed: int = 0) -> Trained:
    """A network whose weights and running statistics are drawn at random."""
    model = ModelConfig(name=f"{file}:{function}", dtype=dtype)
    net = models.build(model, len(about.classes), about.shape)
    models.initialize(net, mx.cpu(), dtype, about.shape)
    random = np.random.default_rng(seed)
    weights = {
        name: random.uniform(0.2, 1, parameter.shape).astype(dtype)
        for name, parameter in net._collect_params_with_prefix().items()
    }
    return Trained(model, about, weights, 7, "c0ffee", 0.5)


def written(of: Trained, form: str, folder: Path) -> Path:
    path = folder / f"model{FORMATS[form].ending}"
    FORMATS[form].write(of, metadata(of), path)
    return path


def pixels(count: int = 9) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", FORMATS)
def test_pixels_are_scaled_in_the_file_as_the_data_set_says(file: Path, tmp_path: Path, form: str, dtype: str) -> None:
    of = trained(file, "linear", dtype=dtype)
    scaled = (pixels() / 255 - np.array(ABOUT.mean)) / np.array(ABOUT.std)
    flat = scaled.transpose(0, 3, 1, 2).reshape(9, -1)
    expected = softmax(flat @ of.weights["weight"].T.astype(np.float64) + of.weights["bias"])
    found = open_model(written(of, form, tmp_path)).probabilities(pixels())
    assert np.abs(found - expected).max() < (1e-12 if dtype == "float64" and form != "onnx" else 1e-5)
    assert found.dtype == ("float32" if form == "onnx" else dtype)


@pytest.mark.parametrize("form", ["onnx", "mxnet"])
def test_every_kind_of_batch_norm_becomes_the_plain_one(file: Path, tmp_path: Path, form: str) -> None:
    of = trained(file, "normalized")
    path = written(of, form, tmp_path)
    net = models.build(of.model, 2, ABOUT.shape)
    models.initialize(net, mx.cpu(), shape=ABOUT.shape)
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(of.weights[name]))
    scaled = (pixels() / 255 - np.array(ABOUT.mean)) / np.array(ABOUT.std)
    logits = net(mx.nd.array(scaled.transpose(0, 3, 1, 2))).asnumpy()
    assert np.abs(open_model(path).probabilities(pixels()) - softmax(logits)).max() < 1e-5
    if form == "mxnet":
        operators = {node["op"] for node in json.loads(path.read_text())["nodes"]}
        assert "BatchNorm" in operators and not any("Sync" in name or "WithReLU" in name for name in operators)


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_traced_before_changes_no_byte(file: Path, tmp_path: Path, form: str) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        of = trained(file, "normalized")
        files.append(written(of, form, tmp_path / name))
        gluon.nn.Dense(3)(mx.sym.var("x")) + mx.sym.var("y")  # takes the next names of this process
    for path in files[0].parent.iterdir():
        assert path.read_bytes() == (files[1].parent / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("alexnet", 224), ("densenet121", 224), ("inception_v3", 299), ("mobilenet0_25", 32), ("mobilenet_v2_0_25", 32),
        ("resnet18_v1", 32), ("resnet18_v2", 32), ("squeezenet1_1", 224), ("vgg11_bn", 32),
    ],
)  # fmt: skip
def test_every_family_of_the_zoo_says_the_same_in_onnx_and_in_mxnet(tmp_path: Path, name: str, side: int) -> None:
    about = Description(("a", "b", "c"), (3, side, side))
    net = models.build(ModelConfig(name=name), 3, about.shape)
    models.initialize(net, mx.cpu(), shape=about.shape)
    weights = {place: parameter.data().asnumpy() for place, parameter in net._collect_params_with_prefix().items()}
    of = Trained(ModelConfig(name=name), about, weights, 0, "c0ffee")
    images = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    of_onnx, of_mxnet = (open_model(written(of, form, tmp_path)).probabilities(images) for form in ("onnx", "mxnet"))
    assert np.abs(of_onnx - of_mxnet).max() < 1e-5 and np.ptp(of_mxnet) > 1e-4


def test_an_operator_without_equivalent_is_named_and_plain_mxnet_takes_it(file: Path, tmp_path: Path) -> None:
    of = trained(file, "odd")
    with pytest.raises(JobError, match=r"operator rcbrt \(rcbrt_0\) cannot be exported to ONNX.*--format mxnet"):
        written(of, "onnx", tmp_path)
    assert open_model(written(of, "mxnet", tmp_path)).probabilities(pixels()).shape == (9, 2)


def test_onnx_is_valid_names_its_opset_and_has_no_weight_among_its_inputs(file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(written(trained(file, "normalized"), "onnx", tmp_path)))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 13)] and model.ir_version == 8
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["probabilities"]
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 6, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8), np.zeros((2, 3, 5, 4), np.uint8)],
)
@pytest.mark.parametrize("form", ["onnx", "mxnet"])
def test_pixels_of_another_shape_are_refused(file: Path, tmp_path: Path, form: str, wrong: np.ndarray) -> None:
    model = open_model(written(trained(file, "linear"), form, tmp_path))
    with pytest.raises(JobError, match="cannot compute it"):
        model.probabilities(wrong)


def test_plain_mxnet_refuses_pixels_that_are_not_uint8(file: Path, tmp_path: Path) -> None:
    path = written(trained(file, "linear"), "mxnet", tmp_path)
    net = gluon.SymbolBlock.imports(str(path), ["images"], str(tmp_path / "model-0000.params"))
    with pytest.raises(mx.MXNetError, match="expected float32, got uint8"):
        net(mx.nd.zeros((2, 5, 4, 3))).asnumpy()


def test_weights_of_another_network_are_refused(file: Path, tmp_path: Path) -> None:
    of = trained(file, "linear")
    other = {**of.weights, "weight": of.weights["weight"][:, :-3]}
    with pytest.raises(CheckpointError, match="the network has changed since the run"):
        written(Trained(of.model, ABOUT, other, 7, "c0ffee"), "mxnet", tmp_path)
    with pytest.raises(CheckpointError, match="only one of the two has gone"):
        written(Trained(of.model, ABOUT, {**of.weights, "gone": np.zeros(3)}, 7, "c0ffee"), "mxnet", tmp_path)


def test_damaged_and_foreign_files_are_one_message(file: Path, tmp_path: Path) -> None:
    for form in FORMATS:
        path = written(trained(file, "linear"), form, tmp_path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(JobError, match=f"{path}: .*cannot"):
            open_model(path)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(save({"x": np.zeros(2)}))
    with pytest.raises(JobError, match="does not say what its classes are"):
        open_model(foreign)
    with pytest.raises(UsageError, match="no such file"):
        open_model(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match="is no exported model"):
        open_model(file)


@pytest.mark.parametrize(
    ("form", "output", "expected"),
    [
        (None, None, ("onnx", "run/model.onnx")),
        ("mxnet", None, ("mxnet", "run/model-symbol.json")),
        (None, "x.safetensors", ("safetensors", "x.safetensors")),
        ("mxnet", "x", ("mxnet", "x-symbol.json")),
        (None, "v1.2", ("onnx", "v1.2.onnx")),
    ],
)
def test_format_and_output_say_one_thing(
    tmp_path: Path, form: str | None, output: str | None, expected: tuple[str, str]
) -> None:
    found = target(form, tmp_path / output if output else None, tmp_path / "run")
    assert found == (expected[0], tmp_path / expected[1])


def test_format_and_output_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave one of them out"):
        target("onnx", tmp_path / "x.safetensors", tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        target(None, tmp_path / "nowhere" / "x", tmp_path)


def test_after_a_failure_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(JobError, match="it differs"), unfinished(tmp_path / "model.onnx") as path:
        path.write_text("new")
        raise JobError("it differs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "old")]
    with unfinished(tmp_path / "model.onnx") as path:
        path.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.onnx", "new")]
