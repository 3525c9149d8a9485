#!/usr/bin/env python
"""Run by a Slurm task or by a pod of an Indexed Job: starts its ranks, where no launcher reaches the other machines.

Slurm and Kubernetes start the tasks of a job by themselves and tell each, in its environment, which one it is. What is
left to do is what ``horovodrun`` does over ssh: the task of rank 0 opens Horovod's rendezvous server, all tasks report
to it, and when every one is there each starts its ranks. ``python launch/rank.py --help`` tells more.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

import psutil
from horovod.runner.common.util.hosts import SlotInfo
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from job import command
from job.errors import JobError, Preempted, UsageError
from launch.shared.arguments import with_auto_resume

HELP = """usage: python launch/rank.py [--coordinator HOST] [--dry-run] [arguments of job/train.py]

Starts the one rank of a Slurm task, or all ranks of one pod of an Indexed Job. It ends with their exit code. Every task
of the job runs the same command:

  srun --ntasks=4 python launch/rank.py --config configs/smoke.yaml run.dir=runs/first

  --coordinator HOST   where the task of rank 0 runs, by name or address (default: JOB_COORDINATOR; under Slurm the
                       first node of the step)
  --check              check the configuration and the job's variables, and start nothing
  --dry-run            print the environment and the command of each rank of this task, and start nothing
  --help               this text; `python job/train.py --help` lists the arguments of train.py

