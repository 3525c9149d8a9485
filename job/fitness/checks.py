"""What the doctor makes of the facts: one small pure function for each check, from facts to a verdict and a remedy.

Training asks the few that are cheap before it starts (:mod:`job.fitness.preflight`), and says the same sentences.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from job.config import Config
from job.distributed import search_path
from job.distributed.placement import DETERMINISTIC
from job.fitness.facts import Answer, Data, Disk, Gpus

GIB, MIB = 1 << 30, 1 << 20

# The machine code in libmxnet.so of mxnet-cu112, which holds no PTX that a driver could compile for another GPU
# (cuobjdump --list-elf, --list-ptx). Such code runs on its own GPU and on later ones of the same major version.
WHEEL_CODE = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))
# NVIDIA's CUDA compatibility guide: with this driver CUDA 11.x runs; but what is compiled while it runs needs the
# driver of the compiler's own version. MXNet does that when it fuses operators, with NVRTC 11.8 in our lock.
DRIVER_FOR_CUDA_11, DRIVER_FOR_NVRTC = "450.80.02", "520.61.05"

# Less than the smallest checkpoint (weights in float32), more than the largest (and Adam's two moments, in float64).
CHECKPOINT_BYTES = (MIB // 2, 16 * MIB)  # tests/unit/test_checks.py counts them
RECORDS_BYTES = 64 * MIB  # metrics, TensorBoard
RANK_MEMORY_BYTES = GIB  # 0.6 GiB were seen, in float64 with a batch of 128
MPI_SHARED_BYTES = 5 * MIB  # a rank; Open MPI asks for 4 MiB, and warns if it does not get them
NCCL_SHARED_BYTES = 256 * MIB  # not measured


RENEW = "`make setup`; if that finds nothing to do: rm -rf .venv && make setup"


class Check(NamedTuple):
    """A verdict: ``ok``, ``warn`` (it works, but not well or not everywhere) or ``fail`` (it will not work)."""

    name: str
    status: str
    message: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """What was found and what to do about it, in one line."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def python(version: str, system: str) -> Check:
    """``version`` such as 3.11.2; ``system`` such as ``Linux x86_64``."""
    if system != "Linux x86_64":
        return Check("python", "fail", f"{system}, for which MXNet 1.9.1 has no wheel", "use Linux on x86-64")
    if not (3, 9) <= _numbers(version)[:2] <= (3, 11):
        return Check(
            "python", "fail", f"Python {version}; MXNet 1.9.1 needs 3.9 to 3.11", "`make setup` finds one that will do"
        )
    return Check("python", "ok", f"Python {version} on {system}")


def numpy(packages: Mapping[str, str]) -> Check:
    """Numpy 1.24 removed a name that MXNet 1.9.1 uses when it is imported."""
    version = packages.get("numpy")
    if version is None:
        return Check("numpy", "fail", "not installed", RENEW)
    if _numbers(version) >= (1, 24):
        remedy = ".venv/bin/pip install numpy==1.23.5"
        return Check("numpy", "fail", f"numpy {version}; MXNet 1.9.1 cannot be imported with 1.24 or newer", remedy)
    return Check("numpy", "ok", f"numpy {version}, below 1.24 as MXNet 1.9.1 needs it")


def wheels(packages: Mapping[str, str]) -> Check:
    """Both wheels of MXNet bring the same module; the one that was installed last is imported, whatever pip says."""
    found = [f"{name} {version}" for name, version in packages.items() if name.startswith("mxnet")]
    if len(found) > 1:
        return Check("wheel", "fail", f"{' and '.join(found)} overwrite each other", "rm -rf .venv && make setup")
    if not found:
        return Check("wheel", "fail", "no wheel of MXNet is installed", RENEW)
    if not found[0].endswith(" 1.9.1"):
        return Check("wheel", "fail", f"{found[0]}; this job is for 1.9.1", RENEW)
    return Check("wheel", "ok", f"{found[0]}, for {'GPUs' if has_gpu_wheel(packages) else 'the CPU'}")


def has_gpu_wheel(packages: Mapping[str, str]) -> bool:
    """Whether the MXNet that is installed was built for GPUs."""
    return any(name.startswith("mxnet-cu") for name in packages)


