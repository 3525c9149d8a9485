"""Models of real runs, exported by the user's command, and used in fresh processes that cannot see this project."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from job import export, predict
from job.config import ModelConfig, load_config
from job.data import formats
from job.distributed.comm import Comm
from job.errors import JobError
from job.exporting import to_onnx, trained
from job.exporting.agreement import compare
from job.exporting.formats import FORMATS, open_model
from job.exporting.trained import Trained
from job.networks import models
from tests import synthetic
from tests.parallel.conftest import ROOT
from tests.parallel.runs import Weights, run

FILES = {
    "onnx": ["model.onnx"], "mxnet": ["model-symbol.json", "model-0000.params"], "safetensors": ["model.safetensors"],
}  # fmt: skip
PROGRAMS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/model.onnx")
facts = session.get_modelmeta().custom_metadata_map
probabilities = session.run(None, {"images": images})[0]
""",
    "mxnet": """
import mxnet
net = mxnet.gluon.SymbolBlock.imports(folder + "/model-symbol.json", ["images"], folder + "/model-0000.params")
facts = json.load(open(folder + "/model-symbol.json"))["nodes"][0]["attrs"]
probabilities = net(mxnet.nd.array(images, dtype="uint8")).asnumpy()
""",
}
AROUND = """
import json, sys
import numpy
for folder in sys.argv[1:]:
    images = numpy.load(folder + "/images.npy")
{program}
    one = {one}
    assert abs(one - probabilities[3:4]).max() < 1e-6
    numpy.save(folder + "/probabilities.npy", probabilities)
    json.dump(facts, open(folder + "/facts.json", "w"))
assert not any(name.split(".")[0] in ("job", "horovod") for name in sys.modules)
"""
ONE = {
    "onnx": 'session.run(None, {"images": images[3:4]})[0]',
    "mxnet": 'net(mxnet.nd.array(images[3:4], dtype="uint8")).asnumpy()',
}


def trained_on_ranks(comm: Comm, folder: str, tasks: dict[str, list[str]]) -> dict[str, Weights]:
    return {name: run(comm, f"{folder}/{name}", overrides) for name, overrides in tasks.items()}


class Runs:
    """The folder of the runs, what each rank 0 held at the end, and the test images of each as decoders give them."""

    def __init__(self, folder: Path, weights: dict[str, Weights], images: dict[str, np.ndarray]) -> None:
        self.folder, self.weights, self.images = folder, weights, images


@pytest.fixture(scope="module")
def runs(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    idx = [*synthetic.write(folder / "idx"), "optimizer.learning_rate=0.05", "train.max_steps=3", "data.shards=3"]
    averaged = [*idx[:-2], "train.max_steps=6", "train.average_decay=0.5", "data.validation_fraction=0.2"]
    pictures = [*synthetic.write_pictures(folder / "pictures", 24, 12), "train.max_steps=1", "train.epochs=1"]
    alone = {"one": idx, "resnet": [*pictures, "model.name=resnet18_v1"], "averaged": averaged}
    weights = run_ranks(trained_on_ranks, 1, folder=str(folder), tasks=alone)[0]
    weights.update(run_ranks(trained_on_ranks, 3, folder=str(folder), tasks={"three": idx})[0])
    images = {}
    for name, overrides in list(alone.items())[:2]:
        test = formats.load(load_config(overrides=overrides).data).test
        pixels = np.asarray(test.images[:])
        images[name] = pixels if pixels.ndim == 3 else pixels.transpose(0, 2, 3, 1)
    return Runs(folder, weights, images)


def exported(*arguments: str) -> str:
    """What ``job/export.py`` says, in this process."""
    with redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *arguments])
        export.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def said(runs: Runs) -> dict[tuple[str, str], str]:
    """What the command said of each run and format."""
    wanted = [(name, form) for name in ("one", "three") for form in FILES] + [("resnet", form) for form in PROGRAMS]
    return {(name, form): exported(str(runs.folder / name), "--format", form) for name, form in wanted}


