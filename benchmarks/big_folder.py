"""``python -m benchmarks.big_folder``: what the start of a run takes with 1.2 million pictures, and what memory.

The pictures are empty files but for the first one, which alone is decoded before a run begins. The first start lists
them, the later ones map what it has kept. What a list of the same names would take in each rank is beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

CLASSES = 1000

START = """
import json, resource, sys, time
from pathlib import Path
from job.config import DataConfig
from job.data import formats
def resident():
    pages = Path("/proc/self/smaps_rollup").read_text().split()
    return {name: int(pages[pages.index(f"{name}:") + 1]) / 1024 for name in ("Pss", "Private_Dirty")}
before, started = resident(), time.perf_counter()
config = DataConfig(dir=Path(sys.argv[1]), cache_dir=Path(sys.argv[2]), format="folder")
data = formats.load(config)
seconds = time.perf_counter() - started
after = resident()
names = [data.train.images._encoded.name(place) for place in range(len(data.train.labels))] if len(sys.argv) > 3 else []
listed = resident()["Private_Dirty"] - after["Private_Dirty"]
print(json.dumps([seconds, after["Private_Dirty"] - before["Private_Dirty"], listed, len(data.train.labels)]))
"""


def main() -> None:
    """Write the names, start three times, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1_200_000, help="names to write (default: %(default)s)")
    pictures = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "data", pictures)
        time.sleep(2.5)  # what has changed in the last two seconds is not kept
        print("| start | seconds | private memory of a rank, MB |\n|---|---|---|")
        for title in ("first", "second", "third"):
            seconds, megabytes, listed, count = start(folder, *(["list"] if title == "third" else []))
            print(f"| {title} | {seconds:.1f} | {megabytes:.0f} |")
        print(
            f"\n{count:,.0f} pictures; as a list of Python's texts their names take {listed:.0f} MB more in each rank"
        )


def write(folder: Path, pictures: int) -> None:
    """Empty files in ``train/CLASS/``, and a picture as the first file of each part."""
    for number in range(CLASSES):
        for part, count in (("train", pictures // CLASSES), ("test", 2)):
            top = folder / part / f"n{number:08}"
            top.mkdir(parents=True)
            for place in range(count):
                os.mknod(top / f"n{number:08}_{place:06}.JPEG")
        if number == 0:
            for part in ("train", "test"):
                Image.new("RGB", (8, 8)).save(folder / part / "n00000000" / "n00000000_000000.JPEG")


def start(folder: Path, *more: str) -> list[float]:
    """Load in a process of its own; what it took."""
    command = [sys.executable, "-c", START, str(folder / "data"), str(folder / "cache"), *more]
    found: list[float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


if __name__ == "__main__":
    main()