environment:
  Slurm                SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_STEP_TASKS_PER_NODE and others, set by srun:
                       one task is one rank
  an Indexed Job       JOB_COMPLETION_INDEX, set by Kubernetes; JOB_HOSTS, the number of pods; JOB_RANKS_PER_HOST
                       (default: 1); JOB_COORDINATOR, the DNS name of pod 0
  JOB_COORDINATOR_PORT TCP port of the rendezvous (default: 29400; under Slurm a port made from the job's id)
  JOB_START_TIMEOUT_SECONDS
                       longest wait until all tasks are there (default: 600)
  HOROVOD_GLOO_IFACE   network interface of the collectives (default: the one towards the coordinator)

exit codes:   0 done, 1 failed, 2 bad configuration or usage (no rank was started), 75 preempted with a checkpoint
              written, 128 + N stopped by signal N without a checkpoint

To continue a run that was stopped, give the same command again: it adds run.resume=auto, unless your arguments have
run.resume or run.overwrite. SIGTERM and SIGUSR1 go on to the ranks, which stop after their step; after a second one
they have five seconds to end.
"""

PORT = 29400
START_SECONDS = 600  # images are pulled, and pods wait for machines
POLL_SECONDS = 0.2
NEWS_SECONDS = 15.0  # between lines that say what is waited for
END_SECONDS = 5.0  # from SIGTERM to SIGKILL, for ranks that outlive one that failed
ECHO_SECONDS = 1.0  # launchers and process groups deliver one signal twice
LEAVE_SECONDS = 60.0  # for ranks to end after the first one has ended well


@dataclass(frozen=True)
class Task:
    """One of the processes that make up the job, and the ranks that it is to run."""

    job: str  # what all tasks must agree on
    index: int  # among the tasks; that of index 0 runs rank 0
    tasks: int
    host: int
    ranks_on_host: Sequence[int]
    ranks: Sequence[tuple[int, int]]  # (rank, local rank) of each
    coordinator: str
    port: int


# --- who am I --------------------------------------------------------------------------------------------------------


def read_task(environ: Mapping[str, str], coordinator: Optional[str] = None) -> Task:
    """The task that the environment describes.

    Raises:
        UsageError: a variable is missing or wrong, or two contradict each other.
    """
    coordinator = coordinator or environ.get("JOB_COORDINATOR")
    if "JOB_COMPLETION_INDEX" in environ:
        return _indexed_job_task(environ, coordinator)
    if "SLURM_PROCID" in environ:
        return _slurm_task(environ, coordinator)
    raise UsageError(
        "this is neither a Slurm task (SLURM_PROCID is not set; start it with srun, or with sbatch launch/slurm.sbatch)"
        " nor a pod of an Indexed Job (JOB_COMPLETION_INDEX is not set); on one machine use launch/local.sh"
    )


def _slurm_task(environ: Mapping[str, str], coordinator: Optional[str]) -> Task:
    in_step = "SLURM_STEP_TASKS_PER_NODE" in environ
    layout = "SLURM_STEP_TASKS_PER_NODE" if in_step else "SLURM_TASKS_PER_NODE"
    counts = tasks_per_node(_text(environ, layout), layout)
    if not in_step:  # the batch script, which only checks: it is told how many tasks there is room for on each node
        counts = [_number(environ, "SLURM_NTASKS", sum(counts), least=1)]
    rank, host, local_rank = (_number(environ, f"SLURM_{name}") for name in ("PROCID", "NODEID", "LOCALID"))
    total = _number(environ, "SLURM_NTASKS", sum(counts))
    if total != sum(counts) or rank >= total or host >= len(counts) or local_rank >= counts[host]:
        raise UsageError(
            f"Slurm's variables contradict one another: task SLURM_PROCID={rank} of SLURM_NTASKS={total},"
            f" SLURM_LOCALID={local_rank} on node SLURM_NODEID={host}, but {layout}={environ[layout]};"
            " were they set by an outer step?"
        )
    number, step_number = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID", 0)
    return Task(
        job=f"step {step_number} of Slurm's job {number}, with {environ[layout]} tasks a node",
        index=rank,
        tasks=total,
        host=host,
        ranks_on_host=counts,
        ranks=[(rank, local_rank)],
        coordinator=coordinator or first_host(_text(environ, f"SLURM_{'STEP' if in_step else 'JOB'}_NODELIST")),
        # Below the ports that the kernel gives to clients. Two jobs on one node have other ids, and so another port.
        port=_number(environ, "JOB_COORDINATOR_PORT", 20000 + (10 * number + step_number) % 10000, least=1),
    )


def _indexed_job_task(environ: Mapping[str, str], coordinator: Optional[str]) -> Task:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    hosts, each = _number(environ, "JOB_HOSTS", least=1), _number(environ, "JOB_RANKS_PER_HOST", 1, least=1)
    if index >= hosts:
        raise UsageError(
            f"JOB_COMPLETION_INDEX={index} does not fit JOB_HOSTS={hosts}; the Job's completions, parallelism and"
            " JOB_HOSTS must be the same number"
        )
    if not coordinator:
        raise UsageError(
            "JOB_COORDINATOR is not set: the DNS name of pod 0, such as train-0.train for Job train and Service train"
        )
    return Task(
        job=f"an Indexed Job of {hosts} hosts with {each} ranks each",
        index=index,
        tasks=hosts,
        host=index,
        ranks_on_host=[each] * hosts,
        ranks=[(index * each + local_rank, local_rank) for local_rank in range(each)],
        coordinator=coordinator,
        port=_number(environ, "JOB_COORDINATOR_PORT", PORT, least=1),
    )


def tasks_per_node(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Slurm's short form, spelled out: ``2(x3),1`` is ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:\(x([1-9]\d*)\))?", part)
        if not match:
            raise UsageError(f"{name}={text}: {part!r} is not of Slurm's form N or N(xNODES)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first of the hosts that Slurm's short form names: ``n[07-10,12],m3`` begins with ``n07``."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodelist)
    if not match:
        raise UsageError(f"cannot read the node list {nodelist!r}; name the host of task 0 with --coordinator HOST")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match[0])


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UsageError(f"{name} is not set, though the variables beside it are; --help tells which are needed")
    return environ[name]


def _number(environ: Mapping[str, str], name: str, default: Optional[int] = None, least: int = 0) -> int:
    text = environ.get(name) or (_text(environ, name) if default is None else str(default))
    if not re.fullmatch(r"\d{1,10}", text) or int(text) < least:
        raise UsageError(f"{name}={text} is not a number, {least} or more")
    return int(text)


# --- what Horovod wants to be told -----------------------------------------------------------------------------------


def slot(ranks_on_host: Sequence[int], host: int, rank: int, local_rank: int) -> SlotInfo:
    """A rank's place: among all, among those of its host, and among those of its local rank on all hosts (cross)."""
    alike = [other for other, ranks in enumerate(ranks_on_host) if ranks > local_rank]
    place = [rank, local_rank, alike.index(host), sum(ranks_on_host), ranks_on_host[host], len(alike)]
    return SlotInfo(f"host-{host}", *place)  # a name that is the same wherever the host is looked at from


def rank_environment(task: Task, rank: int, local_rank: int) -> dict[str, str]:
    """What a rank must be told before it meets the others."""
    variables: dict[str, str] = create_slot_env_vars(slot(task.ranks_on_host, task.host, rank, local_rank))
    if "SLURM_CPUS_PER_TASK" in os.environ:  # Slurm has shared out the cores already
        own = os.environ.get("MXNET_CPU_WORKER_NTHREADS") or os.environ["SLURM_CPUS_PER_TASK"]
        variables["MXNET_CPU_WORKER_NTHREADS"] = own
    return variables


def meeting_environment(address: str, port: int) -> dict[str, str]:
    """How a rank meets the others, in the words of ``horovodrun --gloo``. The user's choice of interfaces stands."""
    interface = os.environ.get("HOROVOD_GLOO_IFACE") or interface_towards(address)
    variables = create_run_env_vars(address, [interface], port)
    variables["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME") or interface
    return {name: str(value) for name, value in variables.items()}


def interface_towards(address: str) -> str:
    """The network interface of this host by which ``address`` is reached, and the other hosts with it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
    own = "127.0.0.1" if own.startswith("127.") else own
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == own for found in addresses):
            return name
    raise JobError(f"no network interface has the address {own}; name the one to use with HOROVOD_GLOO_IFACE")


# --- all tasks come together -----------------------------------------------------------------------------------------


class Meeting(RendezvousHTTPServer):
    """Horovod's rendezvous server, to which every task reports before it starts its ranks.

    It serves one attempt. Once all tasks are there, nobody else is let in: a task that was restarted, while the attempt
    that it has left is still ending, has to wait for the meeting of the next attempt, and cannot disturb this one.
    """

    daemon_threads = True  # nobody waits for an answer when the ranks have ended

    def __init__(self, task: Task) -> None:
        try:
            super().__init__(("", task.port), _Desk, verbose=0)
        except OSError as error:
            raise JobError(
                f"port {task.port} of this host cannot be opened: {error.strerror}; give all tasks another one with"
                " JOB_COORDINATOR_PORT"
            ) from None
        hosts = enumerate(task.ranks_on_host)
        self.init([slot(task.ranks_on_host, host, 0, local) for host, ranks in hosts for local in range(ranks)])
        self._task = task
        self._reported: dict[int, str] = {}  # by index, the process that did
        self._address = ""
        self._lock = threading.Lock()

    def report(self, job: str, index: int, host: int, process: str, address: str) -> tuple[int, str]:
        """Take a task's report. Returns a status of HTTP, and the rendezvous address or what the task has to wait for.

        Args:
            job: what the task takes the job for; see :class:`Task`.
            index: of the task.
            host: of the task.
            process: an identity that no other process has. Reports may be repeated.
            address: by which the task has reached this host.
        """
        with self._lock:
            if job != self._task.job:
                return 403, self._task.job
            if len(self._reported) == self._task.tasks:
                if self._reported.get(index) != process:
                    return 409, "it is still ending an earlier attempt"
                return 200, self._address
            self._reported[index] = process  # in place of one that has died waiting
            if host != 0 or not self._address:
                self._address = address  # the one that is good for other hosts, if there are any
            missing = [str(other) for other in range(self._task.tasks) if other not in self._reported]
            if missing:
                return 202, f"it waits for task{'s' * (len(missing) > 1)} {', '.join(missing)}"
            return 200, self._address


class _Desk(RendezvousHandler):
    """Horovod's requests are GET, PUT and DELETE; a report is a POST."""

    server: Meeting

    def do_POST(self) -> None:
        try:
            report = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 4096)))
            status, text = self.server.report(**report, address=self.connection.getsockname()[0])
        except (TypeError, ValueError):
            status, text = 400, "not the report of a task"
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def open_meeting(task: Task) -> Iterator[None]:
    """Hold the meeting, if this task is the one that does, until its ranks have ended."""
    if task.index != 0:
        yield
        return
    with Meeting(task) as meeting:
        threading.Thread(target=meeting.serve_forever, name="meeting", daemon=True).start()
        yield
        meeting.shutdown()


