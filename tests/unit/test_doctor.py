"""The doctor's command: what it looks at, what it prints, how it ends. The facts are made up here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job import doctor
from job.errors import JobError, UsageError
from job.fitness import checks, facts
from job.fitness.facts import Answer, Data, Disk, Gpu, Gpus

A100, H100 = (
    Gpu(f"NVIDIA {name}", capability, "535.129.03") for name, capability in (("A100", (8, 0)), ("H100", (9, 0)))
)
MXNET = Answer(json.dumps({"version": "1.9.1", "features": ["MKLDNN"], "sum": 8.0}))
HOROVOD = Answer(json.dumps({"version": "0.28.1", "gloo": True, "mpi": True, "nccl": 22105}))
GPU_PACKAGES = {"mxnet-cu112": "1.9.1", "numpy": "1.23.5"}


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the machine one that nothing is wrong with, but for what is given."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(doctor, "cores", lambda: 64)

    def observe(**changes: Any) -> None:
        sound = {
            "gpus": Gpus(),
            "disk": Disk(1 << 40, None),
            "data": Data(("/data",)),
            "packages": {"mxnet": "1.9.1", "numpy": "1.23.5"},
            "mxnet": MXNET,
            "mxnet_on_gpus": Answer('{"gpus": 1}'),
            "horovod": HOROVOD,
            "memory_bytes": 1 << 40,
        }
        for name, value in {**sound, **changes}.items():
            monkeypatch.setattr(facts, name, lambda *arguments, value=value: value)

    observe()
    return observe


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, str]]:
    """The checks by name, of ``--json``."""
    try:
        doctor.main(["--json", *arguments])
    except JobError as error:
        assert error.exit_code == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all(set(check) == {"name", "status", "message", "remedy"} for check in checks)
    assert len({check["name"] for check in checks}) == len(checks)
    return {check["name"]: check for check in checks}


def test_a_sound_machine_passes_and_a_failed_check_is_an_error_that_names_it(observed: Callable[..., None]) -> None:
    doctor.main([])
    observed(horovod=Answer("", "ImportError: no"), data=Data(error="damaged"))
    with pytest.raises(JobError, match=r"not fit for this run: horovod, data$") as failed:
        doctor.main([])
    assert failed.value.exit_code == 1


def test_warnings_alone_are_no_failure(observed: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    observed(data=Data((), ("train-images-idx3-ubyte",)))
    doctor.main([])
    assert "warn" in capsys.readouterr().out


def test_the_table_has_every_check_with_its_remedy_and_takes_brackets_as_they_are(
    observed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    observed(mxnet=Answer("", "OSError: [red]not markup[/red]"))
    with pytest.raises(JobError):
        doctor.main([])
    shown = capsys.readouterr().out
    _, found = doctor.examine(doctor.load_config(), None)
    assert "[red]not markup[/red]" in shown
    assert all(check.name in shown for check in found)
    flat = "".join(shown.replace("│", " ").split())
    assert all("".join(check.sentence.split("; ")[-1].split()) in flat for check in found)


def test_the_facts_are_those_that_hosts_are_compared_by(
    observed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    observed(disk=Disk(12345678901, None))
    doctor.main(["--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert set(facts) == {
        "hostname", "machine", "started", "commit", "python", "packages", "processor", "free_disk_bytes", "data",
        "interfaces", "clock_unix_seconds",
    }  # fmt: skip
    assert facts["free_disk_bytes"] == 12345678901 and facts["data"] is True
    assert facts["packages"] == {"mxnet": "1.9.1", "numpy": "1.23.5"}
    observed(data=Data((), ("train-images-idx3-ubyte",)))
    doctor.main(["--json"])
    assert json.loads(capsys.readouterr().out)["facts"]["data"] is False


def test_a_gpu_of_ampere_is_asked_to_compute_and_one_of_hopper_is_refused_first(
    observed: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed(gpus=Gpus((A100,)), packages=GPU_PACKAGES)
    sound = told(capsys)
    assert [sound[name]["status"] for name in ("gpu", "gpu per rank", "driver", "gpu computes", "nccl")] == ["ok"] * 5
    observed(gpus=Gpus((H100,)), packages=GPU_PACKAGES)
    monkeypatch.setattr(facts, "mxnet_on_gpus", lambda: pytest.fail("asked to compute where it cannot"))
    refused = told(capsys)
    assert refused["gpu"] == checks.gpu(Gpus((H100,)), True, "auto")._asdict()
    assert refused["gpu"]["status"] == "fail" and "driver" not in refused


def test_the_ranks_are_one_a_gpu_or_two_or_those_that_are_given(
    observed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys)["cores"]["message"] == "2 ranks on 64 cores"
    assert told(capsys, "-np", "65")["cores"]["status"] == "warn"
    observed(gpus=Gpus((A100,) * 4), packages=GPU_PACKAGES)
    assert told(capsys)["gpu per rank"]["message"] == "4 ranks on 4 GPUs"
    assert told(capsys, "-np", "5")["gpu per rank"]["status"] == "fail"


def test_the_arguments_of_training_decide_what_is_looked_at(
    observed: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text(f"run: {{dir: {tmp_path}/chosen}}")
    asked: list[Any] = []
    monkeypatch.setattr(facts, "data", lambda config: asked.append(config.dir) or Data(("/data",)))
    found = told(capsys, "--config", str(tmp_path / "own.yaml"), "data.dir=/mine", "--quiet", "run.device=gpu")
    assert f"run.dir={tmp_path}/chosen" in found["disk"]["message"] and asked == [Path("/mine")]
    assert found["gpu"]["status"] == "fail"
    monkeypatch.setattr(facts, "gpus", lambda: pytest.fail("a driver is asked though the CPU is wanted"))
    assert told(capsys, "run.device=cpu")["gpu"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wrong"], "--wrong.*--help"),
        (["-np", "0"], "-np.*'0'"),
        (["-np", "two"], "-np.*'two'"),
        (["train.epoch=1"], r"train\.epoch: unknown key"),
        (["--config", "absent.yaml"], r"absent\.yaml"),
    ],
)
def test_wrong_usage_is_a_usage_error(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        doctor.main(arguments)
