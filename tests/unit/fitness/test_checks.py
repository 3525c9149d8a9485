"""Each check of the doctor, on made-up facts: what must be found right, and what must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mxnet as mx
import pytest

from job.config import Config, ModelConfig
from job.fitness import checks
from job.fitness.checks import Check
from job.fitness.facts import Answer, Data, Disk, Gpu, Gpus
from job.networks import models

GIB, MIB = 1 << 30, 1 << 20
CONFIG = Config.model_validate({"run": {"dir": "runs/here"}, "checkpoint": {"keep": 2}})
BROKEN = Answer("", "ImportError: libxyz.so: no such file")
MXNET = {"version": "1.9.1", "features": ["MKLDNN", "OPENCV"], "sum": 8.0}
HOROVOD = {"version": "0.28.1", "gloo": True, "mpi": True, "nccl": 0}


def answer(of: dict[str, Any], **changes: Any) -> Answer:
    return Answer(json.dumps({**of, **changes}))


def cards(*capabilities: tuple[int, int] | None, name: str = "A card", driver: str = "535.129.03") -> Gpus:
    return Gpus(tuple(Gpu(name, capability, driver) for capability in capabilities))


NO_GPU, UNKNOWN_GPUS = Gpus(), Gpus(error="no answer within 30 s")
AMPERE, HOPPER = cards((8, 0), (8, 0), name="NVIDIA A100"), cards((9, 0), name="NVIDIA H100")

# What the check says of the facts; the status that it must have; words that message and remedy must hold.
CASES: dict[str, tuple[Check, str, list[str]]] = {
    "Python 3.9": (checks.python("3.9.2", "Linux x86_64"), "ok", ["3.9.2"]),
    "Python 3.11": (checks.python("3.11.7", "Linux x86_64"), "ok", []),
    "Python 3.8": (checks.python("3.8.20", "Linux x86_64"), "fail", ["3.8.20", "3.9 to 3.11", "make setup"]),
    "Python 3.12": (checks.python("3.12.1", "Linux x86_64"), "fail", ["3.12.1", "make setup"]),
    "another system": (checks.python("3.11.7", "Darwin arm64"), "fail", ["Darwin arm64", "Linux on x86-64"]),
    "numpy 1.23": (checks.numpy({"numpy": "1.23.5"}), "ok", ["1.23.5"]),
    "numpy 1.24": (checks.numpy({"numpy": "1.24.0"}), "fail", ["1.24.0", "numpy==1.23.5"]),
    "numpy 2": (checks.numpy({"numpy": "2.0.1"}), "fail", ["2.0.1"]),
    "no numpy": (checks.numpy({}), "fail", ["not installed", "make setup"]),
    "the CPU wheel": (checks.wheels({"mxnet": "1.9.1"}), "ok", ["mxnet 1.9.1", "for the CPU"]),
    "the GPU wheel": (checks.wheels({"mxnet-cu112": "1.9.1"}), "ok", ["mxnet-cu112 1.9.1", "for GPUs"]),
    "both wheels": (checks.wheels({"mxnet": "1.9.1", "mxnet-cu112": "1.9.1"}), "fail", ["overwrite", "rm -rf .venv"]),
    "no wheel": (checks.wheels({"numpy": "1.23.5"}), "fail", ["no wheel", "make setup"]),
    "an old wheel": (checks.wheels({"mxnet": "1.8.0"}), "fail", ["mxnet 1.8.0", "1.9.1"]),
    "MXNet": (checks.mxnet(answer(MXNET)), "ok", ["1.9.1", "oneDNN"]),
    "MXNet for GPUs": (
        checks.mxnet(answer(MXNET, features=["CUDA", "CUDNN", "NCCL", "MKLDNN"])), "ok", ["oneDNN, CUDA, cuDNN, NCCL"],
    ),
    "MXNet without oneDNN": (checks.mxnet(answer(MXNET, features=["OPENCV"])), "warn", ["neither", "slow"]),
    "MXNet broken": (checks.mxnet(BROKEN), "fail", ["ImportError: libxyz.so", "make setup"]),
    "MXNet for GPUs without a driver": (
        checks.mxnet(Answer("", "OSError: libcuda.so.1: cannot open")), "fail", ["libcuda.so.1", "NVIDIA driver"],
    ),
    "MXNet miscomputes": (checks.mxnet(answer(MXNET, sum=7.5)), "fail", ["7.5"]),
    "Horovod": (checks.horovod(answer(HOROVOD)), "ok", ["0.28.1", "Gloo, MPI"]),
    "Horovod with NCCL": (checks.horovod(answer(HOROVOD, nccl=22105)), "ok", ["Gloo, MPI, NCCL"]),
    "Horovod without MPI": (checks.horovod(answer(HOROVOD, mpi=False)), "warn", ["--gloo", "make setup"]),
    "Horovod without Gloo": (checks.horovod(answer(HOROVOD, gloo=False)), "fail", ["Gloo", "make setup"]),
    "Horovod broken": (checks.horovod(BROKEN), "fail", ["libxyz.so", "make setup"]),
    "mpirun": (checks.mpirun(Answer("mpirun (Open MPI) 4.1.8")), "ok", ["4.1.8"]),
    "no mpirun": (checks.mpirun(Answer("", "No such file or directory")), "warn", ["No such file", "Gloo"]),
    "horovodrun": (checks.horovodrun("/env/bin/horovodrun", "/env/bin/horovodrun"), "ok", ["/env"]),
    "no horovodrun": (checks.horovodrun(None, "/env/bin/horovodrun"), "warn", ["not on PATH", "activate"]),
    "another horovodrun": (checks.horovodrun("/x/horovodrun", "/env/horovodrun"), "warn", ["/x/", "/env/", "activate"]),
    "a core for each rank": (checks.cores(4, 4), "ok", ["4 ranks on 4 cores"]),
    "too few cores": (checks.cores(4, 3), "warn", ["4 ranks on 3 cores", "fewer"]),
    "threads by share": (checks.threads(None, 2, 8), "ok", ["one an operator", "4 cores"]),
    "one thread": (checks.threads("1", 2, 8), "ok", ["one an operator", "4 cores"]),
    "threads of a site": (checks.threads("5", 2, 8), "warn", ["OMP_NUM_THREADS=5", "not obeyed", "unset", "4 cores"]),
    "threads of nonsense": (checks.threads("auto", 2, 2), "warn", ["OMP_NUM_THREADS=auto", "1 core"]),
    "Docker's shared memory": (checks.shared_memory(Disk(64 * MIB, None), 12, False), "ok", ["64 MiB free"]),
    "Docker's shared memory for many ranks": (
        checks.shared_memory(Disk(64 * MIB, None), 16, False), "warn", ["64 MiB", "16 ranks", "80 MiB", "--shm-size"],
    ),
    "Docker's shared memory on GPUs": (
        checks.shared_memory(Disk(64 * MIB, None), 2, True), "warn", ["64 MiB", "256 MiB", "--shm-size", "emptyDir"],
    ),
    "shared memory": (checks.shared_memory(Disk(GIB, None), 8, True), "ok", ["1.0 GiB"]),
    "no shared memory": (checks.shared_memory(Disk(0, None, "No such file"), 1, False), "warn", ["/dev/shm: No such"]),
    "memory": (checks.memory(4 * GIB, 4), "ok", ["4.0 GiB for 4 ranks"]),
    "too little memory": (checks.memory(4 * GIB - 1, 4), "warn", ["4 ranks", "fewer", "memory limit"]),
    "open files": (checks.open_files(1024), "ok", ["1024"]),
    "any number of open files": (checks.open_files(-1), "ok", ["any number"]),
    "few open files": (checks.open_files(256), "warn", ["256", "ulimit -n"]),
    "disk": (checks.disk(Disk(10 * GIB, 10**6), CONFIG), "ok", ["runs/here", "10.0 GiB free"]),
    "disk that counts no inodes": (checks.disk(Disk(10 * GIB, None), CONFIG), "ok", []),
    "disk that may fill up": (checks.disk(Disk(100 * MIB, 10**6), CONFIG), "warn", ["100 MiB free", "128 MiB"]),
    "full disk": (checks.disk(Disk(4096, 10**6), CONFIG), "fail", ["0 MiB free", "run.dir"]),
    "disk without inodes": (checks.disk(Disk(10 * GIB, 3), CONFIG), "fail", ["only 3 more files"]),
    "dead disk": (checks.disk(Disk(0, None, "no answer within 10 s"), CONFIG), "fail", ["runs/here: no answer within"]),
    "run.dir": (checks.run_dir("", CONFIG), "ok", ["runs/here"]),
    "read-only run.dir": (checks.run_dir("Read-only file system", CONFIG), "fail", ["runs/here", "Read-only"]),
    "data": (checks.data(Data(("/cache",))), "ok", ["/cache"]),
    "no data": (checks.data(Data((), ("train-images-idx3-ubyte",))), "warn", ["train-images", "make setup"]),
    "damaged data": (checks.data(Data(error="x.gz: truncated")), "fail", ["x.gz: truncated", "data.dir"]),
    "data without numpy": (checks.data(Data(error="No module named 'numpy'")), "fail", ["numpy", "make setup"]),
    "clock": (checks.clock((1.8e9, 1.8e9 + 5.2), (7, 12.1)), "ok", []),
    "clock of 1970": (checks.clock((3600, 3605), (7, 12)), "warn", ["2024", "time service"]),
    "clock that is set": (checks.clock((1.8e9, 1.8e9 - 55), (7, 12)), "warn", ["-60.0 s", "time service"]),
    "clock backward": (checks.clock((1.8e9, 1.8e9 + 5), (7, 6)), "fail", ["backward"]),
    "hostname": (checks.hostname("node1", ""), "ok", ["node1"]),
    "unknown hostname over Gloo": (
        checks.hostname("node1", "Name or service not known", over_gloo=True), "fail", ["node1", "/etc/hosts"],
    ),
    "unknown hostname": (checks.hostname("node1", "Name or service not known"), "warn", ["node1", "/etc/hosts"]),
    "network": (checks.network({"lo": ["127.0.0.1"], "eth0": ["10.0.0.3"]}), "ok", ["eth0 10.0.0.3"]),
    "loopback only": (checks.network({"lo": ["127.0.0.1"], "eth0": []}), "warn", ["lo 127.0.0.1", "several"]),
    "no interface": (checks.network({}), "warn", ["several"]),
    "no GPU": (checks.gpu(NO_GPU, False, "auto"), "ok", ["the CPU"]),
    "no GPU for the GPU wheel": (checks.gpu(NO_GPU, True, "auto"), "warn", ["built for GPUs", "driver"]),
    "no GPU though wanted": (checks.gpu(NO_GPU, True, "gpu"), "fail", ["run.device=gpu", "run.device=cpu"]),
    "GPUs that are not wanted": (checks.gpu(HOPPER, True, "cpu"), "ok", ["run.device=cpu"]),
    "GPUs": (checks.gpu(AMPERE, True, "auto"), "ok", ["2 x NVIDIA A100 (8.0)"]),
    "GPUs wanted": (checks.gpu(AMPERE, True, "gpu"), "ok", []),
    "GPUs idle": (checks.gpu(AMPERE, False, "auto"), "warn", ["A100", "built for the CPU", "launch/setup.sh --gpu"]),
    "GPUs idle though wanted": (checks.gpu(AMPERE, False, "gpu"), "fail", ["launch/setup.sh --gpu"]),
    "Hopper": (
        checks.gpu(HOPPER, True, "auto"), "fail",
        ["NVIDIA H100", "9.0", "5.0 to 8.6", "no PTX", "Ampere or Ada", "run.device=cpu"],
    ),
    "Hopper and the CPU wheel": (checks.gpu(HOPPER, False, "auto"), "warn", ["NVIDIA H100", "run.device=cpu"]),
    "Hopper wanted by the CPU wheel": (checks.gpu(HOPPER, False, "gpu"), "fail", ["9.0", "run.device=cpu"]),
    "Hopper beside Ampere": (checks.gpu(cards((8, 0), (9, 0)), True, "auto"), "fail", ["9.0"]),
    "a card of unknown capability": (checks.gpu(cards(None), True, "auto"), "warn", ["unknown", "too old to tell"]),
    "a driver that hangs": (checks.gpu(UNKNOWN_GPUS, True, "auto"), "fail", ["no answer", "driver", "run.device=cpu"]),
    "a driver that hangs beside the CPU wheel": (checks.gpu(UNKNOWN_GPUS, False, "auto"), "warn", ["no answer"]),
    "a driver that hangs though wanted": (checks.gpu(UNKNOWN_GPUS, False, "gpu"), "fail", ["no answer"]),
    "the GPU computes": (checks.gpu_computes(Answer('{"gpus": 2}')), "ok", ["2 GPUs"]),
    "the GPU fails": (checks.gpu_computes(Answer("", "MXNetError: no kernel image")), "fail", ["no kernel image"]),
    "MXNet sees none": (checks.gpu_computes(Answer('{"gpus": 0}')), "fail", ["sees no GPU", "CUDA_VISIBLE_DEVICES"]),
    "a GPU for each rank": (checks.gpu_per_rank(2, AMPERE), "ok", ["2 ranks on 2 GPUs"]),
    "too few GPUs": (checks.gpu_per_rank(3, AMPERE), "fail", ["3 ranks on 2 GPUs", "at most one"]),
    "driver": (checks.driver(cards((8, 0), driver="520.61.05")), "ok", ["520.61.05"]),
    "driver of three numbers less": (
        checks.driver(cards((8, 0), driver="520.56.06")), "warn", ["520.56.06", "520.61.05", "slower"],
    ),
    "driver of the first CUDA 11": (checks.driver(cards((8, 0), driver="450.80.02")), "warn", ["520.61.05"]),
    "driver before CUDA 11": (checks.driver(cards((7, 0), driver="450.51.06")), "fail", ["450.51.06", "450.80.02"]),
    "a processor": (checks.processor("Xeon: avx2 fma"), "ok", ["Xeon: avx2 fma"]),
    "GPUs that repeat their bits": (checks.deterministic({}, True), "ok", ["run.deterministic=true", "not tested"]),
    "GPUs that need not": (checks.deterministic({"NVIDIA_TF32_OVERRIDE": "1"}, False), "ok", ["false"]),
    "GPUs that are kept from it": (
        checks.deterministic({"NVIDIA_TF32_OVERRIDE": "1", "MXNET_CUDNN_AUTOTUNE_DEFAULT": "0"}, True), "warn",
        ["NVIDIA_TF32_OVERRIDE=1 in", "unset it"],
    ),
    "float16 on GPUs": (checks.dtype("float16", on_gpus=True), "ok", ["model.dtype=float16"]),
    "float16 on a CPU": (checks.dtype("float16", on_gpus=False), "warn", ["many times slower", "on a GPU"]),
    "float64 on a CPU": (checks.dtype("float64", on_gpus=False), "ok", ["model.dtype=float64"]),
    "NCCL": (checks.nccl(answer(HOROVOD, nccl=22105)), "ok", ["NCCL 2.21.5"]),
    "NCCL before 2.9": (checks.nccl(answer(HOROVOD, nccl=2804)), "ok", ["NCCL 2.8.4"]),
    "no NCCL": (checks.nccl(answer(HOROVOD)), "warn", ["without NCCL", "launch/setup.sh --gpu"]),
    "nothing left over": (checks.left_over([]), "ok", ["nothing"]),
    "left over": (checks.left_over(["/dev/shm/x"]), "warn", ["1 file in /dev/shm", "rm /dev/shm/x"]),
    "a clear search path": (checks.hiding([]), "ok", ["nothing"]),
    "another numpy": (
        checks.hiding(["/site (of PYTHONPATH) holds numpy"]), "fail", ["/site", "numpy", "unset PYTHONPATH;"],
    ),
    "no telling variable": (checks.environment(["HOME", "PATH"]), "ok", ["no variable"]),
    "telling variables": (checks.environment(["HOME", "NCCL_DEBUG", "HOROVOD_X"]), "ok", ["HOROVOD_X, NCCL_DEBUG"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_fits_the_facts_and_says_why(name: str) -> None:
    check, status, words = CASES[name]
    assert check.status == status, check
    assert all(word in check.sentence for word in words), check


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_ok_comes_with_a_remedy_and_what_is_ok_without(name: str) -> None:
    check = CASES[name][0]
    assert check.message and bool(check.remedy) == (check.status != "ok")


def test_every_check_is_seen_both_ok_and_not_ok() -> None:
    verdicts: dict[str, set[bool]] = {}
    for check, _, _ in CASES.values():
        verdicts.setdefault(check.name, set()).add(check.status == "ok")
    assert {name for name, seen in verdicts.items() if seen != {True, False}} == {"environment", "processor"}  # notes


# NVIDIA's list of compute capabilities; what the wheel's code (5.0, 6.0, 7.0, 8.0, 8.6) runs on, by NVIDIA's rule of
# the same major version and no lesser minor one.
@pytest.mark.parametrize("capability", [(5, 0), (5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9)])
def test_maxwell_to_ada_are_supported(capability: tuple[int, int]) -> None:
    assert checks.gpu(cards(capability), True, "gpu").status == "ok"


@pytest.mark.parametrize("capability", [(3, 5), (3, 7), (9, 0), (10, 0), (12, 0)])
def test_kepler_hopper_and_blackwell_are_not(capability: tuple[int, int]) -> None:
    assert checks.gpu(cards(capability), True, "gpu").status == "fail"


def test_values_of_the_environment_are_never_shown() -> None:
    environment = {"HOROVOD_SECRET_KEY": "hunter2"}
    assert "hunter2" not in checks.environment(environment).sentence


@pytest.mark.parametrize("name", ["tutorial", "tutorial_without_batch_norm"])
def test_a_checkpoint_is_within_the_sizes_that_the_disk_is_checked_for(name: Any) -> None:
    net = models.build(ModelConfig(name=name, dense_batch_norm=name == "tutorial"))
    models.initialize(net, mx.cpu(), "float32")
    net(mx.nd.zeros((1, 1, 28, 28)))
    numbers = sum(parameter.data().size for parameter in net.collect_params().values())
    weights_in_float32, with_adam_in_float64 = 4 * numbers, 3 * 8 * numbers
    assert checks.CHECKPOINT_BYTES[0] < weights_in_float32
    assert with_adam_in_float64 + 100_000 < checks.CHECKPOINT_BYTES[1]


def test_more_checkpoints_need_more_room(tmp_path: Path) -> None:
    greedy = Config.model_validate({"checkpoint": {"keep": 1000}})
    assert checks.disk(Disk(10 * GIB, None), CONFIG).status == "ok"
    assert checks.disk(Disk(10 * GIB, None), greedy).status == "warn"


@pytest.mark.parametrize(("value", "status"), [(None, "ok"), ("", "ok"), ("0", "ok"), ("1", "warn")])
def test_loops_that_are_not_compiled_are_told(value: str | None, status: str) -> None:
    check = checks.compiler(value)
    assert check.status == status
    assert status == "ok" or "NUMBA_DISABLE_JIT=1: the loops are not compiled" in check.sentence
