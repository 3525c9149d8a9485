"""``launch/setup.sh``, run for real in a checkout of its own, on a PATH that holds only what the test puts there.

What would take minutes is a stub: the Python on that PATH runs the script's own ``-c`` probes under a version of the
test's choosing, while its ``-m venv``, ``-m pip`` and ``-m job.data`` note that they were called and leave behind what
the real ones would. ``make test`` itself is the proof that the real ones work.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "awk bash cat chmod cp cut date dirname env flock grep head ln mkdir mktemp mv nproc readlink rm sed sh sha256sum "
    "sleep sort tail tee tr uname wc"
).split()
CPU_LOCK = """\
horovod==0.28.1 \\
    --hash=sha256:aa
    # via horovod-gluon-job (pyproject.toml)
mxnet==1.9.1 \\
    --hash=sha256:bb
pytest==8.4.2 \\
    --hash=sha256:cc
"""
# Called by a shell script of three lines, which stands for a Python of one version: a #! line cannot hold a space.
STUB = """\
import os, shutil, sys, time
from pathlib import Path

major, minor, lacks, calls, me = sys.argv[1:6]
calls, me, arguments = Path(calls), Path(me), sys.argv[6:]
if arguments[0] == "-c":
    sys.version_info = (int(major), int(minor), 0, "final", 0)
    sys.modules[lacks] = None
    sys.argv = arguments[1:]
    if "find_spec" in arguments[1]:
        sys.exit(not (me.parent / "packages").exists())
    if "import mxnet" not in arguments[1]:
        exec(arguments[1])
    sys.exit()

if arguments[1:3] == ["pip", "config"]:
    file = calls.with_name("pip config list")
    print(file.read_text() if file.exists() else "")
    sys.exit()
name = " ".join(arguments[1:3]) if arguments[1] == "pip" else arguments[1]
if "--require-hashes" in arguments:
    name += " " + " ".join(line.split("==")[0] for line in open(arguments[-1]) if "==" in line)
with calls.open("a") as file:
    print(name, file=file)
broken = calls.with_name("broken")  # holds the name of a step, and what that step says as it fails
if broken.exists() and name.startswith(broken.read_text().split(":")[0]):
    print(broken.read_text().partition(":")[2])
    sys.exit(1)
if arguments[1] == "venv":
    (Path(arguments[2]) / "bin").mkdir(parents=True)
    shutil.copy(me, Path(arguments[2]) / "bin" / "python")
elif name.startswith("pip wheel"):
    if calls.with_name("slow").exists():
        calls.with_name("pid").write_text(str(os.getpid()))
        time.sleep(60)
    wheels = Path(arguments[arguments.index("--wheel-dir") + 1])
    wheels.mkdir()
    (wheels / "horovod-0.28.1-stub.whl").touch()
elif arguments[-1].endswith(".whl"):
    for tool, says in ("horovodrun", "[X] MXNet\\n[X] MPI\\n[X] Gloo"), ("mpirun", "4.1.8"):
        (me.parent / tool).write_text("#!/bin/sh\\necho '" + says + "'\\n")
        (me.parent / tool).chmod(0o755)
elif "--require-hashes" in arguments and not {"PIP_TARGET", "PIP_PREFIX"} & os.environ.keys():
    (me.parent / "packages").touch()
    calls.with_name("variables").write_text("".join(f"{name}={value}\\n" for name, value in os.environ.items()))
elif arguments[1] == "job.data":
    print("60000 images, verified")
