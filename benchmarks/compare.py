"""This project beside its peers, on the same network and the same global batch: ``make bench-peers``.

    python -m benchmarks.compare [step|epoch] [--turns N] [--add] [--only NAME ...]

Two tables: of a step on data in memory, and of a whole epoch as a user runs it, with input, evaluation and logging.
All contestants are started first; then they take turns, so that whatever else the machine does meets all of them. Who
waits is stopped (SIGSTOP): a rank that looks for work would take a core from whoever works. The intervals are the
bootstrap's. The turns go to benchmarks/results/, the picture to docs/images/peers.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.intervals import median, ratio
from benchmarks.runs import IMAGES, ROOT, launcher_of

RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".venv-peers"
REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements.txt"
OURS = "this project, 2 ranks"
GLOBAL_BATCH, STEPS_A_TURN = 256, 8
TURNS = {"step": 12, "epoch": 3}
START_SECONDS, TURN_SECONDS = 300.0, 600.0


@dataclass(frozen=True)
class Contestant:
    """What is started, and with what: ``copies`` processes, or ``ranks`` that a launcher starts."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    ranks: int = 0
    copies: int = 1
    peer: bool = False  # runs in the environment of the peers
    before: tuple[str, ...] = ()  # arguments of python that start the module's ranks
    settings: dict[str, str] = field(default_factory=dict)
    modes: tuple[str, ...] = ("step", "epoch")

    def command(self, environment: dict[str, str]) -> list[str]:
        """The command line of one copy."""
        python = str((PEERS if self.peer else ROOT / ".venv") / "bin" / "python")
        launcher = launcher_of(self.ranks, [], environment) if self.ranks > 1 else []
        return [*launcher, python, *self.before, "-m", f"benchmarks.peers.{self.module}", *self.arguments]


