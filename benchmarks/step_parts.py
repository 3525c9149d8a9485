"""Where a step's time goes by operator, and what this machine could do: ``python -m benchmarks.step_parts``.

The tutorial's network at its global batch of 256 in 8 shards, on one process and one thread. Our own loops are timed as
they are called, oneDNN says of each call of its own how long it took (DNNL_VERBOSE); the rest is what the step takes
beside. Arithmetic is counted, multiply and
add as two. Bytes are those of each array that an operator must read or write once. What the machine could do is the
longer one of: that arithmetic at the speed of its own float32 matrix product, those bytes at the speed of its own copy.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

BATCH, SHARDS, STEPS, WARM_UP = 256, 8, 12, 4
_CALL = re.compile(r"^dnnl_verbose,exec,cpu,(\w+),[^,]*,(\w+),.*,([^,]+),([\d.]+)$")


class Work(NamedTuple):
    """What an operator does in a step at least: arithmetic in operations, memory in bytes."""

    operations: float
    bytes: float

    def least_ms(self, operations_per_second: float, bytes_per_second: float) -> float:
        """The time that the machine would need if it were always as fast as in its own product and copy."""
        return 1e3 * max(self.operations / operations_per_second, self.bytes / bytes_per_second)


def convolution(images: int, channels: int, size: int, filters: int, kernel: int) -> Work:
    """One pass (forward, or either gradient) of a convolution without padding; ``size`` is that of its input's side."""
    out = size - kernel + 1
    weights = filters * channels * kernel * kernel
    arrays = images * (channels * size * size + filters * out * out) + weights
    return Work(2.0 * images * out * out * weights, 4.0 * arrays)


def pointwise(values: int, arrays: float) -> Work:
    """An operator that reads and writes ``arrays`` arrays of so many float32 values, with an operation for each."""
    return Work(float(values), 4.0 * values * arrays)


def dense(images: int, inputs: int, outputs: int) -> Work:
    """One pass of a dense layer."""
    return Work(2.0 * images * inputs * outputs, 4.0 * (images * (inputs + outputs) + inputs * outputs))


_FIRST, _SECOND = BATCH * 20 * 24 * 24, BATCH * 50 * 10 * 10
_FIRST_BATCH_NORM, _SECOND_BATCH_NORM = "BatchNorm, ReLU, pooling 1", "BatchNorm, ReLU, pooling 2"
_WEIGHTS = 20 * 26 + 50 * 181 + 128 * 1251 + 10 * 129
# By the name of a loop, or the kind and the pass of oneDNN's, and by the shape.
WORK: dict[tuple[str, str, str], tuple[str, Work]] = {
    ("own", "forward", "20"): ("convolution 1, forward", convolution(BATCH, 1, 28, 20, 5)),
    ("own", "backward_weight", "20"): ("convolution 1, weights", convolution(BATCH, 1, 28, 20, 5)),
    ("own", "forward", "50"): ("convolution 2, forward", convolution(BATCH, 20, 12, 50, 3)),
    ("own", "backward_weight", "50"): ("convolution 2, weights", convolution(BATCH, 20, 12, 50, 3)),
    ("own", "backward_data", "50"): ("convolution 2, data", convolution(BATCH, 20, 12, 50, 3)),
    # Results and their gradients have a quarter of the values; beside each a byte says where it came from.
    ("own", "moments", "20"): (f"{_FIRST_BATCH_NORM}, statistics", pointwise(_FIRST, 1)),
    ("own", "affine", "20"): (f"{_FIRST_BATCH_NORM}, forward", pointwise(_FIRST, 1.31)),
    ("own", "products", "20"): (f"{_FIRST_BATCH_NORM}, sums backward", pointwise(_FIRST, 1.31)),
    ("own", "combine", "20"): (f"{_FIRST_BATCH_NORM}, backward", pointwise(_FIRST, 2.31)),
    ("own", "moments", "50"): (f"{_SECOND_BATCH_NORM}, statistics", pointwise(_SECOND, 1)),
    ("own", "affine", "50"): (f"{_SECOND_BATCH_NORM}, forward", pointwise(_SECOND, 1.31)),
    ("own", "products", "50"): (f"{_SECOND_BATCH_NORM}, sums backward", pointwise(_SECOND, 1.31)),
    ("own", "combine", "50"): (f"{_SECOND_BATCH_NORM}, backward", pointwise(_SECOND, 2.31)),
    ("inner_product", "forward_training", "ic1250oc128"): ("dense 1, forward", dense(BATCH, 1250, 128)),
    ("inner_product", "backward_weights", "ic1250oc128"): ("dense 1, weights", dense(BATCH, 1250, 128)),
    ("inner_product", "backward_data", "ic1250oc128"): ("dense 1, data", dense(BATCH, 1250, 128)),
    # A gradient of each shard is read; the sum of twice the width is read and written.
    ("own", "add", ""): ("gradients, rounded and added up", pointwise(SHARDS * _WEIGHTS, 5)),
}


def calls(lines: list[str]) -> list[tuple[str, str, str, float]]:
    """Kind, pass, shape and milliseconds of each call of which oneDNN's lines tell."""
    found = (_CALL.match(line) for line in lines)
    return [(match[1], match[2], match[3], float(match[4])) for match in found if match]