def of_plain_gluon(model: ModelConfig, classes: int, weights: Weights, images: np.ndarray) -> np.ndarray:
    """Probabilities, worked out by the network itself from pixels that are scaled by hand."""
    batch = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    net = models.build(model, classes, batch.shape[1:])
    models.initialize(net, mx.cpu(), "float32", batch.shape[1:])
    for name, parameter in net._collect_params_with_prefix().items():
        parameter.set_data(mx.nd.array(weights[name]))
    logits = net(mx.nd.array(batch / 255)).asnumpy().astype(np.float64)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("form", PROGRAMS)
def test_a_fresh_process_without_the_project_gets_the_networks_probabilities_of_uint8_pixels(
    runs: Runs, said: Any, tmp_path: Path, form: str
) -> None:
    for name in ("one", "resnet"):
        np.save(runs.folder / name / "images.npy", runs.images[name])
    program = AROUND.format(
        program="".join("    " + line + "\n" for line in PROGRAMS[form].splitlines()), one=ONE[form]
    )
    folders = [str(runs.folder / name) for name in ("one", "resnet")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, model, classes in (
        ("one", "tutorial", [str(number) for number in range(10)]),
        ("resnet", "resnet18_v1", ["blue", "green", "red"]),
    ):
        expected = of_plain_gluon(ModelConfig(name=model), len(classes), runs.weights[name], runs.images[name])
        found = np.load(runs.folder / name / "probabilities.npy")
        assert np.abs(found - expected).max() < 1e-5 and found.shape == (len(runs.images[name]), len(classes))
        facts = json.loads((runs.folder / name / "facts.json").read_text())
        summary = json.loads((runs.folder / name / "summary.json").read_text())
        assert json.loads(facts["classes"]) == classes and facts["weights_sha256"] == summary["weights_sha256"]
        assert json.loads(facts["input_shape"]) == ["N", *runs.images[name].shape[1:]]
        assert float(facts["test_accuracy"]) == summary["test_accuracy"] and len(facts["commit"]) >= 40


def test_safetensors_holds_the_weights_to_the_bit_and_their_hash(runs: Runs, said: Any) -> None:
    with safe_open(str(runs.folder / "one" / "model.safetensors"), "numpy") as stored:
        facts, arrays = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert {n: a.tobytes() for n, a in arrays.items()} == {n: a.tobytes() for n, a in runs.weights["one"].items()}
    digest = hashlib.sha256()  # as docs/bit_for_bit.md defines it
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {'x'.join(map(str, array.shape))}\n".encode() + array.tobytes())
    assert facts["weights_sha256"] == digest.hexdigest()


def test_the_programs_of_the_page_work_as_they_are_written(runs: Runs, said: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert [len(program.replace("\n\n", "\n").splitlines()) for program in programs] == [9, 6]
    for files in (FILES["onnx"], FILES["mxnet"]):
        for name in files:
            shutil.copy(runs.folder / "one" / name, tmp_path)
    Image.fromarray(runs.images["one"][7]).save(tmp_path / "picture.png")
    expected = of_plain_gluon(ModelConfig(), 10, runs.weights["one"], runs.images["one"][7:8])[0]
    answers = []
    for program in programs:
        done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout.strip())
    name = str(expected.argmax())
    assert answers[0].rpartition(" ")[0] == name and float(answers[0].split()[-1]) == pytest.approx(
        expected.max(), abs=1e-5
    )
    assert answers[1] == name


@pytest.mark.parametrize("model", ["resnet", "resnet/model.onnx", "resnet/model-symbol.json"])
def test_predictions_of_the_test_pictures_are_right_as_often_as_the_run_measured(
    runs: Runs, said: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    pictures = str(runs.folder / "pictures" / "test")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(runs.folder / model), pictures, "--json", "--top", "1"])
    assert predict.main() == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [answer["classes"][0]["class"] == Path(answer["file"]).parent.name for answer in answers]
    summary = json.loads((runs.folder / "resnet" / "summary.json").read_text())
    assert len(right) == 12 and sum(right) / 12 == pytest.approx(summary["test_accuracy"])


