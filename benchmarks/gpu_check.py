"""Everything that this project wants to know of GPUs, in one table to send back: ``python -m benchmarks.gpu_check``.

    kernels    SyncBatchNorm's CUDA kernels, and MXNet's operators in their place, against numpy in float64
    bits       the hash of the weights of configs/smoke.yaml on one GPU, twice, and on all GPUs
    step       the time of a step with statistics of each shard alone, and with those of the global batch
    allreduce  the bandwidth of sums over ranks, by size

Each part is a process of its own with a time limit, so that one that fails tells why, and the others still run. About
ten minutes. The table is printed and written beside what it is made of: gpu_check.md, gpu_check.json.

This project has no GPU. ``--rehearse`` runs the parts on the CPU, as far as they can be, with the kernels as
tests/cuda builds them; it shows that this command works, and says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from job.distributed.placement import enforce_determinism, share_cores

PART = "--part"
if PART in sys.argv:  # not the process that launches the ranks, which would hand all cores on to each of them
    share_cores()
    enforce_determinism(tensor_cores=True)  # as training does, also in float16, which alone has a use for them

import numpy as np

from benchmarks.runs import LOCAL, ROOT, launcher_of
from job.fitness import facts

PARTS = ("kernels", "bits", "step", "allreduce")
LIMIT_SECONDS = 1800.0  # of a part
END_SECONDS = 60.0  # from SIGTERM to SIGKILL
MARK = "row:"
OK, WRONG, MEASURED, FAILED, NOT_RUN = "ok", "WRONG", "measured", "FAILED", "not run"
# (samples of each shard, channels, values of a channel in a sample, offset): the tutorial's layers, three of ResNet-50,
# one of a dense layer, and one whose mean is a thousand times its deviation.
SHAPES = [
    ([32] * 8, 20, 576, 0.0),
    ([32, 31], 50, 100, 0.5),
    ([16, 16], 64, 12544, 0.0),
    ([32, 32], 256, 3136, 0.0),
    ([32, 32], 2048, 49, 0.0),
    ([16] * 4, 128, 1, 0.0),
    ([32, 32], 64, 784, 1e3),
]
SMALL_SHAPES = [([3, 2], 5, 700, 0.0), ([4] * 3, 20, 1, 0.5)]  # for kernels that are played by one core
TOLERANCE = {"float16": 2e-3, "float32": 3e-6, "float64": 1e-12}  # for values of about 1; as in the tests
BYTES = [1 << power for power in range(10, 29, 2)]  # 1 KiB to 256 MiB
TURNS = 10


class Row(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    verdict: str
    data: Any = None  # what it was made of


class Place(NamedTuple):
    """Where a part runs."""

    ranks: int
    rehearse: bool
    folder: Path

    @property
    def device(self) -> str:
        """``run.device``."""
        return "cpu" if self.rehearse else "gpu"


# --- the parts -------------------------------------------------------------------------------------------------------


def kernels(place: Place) -> None:
    """On one GPU."""
    import mxnet as mx

    from job.operators.cuda_kernels import Kernels
    from job.operators.graphs import Graphs
    from job.operators.tried_passes import queued_passes
    from tests.cuda import queued

    ctx = mx.cpu() if place.rehearse else mx.gpu(0)
    for dtype, tolerance in TOLERANCE.items():
        tell(*agreement(Graphs(dtype), f"MXNet's operators, {dtype}", ctx, dtype, tolerance, SMALL_SHAPES))
        if place.rehearse:
            found: Any = queued.kernels(dtype)
        else:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                found = queued_passes(ctx, dtype)
            if not isinstance(found, Kernels):
                tell(f"kernels, {dtype}", last_line(said.getvalue()), FAILED, said.getvalue())
                continue
        tell(*agreement(found, f"kernels, {dtype}", ctx, dtype, tolerance, SMALL_SHAPES if place.rehearse else SHAPES))


def agreement(passes: Any, what: str, ctx: Any, dtype: str, tolerance: float, shapes: Sequence[Any]) -> Row:
    """How far the passes are from numpy, over all shapes, and whether they repeat their bits."""
    errors, repeats = {}, True
    for samples, channels, length, offset in shapes:
        drawn = np.random.default_rng(0).normal
        xs, dys = (
            [drawn(at, 1, (n, channels, length)).astype(dtype) for n in samples]
            for at in (0.0 if dtype == "float16" else offset, 0.3)
        )
        gamma, beta = drawn(1, 0.3, channels).astype(np.float32), drawn(0, 1, channels).astype(np.float32)
        first, again = (on_device(passes, ctx, dtype, xs, dys, gamma, beta) for _ in range(2))
        repeats &= all(one.tobytes() == other.tobytes() for one, other in zip(first.values(), again.values()))
        for name, value in oracle(xs, dys, gamma, beta).items():
            scale = max(1.0, float(np.abs(value).max())) * (1 + 0.01 * abs(offset))
            error = float(np.abs(first[name].astype(np.float64) - value).max() / scale)
            errors[name] = max(errors.get(name, 0.0), error if np.isfinite(error) else np.inf)
    name, worst = max(errors.items(), key=lambda item: item[1])
    same = "the same bits again" if repeats else "OTHER BITS again"
    found = f"{worst:.1e} off at most, in {name} (allowed {tolerance:.0e}), over {len(shapes)} shapes; {same}"
    return Row(what, found, OK if worst <= tolerance and repeats else WRONG, errors)


def on_device(
    passes: Any, ctx: Any, dtype: str, xs: list[Any], dys: list[Any], gamma: Any, beta: Any
) -> dict[str, np.ndarray]:
    """What the passes make of shards (n, channels, length): the operator's own order of them, waited for."""
    import mxnet as mx

    from job.operators.queued_passes import Options

    wide = "float32" if dtype == "float16" else dtype
    options = Options(1e-5, 0.0, fix_gamma=False, unbiased=True, updates_running=True, relu=False)
    channels = len(gamma)
    inputs, slopes = ([mx.nd.array(part, ctx, dtype) for part in parts] for parts in (xs, dys))
    weights = [mx.nd.array(vector, ctx, wide) for vector in (gamma, beta)]
    running, gradients = ([mx.nd.zeros(channels, ctx, wide) for _ in range(2)] for _ in range(2))
    table = mx.nd.zeros((len(xs), 2 * channels + 1), ctx, np.float64)
    for k, x in enumerate(inputs):
        passes.moments(x, table[k])
    saved = passes.statistics(table, *weights, running, options)
    table = mx.nd.zeros((len(xs), 2 * channels), ctx, np.float64)
    ys, dxs = ([mx.nd.zeros_like(x) for x in inputs] for _ in range(2))
    for k, (x, dy) in enumerate(zip(inputs, slopes)):
        passes.affine(x, saved, ys[k], "write", options)
        passes.products(dy, x, saved, table[k], [(array, "add") for array in gradients], options)
    for k, (x, dy) in enumerate(zip(inputs, slopes)):
        passes.combine(dy, x, table, saved, dxs[k], "write", options)
    found = {"y": mx.nd.concat(*ys, dim=0), "dx": mx.nd.concat(*dxs, dim=0), "mean": running[0], "variance": running[1]}
    size = sum(dy.size for dy in dys) / channels  # a gradient adds up so many values
    return {
        **{name: array.asnumpy() for name, array in found.items()},
        **{name: array.asnumpy() / size for name, array in zip(("dgamma", "dbeta"), gradients)},
    }


