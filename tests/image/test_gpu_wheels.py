"""What can be said of the gpu image without building it: MXNet links no CUDA library that the lock does not have.

Downloads 2.4 GB of wheels, once: ``make image-test TARGET=gpu``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.image.container import BUILD, ROOT

# What the Dockerfile's base has, or installs; and the driver's library, which the container runtime lends.
BASE = set(
    "ld-linux-x86-64.so.2 libc.so.6 libdl.so.2 libm.so.6 libpthread.so.0 librt.so.1 libgcc_s.so.1 libstdc++.so.6 "
    "libgomp.so.1 libquadmath.so.0".split()
)
DRIVER = {"libcuda.so.1"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("TARGET") != "gpu", reason="2.4 GB for the gpu image alone (TARGET=gpu)"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf: apt-get install binutils"),
]


def download() -> list[Path]:
    """The wheels of MXNet and of NVIDIA, with the hashes of the lock."""
    folder = BUILD / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    entries = re.split(r"^(?=[a-z])", (ROOT / "requirements-gpu.txt").read_text(), flags=re.MULTILINE)
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(entry for entry in entries if entry.startswith(("mxnet-cu112==", "nvidia-"))))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "--requirement", str(wanted)], check=True)
    return sorted(folder.glob("*.whl"))


def needs(wheel: Path, member: str, scratch: Path) -> set[str]:
    """The libraries that one library in a wheel names (DT_NEEDED)."""
    with zipfile.ZipFile(wheel).open(member) as packed, scratch.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 24)
    dynamic = subprocess.run(["readelf", "--dynamic", str(scratch)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))


def test_every_library_that_mxnet_links_directly_or_not_is_in_the_lock_or_the_base(tmp_path: Path) -> None:
    places = {
        Path(member).name: (wheel, member)
        for wheel in download()
        for member in zipfile.ZipFile(wheel).namelist()
        if ".so" in Path(member).name
    }
    linked, unread = set[str](), {"libmxnet.so"}
    while unread:
        name = unread.pop()
        linked.add(name)
        if name in places:
            unread |= needs(*places[name], tmp_path / "library") - linked
    assert {"libcudnn.so.8", "libnccl.so.2", "libcudart.so.11.0", "libcublasLt.so.11"} <= linked & places.keys()
    assert linked - places.keys() == BASE | DRIVER