"""


class Checkout:
    """A checkout in a folder with a space in its name, and the machine around it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my job"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        (self.root / "launch").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "launch" / "setup.sh", self.root / "launch")
        shutil.copytree(ROOT / "launch" / "shared", self.root / "launch" / "shared")
        (self.root / "requirements-cpu.txt").write_text(CPU_LOCK)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"the test needs {tool}"))
        for compiler in ("gcc", "g++", "make"):
            self.add(compiler, "#!/bin/sh\n")

    def add(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def add_python(self, name: str, version: "tuple[int, int]", lacks: str = "") -> None:
        stub = self.calls_file.with_name("stub.py")
        stub.write_text(STUB)
        announced = f"{version[0]} {version[1]} '{lacks or 'nothing'}' '{self.calls_file}' \"$0\""
        self.add(name, f"#!/bin/sh\nexec '{sys.executable}' -ES '{stub}' {announced} \"$@\"\n")

    def break_step(self, step: str, says: str) -> None:
        self.calls_file.with_name("broken").write_text(f"{step}:{says}")

    def mend(self) -> None:
        self.calls_file.with_name("broken").unlink()

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self.root / "launch" / "setup.sh"), *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.root), **environment},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def setup(self, *arguments: str, **environment: str) -> "tuple[int, str]":
        """Exit code, and all that it said."""
        process = self.start(*arguments, **environment)
        said, _ = process.communicate(timeout=30)
        return process.returncode, said

    def calls(self) -> "list[str]":
        """What the stub was asked to do since the last call of this, with the packages it would have installed."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


EVERYTHING = ["venv", "pip install mxnet pytest", "pip wheel horovod", "pip install", "job.data"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout that was set up."""
    checkout.add_python("python3.11", (3, 11))
    code, said = checkout.setup()
    assert code == 0, said
    assert checkout.calls() == EVERYTHING
    return checkout


def test_without_a_python_it_says_how_to_get_one(checkout: Checkout) -> None:
    code, said = checkout.setup()
    assert code == 1
    assert "MXNet 1.9.1 needs Python 3.9, 3.10 or 3.11" in said
    for way in ("apt-get install python3.11", "uv python install 3.11", "pyenv install 3.11", "PYTHON="):
        assert way in said


@pytest.mark.parametrize(("version", "verdict"), [((3, 8), "3.8, too old"), ((3, 13), "3.13, too new")])
def test_a_python_that_mxnet_does_not_support_is_named_and_refused(
    checkout: Checkout, version: "tuple[int, int]", verdict: str
) -> None:
    checkout.add_python("python3", version)
    code, said = checkout.setup()
    assert code == 1
    assert f"python3 is {verdict}" in said


def test_a_python_without_venv_names_the_debian_package(checkout: Checkout) -> None:
    checkout.add_python("python3", (3, 10), lacks="ensurepip")
    code, said = checkout.setup()
    assert code == 1
    assert "apt-get install python3.10-venv" in said


def test_a_python_that_is_only_a_shim_is_passed_over(checkout: Checkout) -> None:
    checkout.add("python3.11", "#!/bin/sh\necho 'pyenv: python3.11: command not found' >&2\nexit 127\n")
    checkout.add_python("python3.10", (3, 10), lacks="ensurepip")
    checkout.add_python("python3.9", (3, 9))
    code, said = checkout.setup()
    assert code == 0, said
    assert "Python 3.9" in said