def oracle(xs: list[Any], dys: list[Any], gamma: np.ndarray, beta: np.ndarray) -> dict[str, np.ndarray]:
    """The same from the definitions, in numpy and float64, on the whole batch at once."""
    from tests.oracles import batch_norm

    x, dy = np.concatenate(xs), np.concatenate(dys)
    exact = batch_norm(x, dy, 1, 1e-5, gamma, beta)
    size = x.size / len(gamma)
    return {
        "y": exact.y,
        "dx": exact.dx,
        "mean": exact.mean,
        "variance": exact.var * size / (size - 1),
        "dgamma": exact.dgamma / size,
        "dbeta": exact.dbeta / size,
    }


def bits(place: Place) -> None:
    """Runs as a user starts them."""
    hashes: dict[str, str] = {}
    steps = ["train.max_steps=2"] if place.rehearse else []
    for name, ranks in [("1", 1), ("1 again", 1), *[(str(n), n) for n in sorted({2, place.ranks}) if n <= place.ranks]]:
        run_dir = place.folder / f"smoke-on-{name.replace(' ', '-')}"
        settings = [f"run.device={place.device}", f"run.dir={run_dir}", "run.overwrite=true", *steps]
        command = [LOCAL, "-np", str(ranks), "--quiet", "--config", str(ROOT / "configs" / "smoke.yaml"), *settings]
        done = subprocess.run(command, capture_output=True, text=True)
        what = f"smoke run, {'rank' if place.rehearse else 'GPU'}s: {name}"
        if done.returncode:
            tell(what, last_line(done.stdout + done.stderr), FAILED, (done.stdout + done.stderr)[-3000:])
            continue
        summary = json.loads((run_dir / "summary.json").read_text())
        hashes[name] = summary["weights_sha256"]
        found = f"weights {hashes[name][:12]}, test accuracy {summary['test_accuracy']:.4f}"
        tell(what, f"{found}, {summary['images_per_second']:,.0f} images/s", MEASURED, summary)
    for what, names in [("repeated, the same bits", {"1", "1 again"}), ("on any number, the same bits", {*hashes})]:
        found = {hashes[name] for name in names if name in hashes}
        if len(names & {*hashes}) < 2:
            tell(what, "needs two runs that end", NOT_RUN)
        else:
            tell(what, "yes" if len(found) == 1 else "NO", OK if len(found) == 1 else WRONG)


