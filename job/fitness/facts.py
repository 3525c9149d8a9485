"""What the doctor looks at: this machine, its packages, its GPUs, as plain facts that :mod:`checks` judges.

Nothing here imports MXNet or Horovod: they may be broken, and a crash of theirs must be a fact, not our end. They are
asked in processes of their own. Nothing waits longer than its limit, be it for a driver, a disk or a name server.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from job.config import ROOT, DataConfig
from job.distributed import cgroup
from job.distributed.gpus import count, listing, visible
from job.errors import DataError

T = TypeVar("T")

# Those that change what is computed or how ranks talk; hosts of one job must agree on them.
PACKAGES = (
    "mxnet", "mxnet-cu112", "horovod", "openmpi", "numpy", "numba", "pydantic", "pyyaml", "tensorboardX",
    "nvidia-cuda-runtime-cu11", "nvidia-cuda-nvrtc-cu11", "nvidia-cublas-cu11", "nvidia-cudnn-cu11", "nvidia-nccl-cu11",
)  # fmt: skip
# Those whose other release may round otherwise.
ARITHMETIC = ("mxnet", "mxnet-cu112", "numpy", "numba")
# What oneDNN, OpenBLAS and numba choose their code by, as Linux spells it.
INSTRUCTIONS = (
    "sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
SECONDS = 10.0  # the longest wait for a disk, a name server, git
PROBE_SECONDS = 120.0  # for an import: the first one after a boot reads some 100 MB from a disk that may be far away
GPU_SECONDS = 30.0  # nvidia-smi wakes a sleeping driver, which takes seconds; a wedged one never answers

_MARK = "answer: "


class Answer(NamedTuple):
    """What a program said, or else why it said nothing."""

    text: str
    error: str = ""


class Disk(NamedTuple):
    """The file system that a folder is on, or will be on."""

    free_bytes: int
    free_inodes: int | None  # None where the file system does not count them
    error: str = ""


class Gpu(NamedTuple):
    """A GPU as the driver describes it."""

    name: str
    capability: tuple[int, int] | None  # None if the driver is too old to say
    driver: str


class Gpus(NamedTuple):
    """The GPUs that a job may use, or else why they are not known."""

    cards: tuple[Gpu, ...] = ()
    error: str = ""


class Data(NamedTuple):
    """Where the data set is: the folders that hold it, or what is missing, or what is wrong with it."""

    folders: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""


def collect(disk: Disk, data: Data) -> dict[str, Any]:
    """What every host of a job can be compared by; the object ``facts`` of ``doctor.py --json``."""
    return {
        "hostname": socket.gethostname(),
        "machine": machine(),
        "started": started(),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "processor": processor(),
        "free_disk_bytes": disk.free_bytes,
        "data": bool(data.folders),
        "interfaces": interfaces(),
        "clock_unix_seconds": time.time(),
    }


def commit(root: Path = ROOT) -> str | None:
    """The commit of the code, ``-dirty`` if it was changed since; None if neither git nor an image's label knows."""
    if (root / ".git").exists():
        # The user who looks need not be the one who owns the checkout; git would refuse.
        safe = ("-c", f"safe.directory={root}", "-C", str(root))
        described = ask(["git", *safe, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"])
        return described.text.strip() or None
    with contextlib.suppress(OSError):
        return (root / "REVISION").read_text(encoding="utf-8").strip() or None
    return None


def packages(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The version of each package of ``names`` that is installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def versions() -> dict[str, str | None]:
    """The packages that what is learned depends on."""
    found = packages(("mxnet", "mxnet-cu112", "horovod", "numpy"))
    mxnet = found.get("mxnet", found.get("mxnet-cu112"))
    return {"mxnet": mxnet, "horovod": found.get("horovod"), "numpy": found.get("numpy")}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """``MODEL: INSTRUCTIONS``, those of INSTRUCTIONS that it has; ``unknown: `` where that cannot be read."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open(cpuinfo, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():  # the other cores are the same
                break
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    has = found.get("flags", "").split()
    return f"{found.get('model name', 'unknown')}: {' '.join(name for name in INSTRUCTIONS if name in has)}"


def left_in_shared_memory(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> list[str]:
    """What an mpirun that was killed has left there: files of Open MPI that no process that we may look at uses."""
    files = [str(file) for file in sorted(folder.glob("vader_segment.*"))] if folder.is_dir() else []
    files += [str(file) for file in sorted(folder.glob("local.sh.*/vader_segment.*"))]
    if not files:
        return []
    used = ""
    for maps in processes.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used += maps.read_text(errors="replace")
    return [file for file in files if os.access(file, os.W_OK) and file not in used]


def machine() -> str:
    """The same for two names of one machine; empty if it cannot be told. Containers with own networks count as own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def started() -> str:
    """Another one after each start of this machine, or of the container that this is; empty if it cannot be told."""
    try:
        fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()  # see proc(5); the name may hold spaces
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + f" {fields[19]}"
    except (OSError, IndexError):
        return ""


def interfaces() -> dict[str, list[str]]:
    """The IPv4 addresses of each network interface."""
    addresses = psutil.net_if_addrs()
    return {name: [a.address for a in addresses[name] if a.family == socket.AF_INET] for name in sorted(addresses)}


def disk(folder: Path) -> Disk:
    """The free space where ``folder`` is, or will be made."""
    try:
        status = within(SECONDS, lambda: os.statvfs(_existing(folder)))
    except OSError as error:
        return Disk(0, None, _reason(error))
    return Disk(status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None)


def write_error(folder: Path) -> str:
    """Why nothing can be written to ``folder``, or made where it will be; empty if it can. It is really tried."""
    try:
        within(SECONDS, lambda: _write(_existing(folder)))
    except OSError as error:
        return _reason(error)
    return ""


def data(config: DataConfig) -> Data:
    """Where Fashion-MNIST is, verified; nothing is fetched."""
    try:
        from job.data import formats, idx  # it needs numpy, which may be what is broken
    except Exception as error:  # a foreign or half numpy fails in any way
        return Data(error=f"cannot be looked for: {_reason(error).splitlines()[0]}")
    try:
        if config.is_pictures:
            within(PROBE_SECONDS, lambda: formats.load(config, lambda line: None))
            return Data((str(config.dir),))
        paths = within(PROBE_SECONDS, lambda: idx.locate(config))
    except (DataError, OSError) as error:
        return Data(error=_reason(error))
    missing = tuple(file.name for file in idx.FILES if file.key not in {found.key for found in paths})
    cached = {path for path in paths.values() if config.cache_dir in path.parents}
    folders = {str(config.cache_dir if path in cached else path.parent) for path in paths.values()}
    return Data(() if missing else tuple(sorted(folders)), missing)


def gpus(environment: Mapping[str, str] = os.environ) -> Gpus:
    """The GPUs that this process may use, as ``nvidia-smi`` lists them; none where there is no such program."""
    if not shutil.which("nvidia-smi"):
        return Gpus()
    fields = ["index", "uuid", "name", "driver_version", "compute_cap"]
    answer = _nvidia_smi(fields)
    if "compute_cap" in answer.error:  # a driver of before 2021 does not know that field
        answer = _nvidia_smi(fields[:-1])
    if answer.error:
        return Gpus(error=answer.error)
    rows = [[field.strip() for field in line.split(",")] for line in answer.text.splitlines() if line.strip()]
    if any(len(row) < 4 for row in rows):
        return Gpus(error=answer.text.strip().splitlines()[0])
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if "MIG" in (wanted or ""):  # part of a GPU, which this way of asking does not list
        return Gpus(tuple(map(_gpu, rows[: count(listing(), wanted)])))
    return Gpus(tuple(_gpu(rows[index]) for index in visible([row[1] for row in rows], wanted)))


def mxnet() -> Answer:
    """What MXNet is and whether it computes, as JSON: ``version``, ``features``, ``sum`` (8 is right)."""
    return _probe(
        "import mxnet as mx\n"
        "image, weight = mx.nd.ones((1, 2, 3, 3)), mx.nd.ones((1, 2, 2, 2))\n"
        "sum = mx.nd.Convolution(image, weight, no_bias=True, kernel=(2, 2), num_filter=1).max().asscalar()\n"
        "features = [f.name for f in mx.runtime.feature_list() if f.enabled]\n"
        "answer = dict(version=mx.__version__, features=features, sum=float(sum))\n"
    )


def mxnet_on_gpus() -> Answer:
    """Whether MXNet computes on every GPU that it sees, as JSON: ``gpus``, how many there are."""
    return _probe(
        "import mxnet as mx\n"
        "gpus = mx.context.num_gpus()\n"
        "for i in range(gpus):\n"
        "    assert (mx.nd.ones((2, 2), ctx=mx.gpu(i)) + 1).sum().asscalar() == 8, f'wrong result on GPU {i}'\n"
        "answer = dict(gpus=gpus)\n"
    )


def horovod() -> Answer:
    """What Horovod is built with, as JSON: ``version``, ``gloo``, ``mpi``, ``nccl`` (its version, or 0)."""
    return _probe(
        "import horovod, horovod.mxnet as hvd\n"
        "built = dict(gloo=bool(hvd.gloo_built()), mpi=bool(hvd.mpi_built()), nccl=int(hvd.nccl_built()))\n"
        "answer = dict(version=horovod.__version__, **built)\n"
    )


def mpirun() -> Answer:
    """The first line of ``mpirun --version``."""
    answer = ask(["mpirun", "--version"])
    return answer._replace(text=answer.text.partition("\n")[0])


def memory_bytes() -> int:
    """The memory that is left to this process: that of the machine, or of its control group if that is less."""
    return min(psutil.virtual_memory().available, cgroup.memory_limit() or sys.maxsize)


def open_files() -> int:
    """How many files and sockets a process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def address_error(hostname: str) -> str:
    """Why the name of this machine has no address; empty if it has one."""
    try:
        within(SECONDS, lambda: socket.getaddrinfo(hostname, None, socket.AF_INET))
    except OSError as error:
        return _reason(error)
    return ""


def ask(command: Sequence[str], seconds: float = SECONDS) -> Answer:
    """What ``command`` prints. All that it started is ended when the time is over."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,  # for killpg: a script's child would go on, and hold the pipe
        )
    except OSError as error:
        return Answer("", _reason(error))
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {seconds:g} s")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even a kill ends who waits for a broken disk
                process.communicate(timeout=1)
    if process.returncode < 0:
        return Answer("", f"died of {signal.Signals(-process.returncode).name}")
    if process.returncode:
        said = (errors.strip() or output.strip()).splitlines()
        return Answer("", said[0] if said else f"ended with exit code {process.returncode}")
    return Answer(output)


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of ``work``, which may hang for ever where the kernel waits for a disk or a server.

    Raises:
        TimeoutError: it is not there in time. The thread that waits for it is left behind.
    """
    result: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except futures.TimeoutError:  # before Python 3.11 not the built-in one
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _probe(code: str) -> Answer:
    """Run ``code``, which sets ``answer``, in a Python of its own. The answer as JSON, or the first line of why not."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    catch = "except Exception as error:\n    answer = {'error': f'{type(error).__name__}: {error}'.splitlines()[0]}\n"
    program = f"import json\ntry:\n{lines}{catch}print('\\n{_MARK}' + json.dumps(answer))"
    said = ask([sys.executable, "-c", program], PROBE_SECONDS)
    if said.error:
        return said
    # What is imported may print too, before and, when it is unloaded, after.
    marked = [line[len(_MARK) :] for line in said.text.splitlines() if line.startswith(_MARK)]
    if not marked:
        return Answer("", "its import ended the process")
    return Answer(marked[0], json.loads(marked[0]).get("error", ""))


def _nvidia_smi(fields: Sequence[str]) -> Answer:
    return ask(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], GPU_SECONDS)


def _gpu(row: Sequence[str]) -> Gpu:
    _, _, name, driver, *capability = row
    try:
        major, minor = map(int, capability[0].split("."))
    except (IndexError, ValueError):  # not asked for, or "[N/A]"
        return Gpu(name, None, driver)
    return Gpu(name, (major, minor), driver)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    absolute = Path(os.path.abspath(folder))
    return next(path for path in (absolute, *absolute.parents) if os.path.exists(path))


def _write(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
        file.write(b"can this be written?")
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