def test_the_python_that_the_user_names_is_the_only_one_tried(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.add_python("mine", (3, 13))
    code, said = checkout.setup(PYTHON="mine")
    assert code == 1
    assert "mine is 3.13, too new" in said


def test_without_a_compiler_it_names_what_is_missing_and_the_package(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    (checkout.bin / "g++").unlink()
    code, said = checkout.setup()
    assert code == 1
    assert "this machine lacks: g++." in said
    assert "apt-get install build-essential" in said
    assert checkout.calls() == []


def test_each_step_is_one_numbered_line_with_its_seconds(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    code, said = checkout.setup()
    assert code == 0, said
    lines = said.splitlines()
    assert [re.findall(r"^setup: \[(\d)/6\] .* \d+ s$", line) for line in lines[:5]] == [[str(n)] for n in range(1, 6)]
    assert lines[5:] == ["setup: [6/6] fetching Fashion-MNIST", "60000 images, verified"]


def test_pip_installs_into_the_environment_whatever_the_users_settings_are(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    code, said = checkout.setup(PIP_TARGET="/elsewhere", PIP_PREFIX="/elsewhere", CDPATH="/", PYTHONPATH="/elsewhere")
    assert code == 0, said
    assert (checkout.root / ".venv" / "bin" / "packages").exists()


def test_of_pips_own_files_only_what_leads_packages_into_the_environment_counts(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.calls_file.with_name("pip config list").write_text(
        ":env:.cert='/c'\ninstall.target='/elsewhere'\ninstall.timeout='7'\nglobal.user='true'\nglobal.timeout='5'\n"
        "global.index-url='https://one/'\nglobal.extra-index-url='\\nhttps://a b/\\nhttps://two/'\nglobal.cert='/d'\n"
    )
    code, said = checkout.setup(PIP_CERT="/c", PIP_USER="1")
    assert code == 0, said
    lines = checkout.calls_file.with_name("variables").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("PIP_")) == [
        "PIP_CERT=/c",
        "PIP_CONFIG_FILE=/dev/null",
        "PIP_EXTRA_INDEX_URL=https://a b/ https://two/",
        "PIP_INDEX_URL=https://one/",
        "PIP_TIMEOUT=7",
    ]


def test_an_environment_whose_packages_went_elsewhere_is_made_anew(ready: Checkout) -> None:
    (ready.root / ".venv" / "bin" / "packages").unlink()
    (ready.root / ".venv" / ".stamps" / "ready").unlink()
    code, said = ready.setup()
    assert code == 0, said
    assert ready.calls() == EVERYTHING


def test_a_link_to_an_environment_that_is_ready_is_used_and_another_one_is_left_alone(
    ready: Checkout, tmp_path: Path
) -> None:
    real = ready.root / ".venv"
    real.rename(tmp_path / "environment")
    real.symlink_to(tmp_path / "environment")
    code, said = ready.setup()
    assert code == 1, "it was made for another path"
    assert f"{real} is a link to {tmp_path}/environment" in said and "Remove the link" in said
    assert real.is_symlink() and (tmp_path / "environment" / "bin" / "python").exists()
    assert ready.calls() == []
    real.unlink()
    (tmp_path / "environment").rename(real)
    (tmp_path / "second").mkdir()
    second = Checkout(tmp_path / "second")
    second.add_python("python3.11", (3, 11))
    (second.root / ".venv").symlink_to(real)
    code, said = second.setup()
    assert code == 0, said
    assert "setup: .venv is ready" in said


def test_a_second_run_leaves_the_environment_alone_and_is_quick(ready: Checkout) -> None:
    started = time.monotonic()
    code, said = ready.setup()
    assert code == 0
    assert time.monotonic() - started < 1
    assert said.startswith("setup: .venv is ready\n")
    assert ready.calls() == ["job.data"]


def test_a_lock_with_another_tool_installs_without_building_horovod_again(ready: Checkout) -> None:
    (ready.root / "requirements-cpu.txt").write_text(CPU_LOCK.replace("8.4.2", "8.4.3"))
    code, said = ready.setup()
    assert code == 0, said
    assert ready.calls() == ["pip install mxnet pytest", "job.data"]


def test_without_dev_it_installs_what_the_gpu_lock_has_too_and_mxnet(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    both = "numpy==1.23.5 ; python_version < '3.12' \\\n    --hash=sha256:dd\nnvidia-cuda-nvrtc-cu11==11.8.89\n"
    (checkout.root / "requirements-cpu.txt").write_text(CPU_LOCK + both)
    (checkout.root / "requirements-gpu.txt").write_text("mxnet-cu112==1.9.1\n" + both)
    code, said = checkout.setup("--no-dev", "--no-data")
    assert code == 0, said
    assert checkout.calls() == ["venv", "pip install mxnet numpy", "pip wheel horovod", "pip install"]
    code, said = checkout.setup("--no-data")
    assert code == 0, said
    assert "pip install mxnet pytest numpy nvidia-cuda-nvrtc-cu11" in checkout.calls()


def test_a_lock_with_another_mxnet_builds_horovod_again(ready: Checkout) -> None:
    (ready.root / "requirements-cpu.txt").write_text(CPU_LOCK.replace("1.9.1", "1.9.2"))
    code, said = ready.setup()
    assert code == 0, said
    assert ready.calls() == EVERYTHING[1:]


def test_another_python_makes_everything_anew(ready: Checkout) -> None:
    ready.add_python("python3.9", (3, 9))
    code, said = ready.setup(PYTHON="python3.9")
    assert code == 0, said
    assert ready.calls() == EVERYTHING


def test_the_python_of_the_environment_is_kept_though_it_left_the_path(ready: Checkout) -> None:
    (ready.bin / "python3.11").unlink()
    (ready.root / "requirements-cpu.txt").write_text(CPU_LOCK.replace("8.4.2", "8.4.3"))
    code, said = ready.setup()
    assert code == 0, said
    assert ready.calls() == ["pip install mxnet pytest", "job.data"]


def test_a_checkout_that_was_moved_is_set_up_again(ready: Checkout) -> None:
    ready.root = ready.root.rename(ready.root.with_name("moved"))
    code, said = ready.setup()
    assert code == 0, said
    assert ready.calls() == EVERYTHING


def test_a_half_made_environment_is_thrown_away(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.break_step("pip install", "ERROR: Read timed out.")
    code, said = checkout.setup()
    assert code == 1
    assert "package index was not reached" in said
    leftover = checkout.root / ".venv" / "half-written-package"
    leftover.touch()
    checkout.mend()
    checkout.calls()
    code, said = checkout.setup()
    assert code == 0, said
    assert checkout.calls() == EVERYTHING
    assert not leftover.exists()


def test_a_failed_build_tells_step_reason_and_log_and_is_taken_up_there(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.break_step("pip wheel", "ops.cc:7: fatal error: mpi.h: No such file\nmake: *** [all] Error 2\na long tail")
    code, said = checkout.setup()
    assert code == 1
    log = checkout.root / ".setup" / "log"
    assert "[4/6] building Horovod 0.28.1 with Gloo and MPI (about 2 minutes): failed after" in said
    assert "fatal error: mpi.h: No such file" in said
    assert f"log: {log}" in said
    assert "a long tail" in log.read_text()
    checkout.mend()
    checkout.calls()
    code, said = checkout.setup()
    assert code == 0, said
    assert checkout.calls() == EVERYTHING[2:]


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "JOBS=1 make setup"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "Do not work around it"),
    ],
)
def test_a_common_cause_of_failure_comes_with_its_remedy(checkout: Checkout, cause: str, advice: str) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.break_step("pip install", cause)
    code, said = checkout.setup()
    assert code == 1
    assert cause in said
    assert advice in said


def test_failing_to_fetch_the_data_does_not_cost_the_environment(checkout: Checkout) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.break_step("job.data", "error: no mirror was reached")
    code, said = checkout.setup()
    assert code == 1
    assert "error: no mirror was reached" in said
    assert "the environment is ready, the data set is not" in said
    checkout.mend()
    checkout.calls()
    assert checkout.setup()[0] == 0
    assert checkout.calls() == ["job.data"]


def test_two_at_once_take_turns(ready: Checkout) -> None:
    with (ready.root / ".setup" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = ready.start()
        assert second.stdout is not None
        assert "another set-up is at work in this checkout; waiting" in second.stdout.readline()
        assert ready.calls() == []
    said, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert "setup: .venv is ready" in said


def lives(process: int) -> bool:
    """And is not one that has ended, of which nobody has taken note."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build_and_all_its_processes(checkout: Checkout, number: signal.Signals) -> None:
    checkout.add_python("python3.11", (3, 11))
    checkout.calls_file.with_name("slow").touch()
    pid_file = checkout.calls_file.with_name("pid")
    process = checkout.start()
    deadline = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    build = int(pid_file.read_text())
    process.send_signal(number)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "setup: stopped" in said
    while lives(build):
        assert time.monotonic() < deadline, "the build lives on"
        time.sleep(0.05)


def test_an_unknown_option_is_a_usage_error(checkout: Checkout) -> None:
    code, said = checkout.setup("--gpus")
    assert code == 2
    assert said.startswith("usage: launch/setup.sh")


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-gpu.txt"])
def test_a_lock_is_exact_and_names_no_index_and_no_machine(name: str) -> None:
    lock = (ROOT / name).read_text()
    entries = [line for line in lock.splitlines() if line[:1] not in ("", " ", "#")]
    assert all(re.match(r"[a-z0-9-]+==[^ ]+ (; .*)?\\$", entry) for entry in entries)
    assert [entry.split(" ")[0] for entry in entries if entry.startswith("numpy==")] == ["numpy==1.23.5"]
    assert not re.search(r"://|--index|--extra-index|--find-links|file:", lock)
    assert os.fspath(ROOT) not in lock