def step(place: Place) -> None:
    """On all ranks: the tutorial's network, and ResNet-50 where there are GPUs for it."""
    from job.config import load_config
    from job.data import idx
    from job.data.dataset import FASHION_MNIST, Description, Split
    from job.distributed.comm import connect
    from job.distributed.device import choose_device

    comm = connect(300.0)
    ctx = choose_device(place.device, comm)
    fashion = idx.load(load_config().data).train
    pictures = Split(
        np.random.default_rng(0).integers(0, 256, (2048, 3, 224, 224), np.uint8) if not place.rehearse else None,
        np.arange(2048) % 1000,
    )
    thousand = Description(tuple(map(str, range(1000))), (3, 224, 224))
    for name, split, about, batch in [
        ("tutorial", fashion, FASHION_MNIST, 256),
        ("resnet50_v1", pictures, thousand, 64 * comm.size),
    ]:
        what = f"step of {name}, {batch} images on {comm.size} {'rank' if place.rehearse else 'GPU'}s"
        if split.images is None:
            row = Row(what, "takes minutes a step without a GPU", NOT_RUN)
        else:
            row = step_time(comm, ctx, name, split, about, batch, what, place.rehearse)
        if comm.rank == 0:
            tell(*row)
    comm.close()


def step_time(comm: Any, ctx: Any, network: str, split: Any, about: Any, batch: int, what: str, rehearse: bool) -> Row:
    """With statistics of each shard alone, with those of the global batch, and with these in float16, in turns."""
    from benchmarks.intervals import ratio
    from benchmarks.step_time import WARMUP_TURNS, measure
    from job.config import load_config
    from job.train import new_learner

    learners = []
    for synchronized, dtype in ((False, "float32"), (True, "float32"), (True, "float16")):
        overrides = [f"model.name={network}", f"data.global_batch={batch}", f"data.shards={max(8, comm.size)}"]
        kind = [f"model.sync_batch_norm={str(synchronized).lower()}", f"model.dtype={dtype}"]
        config = load_config(overrides=[*overrides, *kind])
        learners.append(new_learner(config, comm, ctx, about))
    turns = (1, 1) if rehearse else (12, 8)
    step_ms = measure(comm, learners, split, batch, max(8, comm.size), *turns)[WARMUP_TURNS:]
    alone, together, half = np.median(step_ms, axis=0)
    value, low, high = ratio(step_ms[:, 1], step_ms[:, 0])
    found = f"{alone:.2f} ms without SyncBatchNorm, {together:.2f} ms with it: x{value:.2f} ({low:.2f} to {high:.2f})"
    return Row(what, f"{found}; {half:.2f} ms in float16", MEASURED, step_ms.tolist())