CONTESTANTS = (
    Contestant(OURS, "ours", ranks=2),
    Contestant("this project, 1 rank", "ours"),
    Contestant(
        "this project, 2 ranks that do not stay on their cores",
        "ours",
        ranks=2,
        settings={"BENCH_BIND": "no"},
        modes=("step",),
    ),
    Contestant(
        "this project, 2 ranks, BatchNorm of each shard",
        "ours",
        ("model.sync_batch_norm=false",),
        ranks=2,
        modes=("step",),
    ),
    Contestant(
        "two processes that know nothing of each other, 128 each",
        "ours",
        ("data.global_batch=128", "data.shards=4"),
        copies=2,
        settings={"MXNET_CPU_WORKER_NTHREADS": "1"},
        modes=("step",),
    ),
    Contestant(
        "PyTorch DDP, Gloo, 2 ranks, BatchNorm of each rank",
        "torch_ddp",
        peer=True,
        before=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        settings={"OMP_NUM_THREADS": "1"},
    ),
    Contestant(
        "the same, each rank bound to a core by hand",
        "torch_ddp",
        peer=True,
        before=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        settings={"OMP_NUM_THREADS": "1", "BENCH_BIND": "yes"},
        modes=("step",),
    ),
    Contestant(
        "Flax, 2 host devices, BatchNorm over both",
        "flax_pmap",
        peer=True,
        settings={"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
    ),
    Contestant(
        "Horovod's Gluon recipe, 2 ranks, BatchNorm of each rank",
        "horovod_gluon",
        ranks=2,
        settings={"OMP_NUM_THREADS": "1"},
    ),
    Contestant("the tutorial's loop, 1 process", "plain_gluon"),
)


class Running:
    """A contestant at work, or stopped until its turn comes."""

    def __init__(self, contestant: Contestant, mode: str, turns: int, data: Path, folder: Path) -> None:
        self.name = contestant.name
        self._processes: list[subprocess.Popen[str]] = []
        self._gates: list[int] = []
        self._logs: list[Path] = []
        for copy in range(contestant.copies):
            gate = folder / f"gate-{time.monotonic_ns()}"
            os.mkfifo(gate)
            self._gates.append(os.open(gate, os.O_RDWR))
            kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
            path = f"{ROOT}/.venv/bin{os.pathsep}{os.environ['PATH']}"
            own = {"BENCH_GATE": str(gate), "BENCH_TURNS": str(turns), "BENCH_MODE": mode, "BENCH_DATA": str(data)}
            environment = {**kept, "PATH": path, **own, **contestant.settings}
            command = contestant.command(environment)
            if contestant.before:  # torchrun takes the module and its own -m apart
                command = [*command[: 1 + len(contestant.before)], "-m", *command[2 + len(contestant.before) :]]
            if contestant.copies > 1:  # each on a core of its own, as ranks are
                command = ["taskset", "--cpu-list", str(sorted(os.sched_getaffinity(0))[copy]), *command]
            self._logs.append(folder / f"{gate.name}.log")
            with open(self._logs[-1], "w") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        text=True,
                        start_new_session=True,
                    )
                )
        self._read = [0] * contestant.copies

    def stop_when_ready(self) -> None:
        """Wait until it has warmed up."""
        self._wait("ready:", START_SECONDS)
        self.send(signal.SIGSTOP)

    def turn(self) -> float:
        """Seconds of one turn: of the copy that took longest."""
        self.send(signal.SIGCONT)
        for gate in self._gates:
            os.write(gate, b".")
        seconds = max(float(line) for line in self._wait("turn:", TURN_SECONDS))
        self.send(signal.SIGSTOP)
        return seconds

    def send(self, number: int) -> None:
        """A signal to every process of the contestant."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def close(self) -> None:
        """End it, however far it is."""
        self.send(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for gate in self._gates:
            os.close(gate)

    def _family(self) -> list[psutil.Process]:
        found = []
        for started in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(started.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def _wait(self, word: str, limit_seconds: float) -> list[str]:
        """What follows ``word`` in the next line of each copy that begins with it."""
        ends = time.monotonic() + limit_seconds
        found: list[str] = []
        for copy, log in enumerate(self._logs):
            while True:
                lines = log.read_text(errors="replace").split("\n")[:-1]
                said = [line[len(word) :] for line in lines if line.startswith(word)]
                if len(said) > (self._read[copy] if word == "turn:" else 0):
                    found.append(said[-1])
                    self._read[copy] += word == "turn:"
                    break
                if self._processes[copy].poll() is not None or time.monotonic() > ends:
                    raise SystemExit(f"{self.name} did not say {word!r}:\n" + "\n".join(lines[-30:]))
                time.sleep(0.002)
        return found


@contextlib.contextmanager
def _started(chosen: Sequence[Contestant], mode: str, turns: int) -> Iterator[list[Running]]:
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data = _data(Path(folder) / "data")
        for contestant in chosen:
            print(f"starting: {contestant.name}", file=sys.stderr, flush=True)
            running.append(Running(contestant, mode, turns, data, Path(folder)))
            stack.callback(running[-1].close)
        for one in running:
            one.stop_when_ready()
        yield running


def _data(folder: Path) -> Path:
    """A folder with the data set's files under their usual names."""
    from job.config import load_config
    from job.data import idx

    folder.mkdir()
    dataset = idx.load(load_config().data)
    for part, split in (("train", dataset.train), ("t10k", dataset.test)):
        for array, kind in ((split.images, "images-idx3"), (split.labels, "labels-idx1")):
            (folder / f"{part}-{kind}-ubyte").symlink_to(str(array.filename))
    return folder