def by_operator(lines: list[str], steps: int) -> dict[str, float]:
    """Milliseconds a step of each operator, from the median of its calls; what is in no row of WORK is ``other``."""
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for kind, pass_, shape, ms in calls(lines):
        times[kind, pass_, shape].append(ms)
    found: dict[str, float] = defaultdict(float)
    for (kind, pass_, shape), each in times.items():
        name = next((name for key, (name, _) in WORK.items() if key[:2] == (kind, pass_) and key[2] in shape), "other")
        found[name] += statistics.median(each) * len(each) / steps
    return dict(found)


def own_loops(spent: dict[tuple[str, str], float]) -> None:
    """Have our own loops add the seconds that they take to ``spent``, by name and by channels of results."""
    from job.operators import convolution_loops as loops
    from job.operators.fused import FusedPoolPasses
    from job.training.exact import ExactSum

    def time_calls(owner: Any, name: str, channels: Callable[..., Any]) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            spent[name, str(channels(*arguments))] += time.perf_counter() - started
            return result

        setattr(owner, name, timed)

    time_calls(loops, "forward", lambda x, weight, bias, pad, out: out.shape[1])
    time_calls(loops, "backward_data", lambda dy, *others: dy.shape[1])
    time_calls(loops, "backward_weight", lambda dy, *others: dy.shape[1])
    time_calls(FusedPoolPasses, "moments", lambda passes, x: x.shape[1])
    for name in ("affine", "products", "combine"):
        time_calls(FusedPoolPasses, name, lambda passes, x, *others: x.shape[1])
    time_calls(ExactSum, "add", lambda *arguments: "")


def machine() -> tuple[float, float, str]:
    """Operations per second of a float32 matrix product, bytes per second of a copy, and whose product it was."""
    import mxnet as mx

    a, b = (mx.nd.random.normal(shape=(1024, 1024)) for _ in range(2))
    zero = mx.nd.zeros((1024,))
    product = _least(lambda: mx.nd.FullyConnected(a, b, zero, num_hidden=1024).wait_to_read())
    source = np.ones(_FIRST // SHARDS, np.float32)  # as large as the largest array of a shard
    target = np.empty_like(source)
    copy = _least(lambda: np.copyto(target, source))
    return 2 * 1024**3 / product, 2 * source.nbytes / copy, "oneDNN's"


def _least(function) -> float:  # type: ignore[no-untyped-def]
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _train() -> None:
    """In a process of its own, which oneDNN tells of its calls: some steps, and how long they took."""
    from job.distributed.placement import share_cores

    share_cores()
    import mxnet as mx

    from job import memory
    from job.config import load_config
    from job.data import idx
    from job.data.sampler import Sampler
    from job.distributed.comm import Comm
    from job.distributed.device import choose_device
    from job.train import new_learner

    config, comm = load_config(), Comm()
    dataset = idx.load(config.data)
    learner = new_learner(config, comm, choose_device("cpu", comm), dataset.about)
    sampler = Sampler(len(dataset.train.labels), BATCH, 0)
    taken, spent = [], defaultdict[tuple[str, str], float](float)
    own_loops(spent)
    memory.settle()
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            print("warm", flush=True)
            spent.clear()
        started = time.perf_counter()
        learner.step(dataset.train, [sampler.shards(0, step, range(SHARDS), SHARDS)], BATCH, 0.01)
        mx.nd.waitall()
        taken.append(time.perf_counter() - started)
    named = {key[1:]: name for key, (name, _) in WORK.items() if key[0] == "own"}
    own = {named[key]: seconds * 1e3 / STEPS for key, seconds in spent.items() if key in named}
    print(json.dumps({"step": statistics.median(taken[WARM_UP:]) * 1e3, "own": own}), flush=True)


def main() -> None:
    """Print the table."""
    settings = {"OMP_NUM_THREADS": "1", "MXNET_CPU_WORKER_NTHREADS": "1"}
    os.environ.update(settings)
    command = [sys.executable, "-m", "benchmarks.step_parts", "train"]
    runs = {}
    for verbose in ("0", "1"):
        environment = {**os.environ, "DNNL_VERBOSE": verbose}
        runs[verbose] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    measured = json.loads(runs["0"].splitlines()[-1])  # without oneDNN's lines, which take their time
    whole = measured["step"]
    parts = {**by_operator(runs["1"].partition("\nwarm\n")[2].splitlines(), STEPS), **measured["own"]}
    operations, bytes_, whose = machine()
    print(f"one thread: {whose} float32 product {operations / 1e9:.0f} GFLOP/s, a copy {bytes_ / 1e9:.1f} GB/s\n")
    print("| operator | MFLOP | MB | could take, ms | takes, ms | fraction |\n|---|---|---|---|---|---|")
    for name, work in WORK.values():
        if name in parts:
            least = work.least_ms(operations, bytes_)
            print(
                f"| {name} | {work.operations / 1e6:.0f} | {work.bytes / 1e6:.1f} | {least:.1f} | {parts[name]:.1f} |"
                f" {least / parts[name]:.0%} |"
            )
    print(f"| oneDNN, all else | | | | {parts.get('other', 0.0):.1f} | |")
    rest = whole - sum(parts.values())
    print(f"| neither: the calls themselves, statistics, update, input, waits | | | | {rest:.1f} | |")
    print(f"| the step | | | | {whole:.1f} | |")


if __name__ == "__main__":
    _train() if sys.argv[1:] == ["train"] else main()