def allreduce(place: Place) -> None:
    """On all ranks: an array where a network's are, summed where it is."""
    import mxnet as mx

    from job.distributed.comm import connect
    from job.distributed.device import choose_device

    comm = connect(300.0)
    ctx = choose_device(place.device, comm)
    for size in BYTES if not place.rehearse else BYTES[:4]:
        array = mx.nd.ones(size // 4, ctx)
        seconds = []
        for turn in range(2 + TURNS):
            comm.barrier()
            started = time.perf_counter()
            comm.allreduce_([array], f"bytes.{size}")
            array.wait_to_read()
            seconds.append(time.perf_counter() - started)
            if turn == 0:
                right = bool((array == comm.size).asnumpy().all())
                array[:] = 0
        took = float(np.median(seconds[2:]))
        if comm.rank == 0:
            found = f"{took * 1e6:,.0f} us, {bus_bandwidth(comm.size, size, took) / 1e9:.3f} GB/s of each rank's links"
            tell(f"allreduce of {size // 1024:,} KiB", found, MEASURED if right else WRONG, seconds)
    comm.close()


def bus_bandwidth(ranks: int, size_bytes: int, seconds: float) -> float:
    """Bytes per second that each rank sends, as NCCL's tests count them: 2 (n - 1) / n times the size of the array."""
    return 2 * (ranks - 1) / ranks * size_bytes / seconds


# --- the command -----------------------------------------------------------------------------------------------------


def tell(what: str, found: str, verdict: str, data: Any = None) -> None:
    """Hand a row to the process that makes the table."""
    print(f"\n{MARK}{json.dumps(Row(what, found, verdict, data))}", flush=True)


def run_part(name: str, place: Place) -> list[Row]:
    """The rows of a part; the last one says how it failed, if it did."""
    environment = {**os.environ, "PATH": f"{ROOT}/.venv/bin{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", PART, name, "-np", str(place.ranks)]
    command += ["--out", str(place.folder), *["--rehearse"] * place.rehearse]
    if name in ("step", "allreduce") and place.ranks > 1:
        command = [*launcher_of(place.ranks, [], environment), *command]
    output, failure = output_of(command, environment, LIMIT_SECONDS)
    rows = [Row(*json.loads(line.split(MARK, 1)[1])) for line in output.splitlines() if MARK in line]
    if failure:
        rows.append(Row(name, last_line(failure), FAILED, f"{shlex.join(command)}\n{failure[-5000:]}"))
    return rows


def output_of(command: Sequence[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """What a command printed, also if it did not end; and why it failed, if it did."""
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):  # launchers end their ranks at the first one
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(END_SECONDS)
            output, errors = process.communicate()
            return output, f"{errors}\nnot done after {seconds:g} s"
    return output, (errors or output or f"exit code {process.returncode}") if process.returncode else ""


def last_line(text: str) -> str:
    """What an error ends with, short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no output")[:200]


def table(about: dict[str, str], found: dict[str, list[Row]], rehearse: bool) -> str:
    """In Markdown."""
    note = (
        ["**A rehearsal on the CPU: nothing here ran on a GPU, and no time means anything.**", ""] if rehearse else []
    )
    lines = [*note, "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items()), ""]
    lines += ["| part | what | found | |", "|---|---|---|---|"]
    for part, rows in found.items():
        lines += [f"| {part} | {row.what} | {row.found.replace('|', '/')} | {row.verdict} |" for row in rows]
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """What the table is of."""
    cards = facts.gpus()
    packages = {**facts.packages(), **{name: version for name, version in facts.versions().items() if version}}
    return {
        "GPUs": cards.error or ", ".join(f"{card.name} (driver {card.driver})" for card in cards.cards) or "none",
        "processor": facts.processor(),
        "packages": ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
        "Horovod": facts.horovod().text or "does not start",
        "commit": facts.commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def gpus() -> int:
    """How many there are.

    Raises:
        SystemExit: none that MXNet can compute on.
    """
    answer = facts.mxnet_on_gpus()
    count = int(json.loads(answer.text)["gpus"]) if answer.text and not answer.error else 0
    if not count:
        reason = f" ({last_line(answer.error)})" if answer.error else ""
        print(
            f"error: MXNet sees no GPU here{reason}, so there is nothing to check. On a machine with GPUs `make doctor`"
            " says what is missing. To try this command itself on the CPU: python -m benchmarks.gpu_check --rehearse",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return count


def main(arguments: Sequence[str]) -> int:
    """Run all parts, write the table, say what to do with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-np", type=int, help="GPUs to use (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to try this command itself")
    parser.add_argument(PART, choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    ranks = options.np or (2 if options.rehearse else 0 if options.part else gpus())
    place = Place(ranks, options.rehearse, options.out.resolve())
    if options.part:
        run: Callable[[Place], None] = globals()[options.part]
        run(place)
        return 0
    place.folder.mkdir(parents=True, exist_ok=True)
    about, found = machine(), {}
    for name in PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = run_part(name, place)
    text = table(about, found, place.rehearse)
    (place.folder / "gpu_check.md").write_text(text)
    everything = {"rehearsal": place.rehearse, "machine": about, "parts": found}
    (place.folder / "gpu_check.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(text)
    print(f"Please send {place.folder}/gpu_check.md and gpu_check.json: attach them to an issue of this project.")
    return int(any(row.verdict in (WRONG, FAILED) for rows in found.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
