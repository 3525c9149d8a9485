"""What training says by itself before it starts: the doctor's sentences, once, with the exit code that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job import cli
from job.config import Config, load_config
from job.distributed import placement
from job.errors import JobError, UsageError
from job.fitness import checks, facts, preflight
from job.fitness.facts import Disk, Gpu, Gpus

GIB = 1 << 30
H100 = Gpus((Gpu("NVIDIA H100", (9, 0), "535.129.03"),))
A100 = Gpus((Gpu("NVIDIA A100", (8, 0), "535.129.03"),))
Node = Callable[..., None]
NO_GPUS, ROOM, SHARED = Gpus(), Disk(100 * GIB, None), Disk(GIB, None)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Makes this a rank on a node as described; by default one that nothing is wrong with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(
        rank: int = 0,
        local_rank: int = 0,
        ranks: int = 1,
        cores: int = 8,
        gpus: Gpus = NO_GPUS,
        wheel: str = "mxnet",
        disk: Disk = ROOM,
        shm: Disk = SHARED,
    ) -> None:
        values = {"RANK": rank, "SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_SIZE": ranks}
        for name, value in values.items():
            monkeypatch.setenv(f"HOROVOD_{name}", str(value))
        monkeypatch.setattr(preflight, "cores", lambda: cores)
        monkeypatch.setattr(facts, "gpus", lambda: gpus)
        monkeypatch.setattr(facts, "packages", lambda: {wheel: "1.9.1"})
        monkeypatch.setattr(facts, "disk", lambda folder: shm if folder == Path("/dev/shm") else disk)

    make()
    return make


def names(config: Config) -> list[str]:
    return [warning.name for warning in preflight.check(config)]


def test_a_sound_node_has_nothing_to_say(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    cli.parse([])
    assert capsys.readouterr() == ("", "")


def test_a_gpu_that_the_wheel_has_no_code_for_is_refused_in_the_doctors_words(node: Node) -> None:
    node(gpus=H100, wheel="mxnet-cu112")
    with pytest.raises(UsageError) as refused:
        cli.parse([])
    assert str(refused.value) == checks.gpu(H100, True, "auto").sentence
    assert "9.0" in str(refused.value) and "run.device=cpu" in str(refused.value)


def test_the_remedy_is_accepted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node(gpus=H100, wheel="mxnet-cu112")
    monkeypatch.setattr(facts, "gpus", lambda: pytest.fail("a driver is asked though the CPU is wanted"))
    assert names(cli.parse(["run.device=cpu"])) == []


def test_a_check_before_the_launch_refuses_too(node: Node) -> None:
    node(gpus=H100, wheel="mxnet-cu112")
    with pytest.raises(UsageError, match=r"9\.0"):
        cli.parse(["--check"])


def test_the_first_rank_of_another_node_looks_at_its_own_gpus_and_not_at_run_dirs_disk(node: Node) -> None:
    node(rank=4, ranks=4, disk=Disk(0, None, "Read-only file system"))
    assert names(load_config()) == []
    node(rank=4, ranks=4, gpus=H100, wheel="mxnet-cu112")
    with pytest.raises(UsageError, match=r"9\.0"):
        cli.parse([])


def test_the_other_ranks_of_a_node_look_at_nothing(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node(rank=1, local_rank=1, ranks=4, cores=1, gpus=H100, wheel="mxnet-cu112")
    cli.parse([])
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_no_fault_of_the_command_line(node: Node) -> None:
    node(disk=Disk(0, None))
    with pytest.raises(JobError, match=r"run\.dir=.*0 MiB free.*another run\.dir") as refused:
        cli.parse([])
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"ranks": 4, "cores": 2}, "cores"),
        ({"ranks": 2, "shm": Disk(1 << 20, None)}, "shared memory"),
        ({"disk": Disk(64 << 20, None)}, "disk"),
        ({"gpus": A100}, "gpu"),
    ],
)
def test_what_may_go_badly_is_told_once_on_stderr(
    node: Node, capsys: pytest.CaptureFixture[str], found: dict[str, object], name: str
) -> None:
    node(**found)
    (warning,) = preflight.check(load_config())
    assert warning.name == name
    cli.parse([])
    assert capsys.readouterr() == ("", f"warning: {warning.sentence}\n")
    with pytest.raises(SystemExit):
        cli.parse(["--check"])  # launch/local.sh asks before rank 0, which then tells it
    assert capsys.readouterr().err == ""
    node(**{"rank": 4, **found})
    cli.parse([])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("version", "code"), [("470.57.02", 0), ("440.33.01", 1)])
def test_a_driver_that_is_old_is_told_and_one_that_is_too_old_is_an_error(node: Node, version: str, code: int) -> None:
    node(gpus=Gpus((Gpu("NVIDIA A100", (8, 0), version),)), wheel="mxnet-cu112")
    if code == 0:
        assert names(load_config()) == ["driver"]
    else:
        with pytest.raises(JobError, match=rf"driver {version}") as refused:
            cli.parse([])
        assert refused.value.exit_code == code


def test_float16_is_called_slow_where_there_is_no_gpu(node: Node) -> None:
    mixed = load_config(overrides=["model.dtype=float16"])
    assert names(mixed) == ["dtype"]
    node(gpus=A100, wheel="mxnet-cu112")
    assert "dtype" not in names(mixed)


def test_threads_of_a_site_that_are_not_obeyed_are_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node(ranks=4, cores=8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert names(load_config()) == ["threads"]


def test_the_share_that_training_gives_each_rank_crowds_nobody(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node(ranks=3, cores=8)
    monkeypatch.setattr(placement, "cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "JOB_ASKED_OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    placement.share_cores()
    assert names(load_config()) == []


def test_one_rank_needs_no_shared_memory(node: Node) -> None:
    node(ranks=1, shm=Disk(0, None, "No such file or directory"))
    assert names(load_config()) == []


@pytest.mark.parametrize(("controller", "refused"), [("gloo", True), ("mpi", False)])
def test_a_host_whose_name_has_no_address_is_refused_where_gloo_would_crash(
    node: Node, monkeypatch: pytest.MonkeyPatch, controller: str, refused: bool
) -> None:
    node(ranks=2)
    monkeypatch.setattr(facts, "address_error", lambda name: "Name or service not known")
    monkeypatch.setenv("HOROVOD_CONTROLLER", controller)
    if refused:
        with pytest.raises(JobError, match=r"has no address.*/etc/hosts"):
            preflight.check(load_config(None, []))
    else:
        preflight.check(load_config(None, []))


def test_ranks_that_may_round_otherwise_are_named_once_for_each_way() -> None:
    alike = "Xeon: avx2 avx512f\nmxnet 1.9.1"
    found = [alike, alike, "Xeon: avx2\nmxnet 1.9.1", "Xeon: avx2\nmxnet 1.9.1", "Xeon: avx2 avx512f\nmxnet 1.9.0"]
    first, second = (warning.sentence for warning in preflight.compare(found))
    assert first.startswith("ranks 2, 3: Xeon without avx512f, unlike the others; bits may depend")
    assert second.startswith("rank 4: mxnet 1.9.0, where rank 0 has mxnet 1.9.1; bits may depend")
    assert preflight.compare([alike, alike]) == preflight.compare([alike]) == []
