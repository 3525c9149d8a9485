"""How long the arrays of a checkpoint take to encode, write and decode: as today, and as safetensors, in turns.

    python -m benchmarks.checkpoint_encoding [ROUNDS]

Arrays of the sizes of the tutorial's network and of a ResNet-18 with momentum. Each value is the median over the
rounds, each ratio the median of the rounds' ratios; which of the two goes first changes from round to round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from job.checkpoints.store import _write, decode_arrays, encode_arrays

PARTS = ("encode", "encode and write", "decode")
TUTORIAL = [(20, 1, 5, 5), (50, 20, 3, 3), (128, 1250), (10, 128), *[(20,)] * 8]
RESNET = [*[(512, 512, 3, 3)] * 8, *[(256, 256, 3, 3)] * 6, *[(64,)] * 60]

Arrays = Mapping[str, np.ndarray]


def main(rounds: int) -> None:
    """Measure and print."""
    random = np.random.default_rng(0)
    for name, shapes in (("tutorial", TUTORIAL), ("ResNet-18", RESNET)):
        arrays = {f"network/{i}.weight": random.standard_normal(shape).astype("f") for i, shape in enumerate(shapes)}
        seconds: dict[str, list[list[float]]] = {"today": [], "safetensors": []}
        with tempfile.TemporaryDirectory() as folder:
            ways = [("today", encode_arrays, decode_arrays), ("safetensors", save, load)]
            for number in range(rounds):
                for way, encode, decode in ways if number % 2 else reversed(ways):
                    seconds[way].append(timed(arrays, encode, decode, Path(folder) / "arrays"))
        size = sum(array.nbytes for array in arrays.values()) / 1e6
        for place, part in enumerate(PARTS):
            today, other = ([times[place] for times in seconds[way]] for way in ("today", "safetensors"))
            ratio = statistics.median(b / a for a, b in zip(today, other))
            print(
                f"{name} ({size:.1f} MB), {part}: today {1000 * statistics.median(today):.1f} ms,"
                f" safetensors {1000 * statistics.median(other):.1f} ms, ratio {ratio:.2f}"
            )


def timed(
    arrays: Arrays, encode: Callable[[Arrays], bytes], decode: Callable[[bytes], Arrays], file: Path
) -> list[float]:
    """The seconds of each of ``PARTS``, once."""
    start = time.perf_counter()
    content = encode(arrays)
    encoded = time.perf_counter()
    _write(file, content)
    written = time.perf_counter()
    decode(content)
    return [encoded - start, written - start, time.perf_counter() - written]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