def meet(task: Task, limit_seconds: float) -> str:
    """Report to the coordinator until all tasks have. Returns its address, by which the ranks find one another.

    A name that is not known, or a server that is not there, may be so in a moment: pods start in any order.

    Raises:
        JobError: not all tasks were there in time. The message says which, or why the coordinator is not reached.
        UsageError: it is the coordinator of another job.
    """
    host = "127.0.0.1" if task.index == 0 else task.coordinator
    where = f"{task.coordinator}:{task.port}"
    report = {"job": task.job, "index": task.index, "host": task.host, "process": secrets.token_hex(8)}
    started = told = time.monotonic()
    while True:
        status, text = _ask(host, task.port, report)
        if status == 200:
            return text
        if status == 403:
            raise UsageError(f"task {task.index} belongs to {task.job}, but the coordinator {where} serves {text}")
        waited = time.monotonic() - started
        if waited > limit_seconds:
            raise JobError(
                f"task {task.index} of {task.tasks} has waited {limit_seconds:g} s for all tasks to be there, and gives"
                f" up; the coordinator is {where}: {text}"
            )
        if time.monotonic() > told + NEWS_SECONDS:
            told = time.monotonic()
            print(f"task {task.index} waits for the coordinator {where}: {text} ({waited:.0f} s)", flush=True)
        time.sleep(POLL_SECONDS)