def mxnet(answer: Answer) -> Check:
    """``answer`` as of :func:`job.fitness.facts.mxnet`."""
    if answer.error:
        driver = "libcuda.so" in answer.error
        remedy = "install the NVIDIA driver, or the CPU build: rm -rf .venv && make setup" if driver else RENEW
        return Check("mxnet", "fail", f"cannot be imported and used: {answer.error}", remedy)
    found = json.loads(answer.text)
    if found["sum"] != 8:
        return Check(
            "mxnet", "fail", f"a convolution that is 8 came out as {found['sum']}", "rm -rf .venv && make setup"
        )
    names = {"MKLDNN": "oneDNN", "CUDA": "CUDA", "CUDNN": "cuDNN", "NCCL": "NCCL"}
    built = [shown for name, shown in names.items() if name in found["features"]]
    message = f"MXNet {found['version']} computes; built with {', '.join(built) or 'neither oneDNN nor CUDA'}"
    if not built:
        return Check("mxnet", "warn", message, "training will be slow; `make setup` installs a build that has one")
    return Check("mxnet", "ok", message)


def horovod(answer: Answer) -> Check:
    """``answer`` as of :func:`facts.horovod`: its import also shows that it was built against this MXNet."""
    rebuild = "rm -f .venv/.stamps/horovod .venv/.stamps/ready && make setup, which builds it against this MXNet"
    if answer.error:
        return Check("horovod", "fail", f"cannot be imported: {answer.error}", rebuild)
    found = json.loads(answer.text)
    built = [name for key, name in (("gloo", "Gloo"), ("mpi", "MPI"), ("nccl", "NCCL")) if found[key]]
    message = f"Horovod {found['version']} for MXNet, with {', '.join(built) or 'no controller'}"
    if not found["gloo"]:
        return Check("horovod", "fail", f"{message}; several machines need Gloo", rebuild)
    if not found["mpi"]:
        return Check("horovod", "warn", f"{message}; launch/local.sh needs --gloo", rebuild)
    return Check("horovod", "ok", message)


def mpirun(answer: Answer) -> Check:
    """Only ``launch/local.sh`` takes it, and does without if it must."""
    if answer.error:
        remedy = "`make setup` installs one; without it launch/local.sh takes Gloo, which is slower"
        return Check("mpirun", "warn", f"cannot be run: {answer.error}", remedy)
    return Check("mpirun", "ok", answer.text)


def horovodrun(found: str | None, expected: str) -> Check:
    """``found`` on PATH, and the one of this Python; each as a resolved path."""
    remedy = "source .venv/bin/activate; launch/local.sh does it by itself"
    if found is None:
        return Check("horovodrun", "warn", "not on PATH", remedy)
    if found != expected:
        return Check("horovodrun", "warn", f"{found} is first on PATH, not {expected}", remedy)
    return Check("horovodrun", "ok", f"{found}, of this environment")


def processor(found: str) -> Check:
    """``found`` as of :func:`job.fitness.facts.processor`. By it MXNet chooses its kernels, and so how they round."""
    return Check("processor", "ok", found)


def unlike_processors(found: Sequence[str]) -> dict[int, str]:
    """How processors differ from the most frequent one, of equally frequent ones the first; by place, the odd alone.

    ``found`` as of :func:`job.fitness.facts.processor`.
    """
    if len(set(found)) < 2:
        return {}
    usual = Counter(found).most_common(1)[0][0]
    return {place: _unlike(own, usual) for place, own in enumerate(found) if own != usual}


def _unlike(own: str, usual: str) -> str:
    (model, _, has), (usual_model, _, usually) = (text.rpartition(": ") for text in (own, usual))
    without = [name for name in usually.split() if name not in has.split()]
    beside = [name for name in has.split() if name not in usually.split()]
    words = [model, f"without {' '.join(without)}" if without else "", f"with {' '.join(beside)}" if beside else ""]
    others = "unlike the others" if model == usual_model else f"where the others have {usual_model}"
    return f"{' '.join(filter(None, words))}, {others}"


def cores(ranks: int, available: int) -> Check:
    """``available`` cores to the ``ranks`` of this machine."""
    message = f"{_count(ranks, 'rank')} on {_count(available, 'core')}"
    if ranks > available:
        remedy = "they take turns, and more ranks make it slower; start fewer, or grant more cores"
        return Check("cores", "warn", message, remedy)
    return Check("cores", "ok", message)