def measure(mode: str, turns: int, chosen: Sequence[Contestant]) -> dict[str, list[float]]:
    """Seconds of each turn by the contestant's name."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in chosen}
    with _started(chosen, mode, turns) as running:
        for number in range(turns):
            for one in running if number % 2 == 0 else reversed(running):
                seconds[one.name].append(one.turn())
            print(f"turn {number + 1} of {turns}", file=sys.stderr, flush=True)
    return seconds


def table(mode: str, seconds: dict[str, list[float]]) -> list[str]:
    """The lines of the table, in Markdown. Ratios are of speeds: above 1, this project on 2 ranks is the faster one."""
    unit, scale = ("ms a step", 1e3 / STEPS_A_TURN) if mode == "step" else ("s an epoch", 1.0)
    lines = [f"| | {unit} | 90% interval | images/s | ours is faster by | 90% interval |", "|---|---|---|---|---|---|"]
    ours = np.array(seconds[OURS]) if OURS in seconds else None
    images = GLOBAL_BATCH * STEPS_A_TURN if mode == "step" else 60_000
    for name, values in seconds.items():
        turns = np.array(values)
        own = median(turns * scale)
        row = f"| {name} | {own.value:.1f} | {own.low:.1f} to {own.high:.1f} | {images / np.median(turns):,.0f} "
        if ours is not None and name != OURS:
            of = ratio(turns, ours)
            row += f"| {of.value:.2f} | {of.low:.2f} to {of.high:.2f} |"
        else:
            row += "| | |"
        lines.append(row)
    return lines


def draw(results: dict[str, dict[str, list[float]]]) -> None:
    """Both tables as bars, with their intervals, into docs/images/peers.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(7 * len(results), 3.6), constrained_layout=True, squeeze=False
    )
    for axis, (mode, seconds) in zip(axes[0], results.items()):
        scale = 1e3 / STEPS_A_TURN if mode == "step" else 1.0
        found = [median(np.array(values) * scale) for values in seconds.values()]
        error = np.array([[one.value - one.low, one.high - one.value] for one in found]).T
        colors = ["tab:blue" if name.startswith("this project") else "tab:gray" for name in seconds]
        names = [name.replace(", BatchNorm", ",\nBatchNorm").replace("nothing of", "nothing\nof") for name in seconds]
        axis.barh(names, [one.value for one in found], xerr=error, color=colors)
        axis.invert_yaxis()
        axis.set_xlabel("ms a step" if mode == "step" else "s an epoch")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "peers.png", dpi=110)


def set_up_peers() -> None:
    """Make .venv-peers, unless it is there for these requirements.

    Raises:
        SystemExit: no fitting Python, or no package index that can be reached.
    """
    stamp, wanted = PEERS / "requirements.txt", REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = os.environ.get("PEERS_PYTHON", "python3.11")
    print(f"making {PEERS.name} for PyTorch and Flax (some hundred MB)", file=sys.stderr, flush=True)
    pip = [str(PEERS / "bin" / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)]
    try:
        subprocess.run([python, "-m", "venv", "--clear", str(PEERS)], check=True, capture_output=True, text=True)
        subprocess.run(pip, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(
            f"bench-peers: {python} is not there, and the peers need Python 3.11 or newer; name one: PEERS_PYTHON=..."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = "\n".join(f"  | {line}" for line in error.stderr.strip().splitlines()[-4:])
        raise SystemExit(
            f"bench-peers: {PEERS.name} cannot be made: a package of benchmarks/peers/requirements.txt was not found."
            f" This needs a package index that pip can reach (pip config list).\n{reason}"
        ) from None
    stamp.write_text(wanted)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {"cores": len(os.sched_getaffinity(0)), "processor": model, "python": platform.python_version()}


def main() -> None:
    """Measure, store, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="step|epoch", help="which tables (default: both)")
    parser.add_argument("--turns", type=int, help=f"of each contestant (default: {TURNS})")
    parser.add_argument("--add", action="store_true", help="to the turns that benchmarks/results/ already holds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contestants whose names hold one of these"
    )
    options = parser.parse_args()
    modes = options.modes or list(TURNS)
    if set(modes) - set(TURNS):
        parser.error("tables are: step, epoch")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by way of what ends the contestants
    set_up_peers()
    RESULTS.mkdir(exist_ok=True)
    for mode in modes:
        chosen = [one for one in CONTESTANTS if mode in one.modes]
        chosen = [one for one in chosen if not options.only or any(part in one.name for part in options.only)]
        seconds = measure(mode, options.turns or TURNS[mode], chosen)
        file = RESULTS / f"peers_{mode}.json"
        if options.add and file.exists():
            before = json.loads(file.read_text())["seconds"]
            seconds = {name: before.get(name, []) + seconds.get(name, []) for name in {**before, **seconds}}
        file.write_text(json.dumps({"machine": machine(), "seconds": seconds}, indent=1) + "\n")
        print("\n".join(["", *table(mode, seconds)]), flush=True)
    stored = {mode: RESULTS / f"peers_{mode}.json" for mode in TURNS}
    draw({mode: json.loads(file.read_text())["seconds"] for mode, file in stored.items() if file.exists()})


if __name__ == "__main__":
    main()