def _ask(host: str, port: int, report: Mapping[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("POST", "/task", json.dumps(report))
        answer = connection.getresponse()
        return answer.status, answer.read(1000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error) or type(error).__name__
    finally:
        connection.close()


# --- the ranks of this task ------------------------------------------------------------------------------------------


class Ranks:
    """The processes of this task's ranks, and the signals that are passed on to them."""

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._passed_on: set[int] = set()
        self._asked = 0.0  # when the first signal came
        self._last_moment = float("inf")  # for ranks that are asked again and do not end
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def start(self, rank: int, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start a rank, with ``variables`` added to the environment."""
        self._processes[rank] = subprocess.Popen(command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL)

    def wait(self) -> int:
        """Wait until all have ended, and return the exit code of the whole.

        The first that fails has the others ended, which would wait for it. Where one has ended well, or was preempted,
        the others are about to: they get a minute.
        """
        code, deadline = 0, float("inf")
        running = dict(self._processes)
        while running:
            ended = [rank for rank, process in running.items() if process.poll() is not None]
            for rank in sorted(
                ended, key=lambda rank: running[rank].returncode
            ):  # the killed, which are a cause, first
                process = running.pop(rank)
                if code in (0, Preempted.exit_code) and process.returncode != 0:
                    code = self._code_of(rank, process.returncode)
                    if code != Preempted.exit_code:
                        _signal_all(running.values(), signal.SIGTERM)
                        deadline = time.monotonic() + END_SECONDS
                deadline = min(deadline, time.monotonic() + LEAVE_SECONDS)
            if running and time.monotonic() > min(deadline, self._last_moment):
                for rank in running:
                    print(f"error: rank {rank}: does not end by itself and is killed", file=sys.stderr, flush=True)
                _signal_all(running.values(), signal.SIGKILL)
                deadline = self._last_moment = float("inf")
            time.sleep(POLL_SECONDS / 2)
        return code

    def _code_of(self, rank: int, returncode: int) -> int:
        if returncode > 0:
            return returncode
        name = signal.Signals(-returncode).name
        print(f"error: rank {rank}: ended by {name}", file=sys.stderr, flush=True)
        return 128 - returncode if -returncode in self._passed_on else 1

    def _pass_on(self, number: int, frame: object) -> None:
        if not self._processes:
            sys.exit(128 + number)  # before there is anything to save
        self._passed_on.add(number)
        if not self._asked:
            self._asked = time.monotonic()
        elif time.monotonic() > self._asked + ECHO_SECONDS:
            self._last_moment = min(self._last_moment, time.monotonic() + END_SECONDS)
        _signal_all(self._processes.values(), number)


def _signal_all(processes: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing to one that has ended


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Check, meet the other tasks, run the ranks. Returns the exit code."""
    options, arguments = _parse(arguments)
    task = read_task(os.environ, options.coordinator)
    limit_seconds = _number(os.environ, "JOB_START_TIMEOUT_SECONDS", START_SECONDS, least=1)
    train = [sys.executable, str(ROOT / "job" / "train.py"), *with_auto_resume(arguments)]
    variables = {rank: rank_environment(task, rank, local_rank) for rank, local_rank in task.ranks}
    if options.dry_run:
        _show(task, train, variables)
        return 0

    ranks = Ranks()
    checked = subprocess.run(
        [*train, "--check"],
        env={**os.environ, **variables[task.ranks[0][0]], "HOROVOD_CONTROLLER": "gloo"},
        stdout=None if options.check else subprocess.DEVNULL,
    ).returncode
    if checked or options.check:
        return checked if checked >= 0 else 1
    with open_meeting(task):
        address = meet(task, limit_seconds)
        together = meeting_environment(address, task.port)
        for rank, own in variables.items():
            ranks.start(rank, train, {**own, **together})
        return ranks.wait()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows the usage")

    def format_help(self) -> str:
        return HELP


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_known_args(arguments)


def _show(task: Task, command: Sequence[str], variables: Mapping[int, Mapping[str, str]]) -> None:
    print(f"# task {task.index} of {task.tasks}: {task.job}; the coordinator is {task.coordinator}:{task.port}")
    for own in variables.values():
        print(shlex.join([*(f"{name}={value}" for name, value in own.items()), *command]))
    print("# and how they meet, once the coordinator has answered: HOROVOD_GLOO_RENDEZVOUS_ADDR, ..._PORT, ..._IFACE")


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
