"""Weights to start from: what is taken of each kind of file, and one message for each that is of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.gluon import nn
from safetensors.numpy import save_file

from job import cli
from job.checkpoints.store import Store
from job.config import load_config
from job.errors import UsageError
from job.networks import models, weights


def network(classes: int = 10, width: int = 4, seed: int = 1) -> nn.HybridSequential:
    mx.random.seed(seed)
    net = nn.HybridSequential()
    net.add(nn.Conv2D(width, 3), nn.BatchNorm(), nn.Dense(classes))
    models.initialize(net, mx.cpu())
    net[1].running_mean.data()[:] = seed
    return net


def arrays_of(net: gluon.HybridBlock) -> dict[str, np.ndarray]:
    return {place: array.data().asnumpy() for place, array in net._collect_params_with_prefix().items()}


def gluon_s(net: gluon.HybridBlock, folder: Path) -> Path:
    net.save_parameters(str(folder / "net.params"))
    return folder / "net.params"


def exported(net: gluon.HybridBlock, folder: Path) -> Path:
    """With the names that parameters have in MXNet; those of two networks differ, so they are made to be alike."""
    names = {parameter.name: place for place, parameter in net._collect_params_with_prefix().items()}
    net(mx.nd.zeros((1, 1, 28, 28)))
    net.export(str(folder / "net"))
    stored = mx.nd.load(str(folder / "net-0000.params"))
    assert {name.partition(":")[2] for name in stored} == set(names)
    mx.nd.save(str(folder / "as.params"), {f"arg:{names[name.partition(':')[2]]}": v for name, v in stored.items()})
    return folder / "as.params"


def safetensors(net: gluon.HybridBlock, folder: Path) -> Path:
    save_file(arrays_of(net), folder / "net.safetensors")
    return folder / "net.safetensors"


def checkpoint(net: gluon.HybridBlock, folder: Path) -> Path:
    arrays = arrays_of(net)
    state = {f"network/{place}": array for place, array in arrays.items()}
    state.update({f"optimizer/{place}": 0 * array for place, array in arrays.items()})
    Store(folder / "checkpoints", 1).write(3, state, {})
    return folder / "checkpoints" / "step-00000003" / "arrays.params"


@pytest.mark.parametrize("stored", [gluon_s, exported, safetensors, checkpoint])
def test_every_kind_of_file_gives_its_weights_and_running_statistics(
    tmp_path: Path, stored: Callable[[gluon.HybridBlock, Path], Path]
) -> None:
    source, net = network(seed=3), network(seed=4)
    wanted = arrays_of(source)
    start = weights.load(net, stored(source, tmp_path))
    assert all(np.array_equal(array, wanted[place]) for place, array in arrays_of(net).items())
    assert not start.fresh and not start.unused
    assert str(start) == "0.weight, 0.bias, 1.gamma, 1.beta and 4 more taken"


def test_for_another_number_of_classes_the_last_layer_stays_as_it_was_drawn(tmp_path: Path) -> None:
    source, net = network(classes=7, seed=3), network(seed=4)
    before = arrays_of(net)
    start = weights.load(net, gluon_s(source, tmp_path))
    assert start.fresh == ["2.weight", "2.bias"]
    for place, array in arrays_of(net).items():
        wanted = before[place] if place in start.fresh else arrays_of(source)[place]
        np.testing.assert_array_equal(array, wanted)
    assert str(start).endswith("; 2.weight, 2.bias fresh, for another number of classes")


def test_what_the_file_has_beside_is_told(tmp_path: Path) -> None:
    save_file({**arrays_of(network()), "teacher": np.zeros(1, np.float32)}, tmp_path / "more.safetensors")
    start = weights.load(network(), tmp_path / "more.safetensors")
    assert str(start).endswith("; teacher in the file not used")


def test_weights_of_another_precision_are_taken(tmp_path: Path) -> None:
    save_file(
        {place: array.astype(np.float16) for place, array in arrays_of(network()).items()}, tmp_path / "h.safetensors"
    )
    net = network(seed=5)
    weights.load(net, tmp_path / "h.safetensors")
    assert net[0].weight.data().dtype == np.float32
    np.testing.assert_allclose(net[0].weight.data().asnumpy(), arrays_of(network())["0.weight"], atol=1e-4)


def _write_wrong(folder: Path) -> None:
    net = network()
    gluon_s(net, folder)
    (folder / "cut.params").write_bytes((folder / "net.params").read_bytes()[:-40])
    (folder / "text.params").write_text("not weights")
    (folder / "empty.safetensors").write_bytes(b"")
    mx.nd.save(str(folder / "nameless.params"), [mx.nd.ones(3)])
    arrays = arrays_of(net)
    save_file({place: array for place, array in arrays.items() if place != "0.weight"}, folder / "part.safetensors")
    save_file({**arrays, "0.weight": arrays["0.weight"] * np.nan}, folder / "nan.safetensors")
    gluon_s(network(width=5), folder).rename(folder / "wide.params")
    (folder / "net.py").write_text(
        "from mxnet.gluon import nn\n\ndef net(classes):\n    net = nn.HybridSequential()\n"
        "    net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Dense(classes))\n    return net\n"
    )


WRONG = {
    "nowhere.params": ["no such file", "nowhere.params"],
    "cut.params": ["cannot be read"],
    "text.params": ["cannot be read"],
    "empty.safetensors": ["cannot be read"],
    "nameless.params": ["cannot be read", "no names"],
    "part.safetensors": ["of another network", "0.weight is missing", "4x1x3x3 is needed", "the file has"],
    "nan.safetensors": ["0.weight", "not a finite number"],
    "wide.params": ["of another network", "0.weight has 5x1x3x3", "4x1x3x3 is needed", "more do not fit"],
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    _write_wrong(folder)
    return folder


@pytest.mark.parametrize("name", list(WRONG))
def test_a_file_that_is_of_no_use_is_one_message_before_any_rank_starts(wrong: Path, name: str) -> None:
    config = load_config(overrides=[f"model.name={wrong}/net.py:net", f"model.weights={wrong / name}"])
    with pytest.raises(UsageError) as caught:
        cli._check_data(config)
    message = str(caught.value)
    assert all(word in message for word in [f"model.weights={wrong / name}", *WRONG[name]]), message
    assert "\n" not in message


def test_a_file_that_fits_passes_the_check_and_a_run_that_goes_on_needs_none(wrong: Path, tmp_path: Path) -> None:
    gluon_s(network(), tmp_path)
    name = f"model.name={wrong}/net.py:net"
    cli._check_data(load_config(overrides=[name, f"model.weights={tmp_path / 'net.params'}"]))
    Store(tmp_path / "checkpoints", 1).write(3, {"network/x": np.ones(1, np.float32)}, {})
    gone: list[Any] = [name, f"model.weights={tmp_path / 'gone.params'}", f"run.dir={tmp_path}"]
    cli._check_data(load_config(overrides=[*gone, "run.resume=auto"]))
    with pytest.raises(UsageError):
        cli._check_data(load_config(overrides=gone))