@pytest.mark.parametrize("form", FILES)
def test_three_ranks_and_one_give_the_same_file_byte_for_byte(runs: Runs, said: Any, form: str) -> None:
    for name in FILES[form]:
        assert (runs.folder / "one" / name).read_bytes() == (runs.folder / "three" / name).read_bytes()


def test_the_command_says_what_it_has_checked_and_where_the_model_is(runs: Runs) -> None:
    command = [sys.executable, str(ROOT / "job" / "export.py"), "one", "--output", "here"]
    done = subprocess.run(command, cwd=runs.folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    accuracy = json.loads((runs.folder / "one" / "summary.json").read_text())["test_accuracy"]
    lines = done.stdout.splitlines()
    assert lines[0] == "the weights after step 3 of one"
    assert lines[1].startswith("the same probabilities as the run's network for 200 test images, ")
    assert lines[2] == f"test accuracy {accuracy:.4f} on 200 images, as the run measured"
    assert lines[3] == "done: here.onnx: uint8 (N, 28, 28) to 10 probabilities"


def test_a_run_that_keeps_an_average_of_its_weights_exports_that_and_the_weights_if_asked(runs: Runs) -> None:
    folder = runs.folder / "averaged"
    summary = json.loads((folder / "summary.json").read_text())
    for arguments, prefix, words in (
        ([], "average_", "the average of the weights"),
        (["--no-average"], "", "the weights"),
    ):
        said = exported(str(folder), "--output", str(folder / "x.safetensors"), *arguments)
        assert said.startswith(f"{words} after step 6 of ")
        assert f"test accuracy {summary[f'{prefix}test_accuracy']:.4f} on 200 images, as the run measured" in said
        with safe_open(str(folder / "x.safetensors"), "numpy") as stored:
            facts = stored.metadata()
        assert facts["weights_sha256"] == summary["average_sha256" if prefix else "weights_sha256"]
        assert json.loads(facts["averaged"]) == bool(prefix)


def test_a_model_that_differs_from_the_run_is_not_written(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    right = to_onnx.write

    def wrong(of: Trained, facts: Any, file: Path) -> None:
        weights = {**of.weights, "11.bias": of.weights["11.bias"] + np.eye(10, dtype="float32")[3] * 1e-3}
        right(replace(of, weights=weights), facts, file)

    before = sorted(runs.folder.rglob("*"))
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(write=wrong))
    with pytest.raises(JobError, match="the exported model is not the run's: a probability differs by"):
        exported(str(runs.folder / "one"), "--output", str(runs.folder / "wrong.onnx"))
    assert sorted(runs.folder.rglob("*")) == before


def test_another_accuracy_than_the_run_measured_is_told(runs: Runs, said: Any) -> None:
    folder = runs.folder / "one"
    config = trained.configuration(folder)
    of = trained.load(folder, config)
    test = formats.load(config.data).test
    model = open_model(folder / "model.safetensors")
    assert compare(model, of, test).right / 200 == of.accuracy
    with pytest.raises(JobError, match=r"the run measured 0\.9\d* at step 3; is this the run's data\?"):
        compare(model, replace(of, accuracy=0.9), test)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "nowhere: no such folder"),
        (["."], 2, "so it is not the folder of a run; did you mean averaged one resnet three?"),
        (["one", "--checkpoint", "2"], 2, "no checkpoint after step 2; there are 0, 3, and last and best"),
        (["one", "--output", "nowhere/x"], 2, "nowhere: no such folder"),
        (["one", "data.dir=nowhere"], 1, "data.dir=nowhere"),
        (["one", "data.dri=nowhere"], 2, "data.dri"),
        (["resnet", "model.name=resnet18_v2"], 1, "the network has changed since the run"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(runs.folder)
    with pytest.raises(JobError) as error:
        exported(*arguments)
    assert words in str(error.value) and error.value.exit_code == code
    assert not list(runs.folder.rglob(".model*"))
