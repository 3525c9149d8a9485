"""The command that names what pictures show, on a model made by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from job import predict
from job.config import ModelConfig
from job.data.dataset import FASHION_MNIST
from job.errors import UsageError
from job.exporting.formats import FORMATS
from job.exporting.served import metadata
from job.exporting.trained import Trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, whose logit of class k is k times the mean of the pixels, from 0 to 1; and 70 grey pictures."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "network.py").write_text(
        "from mxnet.gluon import nn\ndef linear(classes):\n    return nn.Dense(classes)\n"
    )
    weights = {
        "weight": np.arange(10.0)[:, None].repeat(784, 1).astype("float32") / 784,
        "bias": np.zeros(10, "float32"),
    }
    of = Trained(ModelConfig(name=f"{folder}/network.py:linear"), FASHION_MNIST, weights, 1, "c0ffee")
    FORMATS["onnx"].write(of, metadata(of), folder / "model.onnx")
    (folder / "pictures").mkdir()
    for number in range(70):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[4:24, 4:24] = number * 3
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:02}.png")
    (folder / "not.png").write_text("hello")
    return folder


def expected(number: int) -> np.ndarray:
    exponents = np.exp(np.arange(10) * number * 3 / 255 * 400 / 784)
    return exponents / exponents.sum()


def predicted(folder: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["predict.py", *arguments])
        return predict.main()


def test_every_picture_of_a_folder_has_a_json_line_with_its_probabilities(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predicted(folder, "model.onnx", "pictures", "--json", "--top", "20") == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["file"] for one in said] == [f"pictures/{number:02}.png" for number in range(70)]
    for number, one in enumerate(said):
        named = {answer["class"]: answer["probability"] for answer in one["classes"]}
        assert [named[name] for name in FASHION_MNIST.classes] == pytest.approx(expected(number).tolist(), abs=1e-5)
        assert one["converted"] == ""
    assert [answer["class"] for answer in said[69]["classes"]] == list(FASHION_MNIST.classes)[::-1]


def test_the_table_names_the_first_three_and_what_was_converted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(folder / "pictures" / "60.png").convert("RGB").save(folder / "colour.png")
    assert predicted(folder, "model.onnx", "colour.png") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "1.", "2.", "3.", "converted"]
    first = [f"{value:.4f}" for value in sorted(expected(60))[:-4:-1]]
    assert row.split() == [
        "colour.png",
        "Ankle",
        "boot",
        first[0],
        "Bag",
        first[1],
        "Sneaker",
        first[2],
        "RGB",
        "to",
        "grey",
    ]


def test_what_is_no_picture_is_one_line_and_the_rest_goes_on_and_the_end_is_1(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "job" / "predict.py"), "model.onnx", "not.png", "-", "nowhere.png"]
    done = subprocess.run(
        command, cwd=folder, input="pictures/01.png\n\npictures/02.png\n", capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: not.png: not a picture",
        "error: nowhere.png: No such file or directory",
    ]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["file", "pictures/01.png", "pictures/02.png"]


def test_in_json_what_is_no_picture_is_a_line_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted(folder, "model.onnx", "not.png", "pictures/01.png", "--json") == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {"file": "not.png", "error": "not.png: not a picture"} and "classes" in second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "x.png"], "nowhere: no such file; give the folder of a run, or a model"),
        (["pictures", "x.png"], "so it is not the folder of a run"),
        (["not.png", "x.png"], "is no exported model"),
        (["model.onnx", "-"], "standard input names no picture"),
        (["model.onnx", "x.png", "--checkpoint", "best"], "--checkpoint is for the folder of a run"),
    ],
)
def test_bad_usage_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UsageError, match=words):
        predicted(folder, *arguments)


@pytest.mark.parametrize("arguments", [[], ["model.onnx"], ["model.onnx", "x.png", "--top", "0"]])
def test_argparse_ends_with_2(folder: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predicted(folder, *arguments)
    assert ended.value.code == 2
