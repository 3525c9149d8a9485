"""The page for somebody with pictures and a network of their own: its files and commands, as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|yaml|sh)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILES = ["draw.py", "net.py", "shapes.yaml", "pack.py"]


class Followed:
    """The folder of somebody who has followed the page, and what each of its commands printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []
        self.printed: dict[str, str] = {}
        for room in ("job", "launch"):
            (folder / room).symlink_to(ROOT / room)
        for kind, block in BLOCK.findall((ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")):
            if kind == "sh":
                self.printed[block.split("\n")[-2]] = self.run(block)
            else:
                self.files.append(block.split("\n")[0].lstrip("# "))
                (folder / self.files[-1]).write_text(block, encoding="utf-8")

    def run(self, commands: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(self.folder / "cache")}
        environment.pop("PYTHONPATH", None)
        shell = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(shell, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, commands + done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def last(self, start: str) -> str:
        """What the block printed whose last command starts so."""
        (printed,) = (printed for command, printed in self.printed.items() if command.startswith(start))
        return printed

    def summary(self, run: str) -> Any:
        return json.loads((self.folder / "runs" / run / "summary.json").read_text())


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    return Followed(tmp_path_factory.mktemp("mine"))


def test_two_ranks_learn_the_pictures(followed: Followed) -> None:
    summary = followed.summary("shapes")
    assert followed.files == FILES and summary["ranks"] == 2
    assert summary["test_examples"] == 150 and summary["validation_examples"] == 60
    assert summary["test_accuracy"] > 0.8 and summary["validation_accuracy"] > 0.8  # by chance 0.33
    about = json.loads((followed.folder / "runs" / "shapes" / "dataset.json").read_text())
    assert about["classes"] == ["circle", "square", "triangle"] and about["shape"] == [3, 32, 32]


def test_the_check_prints_the_configuration_of_the_page(followed: Followed) -> None:
    printed = yaml.safe_load(followed.last("python job/train.py --check"))
    written = yaml.safe_load((followed.folder / "shapes.yaml").read_text())
    augment = written["data"].pop("augment")
    assert all(printed[section][key] == value for section in written for key, value in written[section].items())
    assert all(printed["data"]["augment"][key] == value for key, value in augment.items())


def test_the_prediction_names_the_class_and_the_exported_file_is_there(followed: Followed) -> None:
    picture, first = followed.last("python job/predict.py").splitlines()[1].split()[:2]
    assert first == Path(picture).parent.name == "triangle"
    session = onnxruntime.InferenceSession(str(followed.folder / "runs" / "shapes" / "model.onnx"))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["circle", "square", "triangle"]
    assert facts["weights_sha256"] == followed.summary("shapes")["weights_sha256"]


def test_one_rank_ends_with_the_same_bits(followed: Followed) -> None:
    hashes = [followed.summary(run)["weights_sha256"] for run in ("shapes", "on-one")]
    assert hashes[0] == hashes[1] and followed.summary("on-one")["ranks"] == 1
    assert followed.last("grep").count(hashes[0]) == 2


def test_the_records_hold_the_same_pictures(followed: Followed) -> None:
    from_folders = [line for line in followed.last("launch/local.sh").splitlines() if line.startswith("data: ")]
    from_records = followed.last("python -m job.data").splitlines()
    assert from_records[-1] == from_folders[-1]  # mean and deviation
    assert from_records[-2] == from_folders[-2].replace("folders of pictures in pictures", "records in records")