def threads(setting: str | None, ranks: int, available: int) -> Check:
    """``setting`` is the user's OMP_NUM_THREADS, None if there is none."""
    share = _count(max(1, available // ranks), "core")
    if setting in (None, "1"):
        return Check("threads", "ok", f"one an operator; each rank computes shards side by side, on {share}")
    message = f"OMP_NUM_THREADS={setting} is not obeyed: an operator takes one thread, or its bits would depend on it"
    return Check("threads", "warn", message, f"unset it; each rank computes shards side by side, on {share}")


def shared_memory(shm: Disk, ranks: int, on_gpus: bool) -> Check:
    """MPI and NCCL pass data between the ranks of a machine through /dev/shm, of which Docker grants 64 MB."""
    least = max(ranks * MPI_SHARED_BYTES, NCCL_SHARED_BYTES if on_gpus else 0)
    remedy = "docker run --shm-size=1g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    if shm.error:
        return Check("shared memory", "warn", f"/dev/shm: {shm.error}", remedy)
    message = f"/dev/shm: {_size(shm.free_bytes)} free"
    if shm.free_bytes < least:
        return Check("shared memory", "warn", f"{message}, and {_count(ranks, 'rank')} may need {_size(least)}", remedy)
    return Check("shared memory", "ok", message)


def left_over(files: Sequence[str]) -> Check:
    """``files`` as of :func:`job.fitness.facts.left_in_shared_memory`."""
    if files:
        message = f"{_count(len(files), 'file')} in /dev/shm of an mpirun that was killed, 4 MiB each"
        return Check("left over", "warn", message, f"rm {' '.join(files[:4])}{' ...' * (len(files) > 4)}")
    return Check("left over", "ok", "nothing of a killed mpirun in /dev/shm")


def compiler(disable_jit: str | None) -> Check:
    """``disable_jit`` as of the environment's NUMBA_DISABLE_JIT, which is for debuggers."""
    if disable_jit and disable_jit != "0":
        message = f"NUMBA_DISABLE_JIT={disable_jit}: the loops are not compiled, and a step takes 30 times as long"
        return Check("compiler", "warn", message, "unset it")
    return Check("compiler", "ok", "loops are compiled")


def memory(available_bytes: int, ranks: int) -> Check:
    """What is left of the machine's memory, or of the container's."""
    message = f"{_size(available_bytes)} for {_count(ranks, 'rank')}"
    if available_bytes < ranks * RANK_MEMORY_BYTES:
        remedy = "the kernel may kill a rank; start fewer, or raise the container's memory limit"
        return Check("memory", "warn", f"{message}, each of which may take {_size(RANK_MEMORY_BYTES)}", remedy)
    return Check("memory", "ok", message)


def open_files(limit: int) -> Check:
    """A rank holds a socket to every other rank, and some files. ``limit`` is -1 if there is none."""
    message = f"a process may open {limit if limit >= 0 else 'any number of'} files and sockets"
    if 0 <= limit < 1024:
        return Check("open files", "warn", message, "ulimit -n 4096")
    return Check("open files", "ok", message)


def disk(disk: Disk, config: Config) -> Check:
    """Room for the checkpoints that are kept, the best, and the one that is being written."""
    folder, most = config.run.dir, (config.checkpoint.keep + 2) * CHECKPOINT_BYTES[1] + RECORDS_BYTES
    remedy = "free some, or give another run.dir"
    if disk.error:
        return Check("disk", "fail", f"run.dir={folder}: {disk.error}", "give another run.dir")
    if disk.free_inodes is not None and disk.free_inodes < 100:
        return Check("disk", "fail", f"run.dir={folder}: only {disk.free_inodes} more files fit on its disk", remedy)
    message = f"run.dir={folder}: {_size(disk.free_bytes)} free"
    if disk.free_bytes < CHECKPOINT_BYTES[0]:
        return Check("disk", "fail", f"{message}, not enough for one checkpoint", remedy)
    if disk.free_bytes < most:
        return Check("disk", "warn", f"{message}, and the run may need {_size(most)}", remedy)
    return Check("disk", "ok", message)


def run_dir(error: str, config: Config) -> Check:
    """``error`` of an attempt to write there."""
    if error:
        remedy = "give another run.dir, or mend the permissions"
        return Check("run.dir", "fail", f"run.dir={config.run.dir}: cannot be written: {error}", remedy)
    return Check("run.dir", "ok", f"run.dir={config.run.dir}: written, brought to the disk, removed")


def data(found: Data) -> Check:
    """Where the data set is."""
    if found.error:
        remedy = "mend data.dir, or leave it out: the data is then fetched"
        return Check("data", "fail", found.error, RENEW if "No module" in found.error else remedy)
    if found.missing:
        message = f"not on this machine: {', '.join(found.missing)}"
        return Check("data", "warn", message, "the first run fetches it over the network; `make setup` does so now")
    return Check("data", "ok", f"verified in {', '.join(found.folders)}")


def clock(unix: Sequence[float], monotonic: Sequence[float]) -> Check:
    """Two readings of each clock, some seconds apart. Between hosts, launch/cluster.sh compares the first."""
    remedy = "start a time service (chrony, systemd-timesyncd); Kerberos, TLS and make go by the clock"
    if unix[0] < 1_704_067_200:  # 2024-01-01
        return Check("clock", "warn", "set to a year before 2024", remedy)
    if monotonic[1] < monotonic[0]:
        return Check("clock", "fail", "the monotonic clock runs backward: no timeout would work", "reboot the machine")
    step = (unix[1] - unix[0]) - (monotonic[1] - monotonic[0])
    if abs(step) > 1:
        return Check("clock", "warn", f"was set by {step:+.1f} s while we looked: speeds will be wrong", remedy)
    return Check("clock", "ok", "steady")


def hostname(name: str, error: str, over_gloo: bool = False) -> Check:
    """``error`` of looking up its address, without which Gloo ends every rank with a segmentation fault."""
    if error:
        remedy = f"add it to /etc/hosts: 127.0.1.1 {name}; several hosts need a name that all can look up"
        status = "fail" if over_gloo else "warn"
        return Check("hostname", status, f"this host's name, {name}, has no address: {error}", remedy)
    return Check("hostname", "ok", f"{name} has an address")


def network(interfaces: Mapping[str, Sequence[str]]) -> Check:
    """Other hosts are reached over an interface that has an address of its own."""
    shown = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in interfaces.items() if addresses)
    if all(address.startswith("127.") for addresses in interfaces.values() for address in addresses):
        remedy = "fine on one machine; for several, connect it"
        return Check("network", "warn", f"only {shown or 'interfaces without an address'}", remedy)
    return Check("network", "ok", shown)


def gpu(gpus: Gpus, gpu_wheel: bool, device: str) -> Check:
    """Whether ``run.device`` can be had: GPUs that are there, that MXNet has code for, and an MXNet for GPUs.

    Args:
        gpus: those that the job may use.
        gpu_wheel: whether the MXNet that is installed is one for GPUs.
        device: ``run.device``.
    """
    if device == "cpu":
        return Check("gpu", "ok", "none wanted: run.device=cpu")
    wanted = device == "gpu"
    if gpus.error:
        status = "fail" if wanted or gpu_wheel else "warn"
        return Check("gpu", status, f"nvidia-smi: {gpus.error}", "mend the NVIDIA driver, or set run.device=cpu")
    if not gpus.cards:
        if wanted:
            remedy = "mend the driver and CUDA_VISIBLE_DEVICES, or set run.device=cpu"
            return Check("gpu", "fail", "run.device=gpu, and nvidia-smi shows none", remedy)
        if gpu_wheel:
            return Check(
                "gpu", "warn", "none, though MXNet is built for GPUs", "mend the driver, or say run.device=cpu"
            )
        return Check("gpu", "ok", "none; training on the CPU")
    shown = ", ".join(dict.fromkeys(f"{name} ({_capability(capability)})" for name, capability, _ in gpus.cards))
    foreign = [card for card in gpus.cards if card.capability and not has_code_for(card.capability)]
    if foreign:
        message = (
            f"{foreign[0].name} has compute capability {_capability(foreign[0].capability)}, and the newest GPU wheel"
            " of MXNet 1.9.1 holds machine code for 5.0 to 8.6 (which also runs on 8.7 and 8.9) and no PTX to compile"
            " for others: it cannot run there"
        )
        remedy = "use an Ampere or Ada GPU (A100, A10, L4, RTX 30 or 40), or train on the CPU with run.device=cpu"
        return Check("gpu", "fail" if wanted or gpu_wheel else "warn", message, remedy)
    if not gpu_wheel:
        remedy = "`launch/setup.sh --gpu` installs the one for GPUs; run.device=cpu if the CPU is meant"
        return Check("gpu", "fail" if wanted else "warn", f"{shown}, but this MXNet is built for the CPU", remedy)
    if not all(card.capability for card in gpus.cards):
        remedy = "the driver is too old to tell; MXNet needs 5.0 to 8.9: see developer.nvidia.com/cuda-gpus"
        return Check("gpu", "warn", f"{shown}: of unknown compute capability", remedy)
    return Check("gpu", "ok", f"{len(gpus.cards)} x {shown}" if ", " not in shown else shown)


def has_code_for(capability: tuple[int, int]) -> bool:
    """Whether MXNet's GPU wheel holds machine code that a GPU of this compute capability runs."""
    return any(capability[0] == major and capability[1] >= minor for major, minor in WHEEL_CODE)


def gpu_computes(answer: Answer) -> Check:
    """``answer`` as of :func:`job.fitness.facts.mxnet_on_gpus`."""
    if answer.error:
        remedy = "see that no other process fills the GPU, then mend the driver; or set run.device=cpu"
        return Check("gpu computes", "fail", f"MXNet fails on the GPU: {answer.error}", remedy)
    found = json.loads(answer.text)["gpus"]
    if not found:
        return Check("gpu computes", "fail", "MXNet sees no GPU", "mend the driver and CUDA_VISIBLE_DEVICES")
    return Check("gpu computes", "ok", f"MXNet computes on {_count(found, 'GPU')}")


def gpu_per_rank(ranks: int, gpus: Gpus) -> Check:
    """Two ranks on one GPU would be slower than one, and share its memory unseen."""
    message = f"{_count(ranks, 'rank')} on {_count(len(gpus.cards), 'GPU')}"
    if ranks > len(gpus.cards):
        return Check("gpu per rank", "fail", message, "start at most one rank per GPU, or set run.device=cpu")
    return Check("gpu per rank", "ok", message)


def deterministic(environment: Mapping[str, str], wanted: bool) -> Check:
    """``wanted`` is ``run.deterministic``. What the user has set in the environment stands against it."""
    against = [f"{k}={environment[k]}" for k, v in DETERMINISTIC.items() if environment.get(k, v) != v]
    if wanted and against:
        message = f"{', '.join(against)} in the environment: a GPU may not repeat its bits"
        return Check("deterministic", "warn", message, "unset it, or say run.deterministic=false")
    return Check("deterministic", "ok", f"run.deterministic={str(wanted).lower()}; not tested on a GPU")


def dtype(name: str, on_gpus: bool) -> Check:
    """``name`` is ``model.dtype``."""
    if name == "float16" and not on_gpus:
        message = "model.dtype=float16 on a CPU is many times slower than float32, and for tests"
        return Check("dtype", "warn", message, "leave it out, or train on a GPU")
    return Check("dtype", "ok", f"model.dtype={name}")


def driver(gpus: Gpus) -> Check:
    """The versions are NVIDIA's, see above."""
    version = gpus.cards[0].driver
    if _numbers(version) < _numbers(DRIVER_FOR_CUDA_11):
        message = f"NVIDIA driver {version} is too old for CUDA 11"
        return Check(
            "driver", "fail", message, f"install {DRIVER_FOR_CUDA_11} or newer, best {DRIVER_FOR_NVRTC} or newer"
        )
    if _numbers(version) < _numbers(DRIVER_FOR_NVRTC):
        message = f"NVIDIA driver {version} cannot load what MXNet compiles while it runs, with CUDA 11.8"
        return Check("driver", "warn", message, f"install {DRIVER_FOR_NVRTC} or newer, or training is slower")
    return Check("driver", "ok", f"NVIDIA driver {version}")


def nccl(answer: Answer) -> Check:
    """Of a Horovod that is there, on a machine with GPUs."""
    code = json.loads(answer.text)["nccl"]
    if not code:
        remedy = "`launch/setup.sh --gpu` builds Horovod with it"
        return Check("nccl", "warn", "Horovod is built without NCCL: gradients take the way through the CPU", remedy)
    unit = 1000 if code < 10000 else 10000  # NCCL 2.8 and before: 2804; since 2.9: 20908
    major, rest = divmod(code, unit)
    return Check("nccl", "ok", f"Horovod uses NCCL {major}.{rest // 100}.{rest % 100}")


def hiding(found: Sequence[str]) -> Check:
    """``found`` as of :func:`job.distributed.search_path.hiding`."""
    if found:
        message = f"{'; '.join(found)}, and hides what .venv holds"
        return Check("search paths", "fail", message, search_path.remedy(found))
    return Check("search paths", "ok", "nothing hides a package of .venv")


def environment(names: Iterable[str]) -> Check:
    """A note: what else decides how the job behaves. Names alone, for a value may be a secret."""
    telling = re.compile(r"(HOROVOD|OMPI|PMIX|MXNET|NCCL|CUDA|OMP|KMP|JOB)_")
    found = sorted(name for name in names if telling.match(name))
    return Check(
        "environment", "ok", f"set: {', '.join(found)}" if found else "no variable that changes behaviour is set"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _capability(capability: tuple[int, int] | None) -> str:
    return f"{capability[0]}.{capability[1]}" if capability else "unknown"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
