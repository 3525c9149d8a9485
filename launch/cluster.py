"""Run by launch/cluster.sh, for a person: several machines over ssh. ``launch/cluster.sh --help`` says how.
launch/slurm.sbatch runs it too, for a job that goes on when a node is lost: then agents are started by srun.

Horovod's rendezvous server and its allocation of ranks are used as ``horovodrun`` uses them, but the ranks are started
by an agent on each host (launch/hosts/agent.py): ``horovodrun`` puts the environment on the remote command line, where
everybody can read it, switches the checking of host keys off, cannot pass a signal on to a remote rank (so a remote job
could not be preempted), makes 1 of every exit code, and opens a connection a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import yaml
from horovod.runner.common.util.hosts import HostInfo, SlotInfo, get_host_assignments
from horovod.runner.gloo_run import create_slot_env_vars
from horovod.runner.http.http_server import RendezvousServer
from horovod.runner.util.network import get_local_host_addresses
from rich.console import Console

from job import command
from job.config import Config
from job.errors import JobError, UsageError
from launch.elastic.supervisor import Supervisor, plan
from launch.hosts import checks, hostfile
from launch.hosts.ground import HostGround
from launch.hosts.hostfile import Host
from launch.hosts.roster import Roster, discover
from launch.hosts.srun import Srun
from launch.hosts.ssh import Reach, Ssh
from launch.hosts.supervise import SILENCE_SECONDS, Job, Site
from launch.shared.arguments import with_auto_resume

# What a rank may get from the environment of the launcher. Everything else stays here, and secrets with it.
_ALLOWED = re.compile(
    "|".join(
        line
        for line in (ROOT / "launch" / "shared" / "variables").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
)

_GPUS = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")  # where -x names them, they hold on the hosts too
_ELASTIC_SILENCE_SECONDS = 10.0  # for an agent to take the launcher for dead, where others go on without that host
_RESOLVE_SECONDS = 5.0  # for all names together

_DESCRIPTION = """Train on several machines, over ssh.

  launch/cluster.sh hosts                                          the default run, on all hosts
  launch/cluster.sh hosts --config configs/smoke.yaml run.dir=/shared/runs/first
  launch/cluster.sh -p 2222 -np 8 hosts train.epochs=10            eight ranks; the first hosts are filled first
  launch/cluster.sh --min-np 2 hosts                               goes on when a rank or a host dies

HOSTFILE is a file with one host on each line: `host`, `host slots=N` or `host:N`. N is the number of ranks there.
Without N a host gets --slots-per-host ranks, or one for each GPU, or one. `#` begins a comment.

Rank 0 runs on the first host. Only rank 0 reads and writes run.dir. So keep run.dir on a file system that all hosts
share, or do not change the first host.
"""
_EPILOG = """Every host needs this checkout and its .venv at the same path, and the folder that you start from. All
hosts are checked before any rank starts. A host that lacks something, or has another commit or other packages, is
named. Your own ssh settings decide which host keys are trusted. `ssh HOST true` must work without asking anything.

The ranks get these variables of your environment: HOROVOD_*, MXNET_*, NCCL_*, GLOO_*, OMP_*, KMP_*, OMPI_MCA_*, LANG,
LC_*, TZ, those of proxies, and those that you name with -x. They get no others. The variables travel inside the ssh
connection, and no command line shows them.

To continue a run that was stopped, give the same command again: it adds run.resume=auto, unless your arguments have
run.resume or run.overwrite. SIGTERM, SIGUSR1 or Ctrl-C stops all ranks after their step, with a checkpoint. A second
signal ends them at once. If a rank, a host, a link or this launcher dies, everything else ends too.

With --min-np N the job goes on instead, with as many ranks as there are places then, and ends with the same bits
(docs/elastic.md). Hosts may join: HOSTFILE is read again and again, or SCRIPT is run. A host that is not fit is left
out. A host leaves when the list is without it, or at SIGTERM to launch/hosts/agent.py there. run.dir must be on a file
system that all hosts share; if it is not, the job ends when the host of rank 0 is lost.

exit codes: 0 done; 1 failed, or a host is not fit; 2 bad configuration or usage, nothing was started; 75 preempted, a
checkpoint is written; 130 or 143 stopped by a signal, without a checkpoint
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help shows the usage")


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line. ``arguments`` of the result are for train.py.

    Raises:
        UsageError: it is not usable.
    """
    options = _parser().parse_args(arguments)
    _require_variables(options.forward)
    _require_file("-i", options.ssh_identity_file)
    _require_file("--discover", options.discover)
    _require_consistent(options)
    if options.srun and "SLURM_JOB_ID" not in os.environ:
        raise UsageError("--srun is for use within a Slurm job: SLURM_JOB_ID is not set")
    options.arguments = with_auto_resume(options.arguments)
    return options


def _require_consistent(options: argparse.Namespace) -> None:
    if not options.min_np and (options.max_np or options.discover):
        raise UsageError("--max-np and --discover are for jobs that go on when ranks die: give --min-np N too")
    if options.max_np and options.np:
        raise UsageError("-np and --max-np say the same with --min-np: give one of them")
    if options.min_np and options.min_np > (options.max_np or options.np or options.min_np):
        raise UsageError(f"--min-np {options.min_np} is more than there may be ranks, {options.max_np or options.np}")


def _require_variables(names: Iterable[str]) -> None:
    for name in names:
        if name not in os.environ:
            raise UsageError(f"-x {name}: there is no such variable in the environment")


def _require_file(option: str, file: Optional[Path]) -> None:
    if file and not file.is_file():
        raise UsageError(f"{option} {file}: there is no such file")


def _parser() -> _Parser:
    """All options, in the order of ``--help``."""
    parser = _Parser(
        prog="launch/cluster.sh",
        usage="launch/cluster.sh [options] HOSTFILE [arguments of job/train.py]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("hostfile", type=Path, metavar="HOSTFILE", help="see above")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="`python job/train.py --help` lists them")

    add("-np", type=_positive, metavar="N", help="ranks (default: all slots of all hosts)")
    add("--slots-per-host", type=_positive, metavar="N", help="slots of a host that is listed without a number of them")
    add("--check", action="store_true", help="check the configuration and all hosts, print the table, start nothing")
    add("--dry-run", action="store_true", help="print the commands, contact no host")

    add = parser.add_argument_group("a job that goes on when ranks or hosts die, and that hosts may join").add_argument
    add("--min-np", type=_positive, metavar="N", help="go on as long as N ranks can")
    add(
        "--max-np", type=_positive, metavar="M", help="ranks at most (default: -np, or all slots, at least data.shards)"
    )
    add(
        "--discover",
        type=Path,
        metavar="SCRIPT",
        help="a program that prints the hosts, in the forms of HOSTFILE; it is run again and again, and HOSTFILE only"
        " says where to begin",
    )

    add = parser.add_argument_group("how hosts are reached").add_argument
    add("--srun", action="store_true", help="by Slurm's srun: the hosts are nodes of the Slurm job that this runs in")
    add("-p", "--ssh-port", type=_positive, metavar="PORT", help="port of sshd on all hosts")
    add("-i", "--ssh-identity-file", type=Path, metavar="FILE", help="private key for the login")
    add(
        "--pin-host-keys",
        type=Path,
        metavar="FILE",
        help="trust only the host keys in FILE; add the key of a new host; refuse a key that has changed",
    )

    add = parser.add_argument_group("how ranks reach one another, and what they get").add_argument
    add(
        "--network-interface",
        type=_names,
        default=_names(os.environ.get("HOROVOD_GLOO_IFACE", "")),
        metavar="NAME,...",
        help="network interface for the ranks: the first of these that a host has (default: HOROVOD_GLOO_IFACE, or the"
        " interface that ssh uses)",
    )
    add("--launcher-address", metavar="ADDRESS", help="address of this machine, if the hosts see it by another one")
    add("-x", dest="forward", action="append", default=[], metavar="NAME", help="give this variable to the ranks too")

    add = parser.add_argument_group("time limits").add_argument
    add("--check-timeout", type=_positive, default=150, metavar="S", help="seconds to check a host (default: 150)")
    add(
        "--stop-timeout",
        type=_positive,
        default=60,
        metavar="S",
        help="seconds for the last step and its checkpoint when you stop the job (default: 60)",
    )
    return parser


# --- what every rank gets --------------------------------------------------------------------------------------------


def environment(forward: Iterable[str], variables: Mapping[str, str]) -> dict[str, str]:
    """What the ranks get: of ``variables`` what is allowed and what ``forward`` names."""
    named = set(forward)
    return {name: value for name, value in variables.items() if name in named or _ALLOWED.fullmatch(name)}


def allocate(hosts: Sequence[Host], ranks: Optional[int], gpus: Mapping[str, int]) -> dict[str, list[SlotInfo]]:
    """Horovod's placement of each rank, by host; hosts that ``ranks`` leaves without one are not in it.

    Raises:
        UsageError: the hosts have not slots enough.
    """
    infos = [HostInfo(host.name, host.slots or gpus.get(host.name) or 1) for host in hosts]
    slots = sum(info.slots for info in infos)
    if ranks and ranks > slots:
        raise UsageError(
            f"-np {ranks}: the hosts have {slots} slots; raise slots=N in the hostfile, or start fewer ranks"
        )
    placed: dict[str, list[SlotInfo]] = {}
    for slot in get_host_assignments(infos, ranks or slots, ranks or slots):
        placed.setdefault(slot.hostname, []).append(slot)
    return placed


def sites(
    options: argparse.Namespace,
    reach: Reach,
    local: set[str],
    placed: Mapping[str, list[SlotInfo]],
    network: Mapping[str, Mapping[str, str]],
) -> list[Site]:
    """What is started on each host, and what it is sent; ``network`` holds the variables that differ between hosts."""
    passed = environment(options.forward, os.environ)
    return [
        Site(
            host,
            start_of_agent(host, reach, local),
            {
                "directory": os.getcwd(),
                "command": [sys.executable, str(ROOT / "job" / "train.py"), *options.arguments],
                "environment": {**passed, **network.get(host, {})},
                "ranks": [create_slot_env_vars(slot) for slot in slots],
                "silence_seconds": SILENCE_SECONDS,
                "grace_seconds": options.stop_timeout,
            },
        )
        for host, slots in placed.items()
    ]


def start_of_agent(host: str, reach: Reach, local: Container[str]) -> list[str]:
    """The words that start the agent of a host, from here."""
    agent = [sys.executable, str(ROOT / "launch" / "hosts" / "agent.py")]
    return [*as_after_login(), *agent] if host in local else reach.command(host, agent)


def as_after_login() -> list[str]:
    """What makes a command here see as little of our environment as one that ssh starts elsewhere."""
    names = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "TMPDIR")
    return ["env", "-i", *(f"{name}={os.environ[name]}" for name in names if name in os.environ)]


def listed(options: argparse.Namespace, discovered: bool = False) -> list[Host]:
    """The hosts of HOSTFILE, or those that SCRIPT has ``discovered``, if there is one.

    Raises:
        UsageError: they cannot be read.
    """
    hosts = discover(options.discover) if discovered and options.discover else hostfile.read(options.hostfile)
    return [host._replace(slots=host.slots or options.slots_per_host) for host in hosts]


def _open(hosts: Iterable[Host]) -> bool:
    """Whether the number of slots is known only when the hosts have said how many GPUs they have."""
    return any(host.slots is None for host in hosts)


# --- before anything is contacted ------------------------------------------------------------------------------------


def resolve_config(arguments: Sequence[str], ranks: int, first_is_local: bool) -> dict[str, Any]:
    """The configuration as train.py resolves it. Folder and GPU are looked at here only if rank 0 is to run here.

    A configuration that is not usable ends this process, with the message and the exit code of train.py.
    """
    rank = "0" if first_is_local else "1"
    announced = {"HOROVOD_SIZE": str(ranks), "HOROVOD_RANK": rank, "HOROVOD_LOCAL_RANK": rank}
    done = subprocess.run(
        [sys.executable, str(ROOT / "job" / "train.py"), "--check", *arguments],
        env={**os.environ, **announced},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode or "--help" in arguments or "-h" in arguments:
        print(done.stdout, end="")
        sys.exit(done.returncode if done.returncode >= 0 else 1)
    config: dict[str, Any] = yaml.safe_load(done.stdout)
    return config


def own_hosts(options: argparse.Namespace, hosts: Iterable[Host]) -> set[str]:
    """Those that are this machine, and need no ssh. Slurm is to see what runs on its nodes, on this one too."""
    if options.srun:
        return set()
    own = own_addresses()
    found: dict[str, str] = {}  # what is not known in time, because a name server is away, ssh has to find out
    threads = [threading.Thread(target=_resolve, args=(host.name, found), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _RESOLVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return {name for name, address in found.copy().items() if address in own or address.startswith("127.")}


def own_addresses() -> set[str]:
    """All IPv4 addresses of this machine."""
    return set(get_local_host_addresses())


def _resolve(name: str, found: dict[str, str]) -> None:
    with contextlib.suppress(OSError, UnicodeError):  # ssh may know it by that name all the same
        found[name] = socket.gethostbyname(name)


def print_commands(of: Sequence[Site], forward: Iterable[str]) -> None:
    """What would be run, for ``--dry-run``: values of variables are shown only where they are no secrets."""
    hidden = set(forward)
    for site in of:
        print(f"# {site.host}: rank{'s' * (len(site.ranks) > 1)} {', '.join(map(str, site.ranks))}")
        print(shlex.join(site.command))
    plan = of[0].plan
    print("# which starts each rank, in", plan["directory"])
    settings = [f"{k}={'(not shown)' if k in hidden else shlex.quote(v)}" for k, v in plan["environment"].items()]
    print(" ".join(["env", *settings, shlex.join(plan["command"])] if settings else [shlex.join(plan["command"])]))
    print("# with HOROVOD_RANK, _SIZE, _LOCAL_* and _CROSS_* of the rank, and, once the hosts are checked,")
    print("# HOROVOD_GLOO_IFACE and HOROVOD_GLOO_RENDEZVOUS_ADDR and _PORT")


# --- the run ---------------------------------------------------------------------------------------------------------


def check_hosts(
    options: argparse.Namespace, reach: Reach, hosts: Sequence[Host], local: set[str], config: Mapping[str, Any]
) -> list[checks.Answer]:
    """Ask the hosts that get ranks, and print what they say.

    Raises:
        JobError: a host is not fit; all that is wrong is told.
    """
    asked = hosts if _open(hosts) else [host for host in hosts if host.name in allocate(hosts, options.np, {})]
    with Console(stderr=True).status(f"asking {len(asked)} hosts"):
        answers, problems = examine(options, reach, asked, local, config)
    gpus = {answer.host: answer.gpus for answer in answers}
    placed = {host: len(slots) for host, slots in allocate(hosts, options.np, gpus).items()}
    show(options, answers, placed, problems)
    failures = [str(problem) for problem in problems if not problem.warning]
    if failures:
        raise JobError("not started:\n" + "\n".join(f"  {failure}" for failure in failures))
    return answers


def examine(
    options: argparse.Namespace,
    reach: Reach,
    asked: Sequence[Host],
    local: set[str],
    config: Mapping[str, Any],
    before: Sequence[checks.Answer] = (),
) -> tuple[list[checks.Answer], list[checks.Problem]]:
    """What the hosts say, and what is wrong with them, beside those that have answered ``before``."""
    run_dir = Path(os.getcwd(), config["run"]["dir"])
    counted = {name: os.environ[name] for name in _GPUS if name in options.forward}
    question = checks.Question(sys.executable, ROOT, Path(os.getcwd()), run_dir, options.arguments, counted)
    commands = {
        host.name: [*as_after_login(), *checks.SHELL]
        if host.name in local
        else reach.command(host.name, checks.SHELL, first_contact=True)
        for host in asked
    }
    ranks = {host.name: host.slots for host in asked}
    answers = checks.ask_all(commands, question, options.check_timeout, reach.remedy, ranks)
    together = [*before, *answers]
    checks.place(together, local)
    problems = checks.judge(together, ROOT)
    problems += checks.judge_network(together, options.network_interface, own_addresses(), options.launcher_address)
    known = {answer.host for answer in before}
    # What the others said of the checkpoints in run.dir is old: that a host sees those, its agent says.
    stale = {"run.dir"} if known else {""}
    return answers, [problem for problem in problems if problem.host not in known and problem.field not in stale]


def show(
    options: argparse.Namespace,
    answers: Sequence[checks.Answer],
    placed: Mapping[str, int],
    problems: Sequence[checks.Problem],
) -> None:
    """Print the table of hosts, and the warnings."""
    chosen = checks.interfaces(answers, options.network_interface)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(checks.table(answers, placed, chosen, problems))
    for problem in problems:
        if problem.warning:
            print(f"warning: {problem}", flush=True)


def start_rendezvous(placed: Mapping[str, list[SlotInfo]]) -> int:
    """Start the server by which the ranks find one another. Returns its port."""
    server = RendezvousServer()
    port: int = server.start()
    server.init([slot for slots in placed.values() for slot in slots])
    return port


def network_variables(
    answers: Sequence[checks.Answer], options: argparse.Namespace, port: int
) -> dict[str, dict[str, str]]:
    """By host: how its ranks find the rendezvous server and one another. Interfaces may have a name on each host."""
    chosen = checks.interfaces(answers, options.network_interface)
    return {
        answer.host: {
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": options.launcher_address or answer.launcher,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
            "HOROVOD_GLOO_IFACE": chosen[answer.host],
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", chosen[answer.host]),
        }
        for answer in answers
    }


def reached_by(options: argparse.Namespace) -> Reach:
    """How hosts are reached."""
    if options.srun:
        return Srun(os.environ["SLURM_JOB_ID"])
    pinned = options.pin_host_keys and options.pin_host_keys.absolute()
    return Ssh(options.ssh_port, options.ssh_identity_file, pinned)


def _require_tool(options: argparse.Namespace, hosts: Sequence[Host], local: set[str]) -> None:
    if options.srun and not shutil.which("srun"):
        raise JobError("there is no srun on PATH, by which hosts are to be reached")
    if not options.srun and not shutil.which("ssh") and {host.name for host in hosts} - local:
        raise JobError("there is no ssh on PATH, by which hosts are reached: apt-get install openssh-client")


def launch_elastic(options: argparse.Namespace, hosts: Sequence[Host]) -> int:
    """The same, for a job that goes on when ranks or hosts die, and that hosts may join."""
    local, reach = own_hosts(options, hosts), reached_by(options)
    slots = sum(host.slots or 1 for host in hosts)
    most = options.max_np or options.np
    values = resolve_config(options.arguments, most or slots, hosts[0].name in local)
    config = Config.model_validate(values)
    most = most or max(slots, config.data.shards)
    begin, lasting = plan(options.arguments, config, most)
    train = [sys.executable, str(ROOT / "job" / "train.py"), *lasting]
    passed = environment(options.forward, os.environ)
    if options.dry_run:
        print_commands(sites(options, reach, local, allocate(hosts, None, {}), {}), options.forward)
        return 0
    _require_tool(options, hosts, local)

    def site(answer: checks.Answer) -> Site:
        settings = {
            "stay": True, "directory": os.getcwd(), "run_dir": str(config.run.dir), "command": [], "environment": {},
            "ranks": [], "silence_seconds": _ELASTIC_SILENCE_SECONDS, "grace_seconds": options.stop_timeout,
            "orphaned": reach.orphaned,
        }  # fmt: skip
        return Site(answer.host, start_of_agent(answer.host, reach, local), settings)

    def take_in(asked: Sequence[Host], before: Sequence[checks.Answer]) -> checks.Found:
        local.update(own_hosts(options, asked))
        return examine(options, reach, asked, local, values, before)

    def network(answers: Sequence[checks.Answer], port: int) -> dict[str, dict[str, str]]:
        checks.place(answers, local)
        return network_variables(answers, options, port)

    roster = Roster(lambda: listed(options, discovered=True), take_in, hosts, _say, config.elastic.cooldown_seconds)
    with Console(stderr=True).status(f"asking {len(hosts)} hosts"):
        answers, problems = roster.take_in(hosts)
    show(options, answers, {name: roster.slots(name) for name in roster.fit()}, problems)
    if options.check or not roster.fit():
        return 0 if roster.fit() else 1
    roster.keep()
    ground = HostGround(roster, site, network, {"command": train, "environment": passed}, _say)
    return Supervisor(ground, begin, config, options.min_np, most).run()


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"launch/cluster.sh: {message}", file=sys.stderr, flush=True)


def launch(options: argparse.Namespace) -> int:
    """Check the configuration, then the hosts, then run the job. Returns the exit code."""
    hosts = listed(options)
    if options.min_np:
        return launch_elastic(options, hosts)
    placed = allocate(hosts, None if _open(hosts) else options.np, {})
    local = own_hosts(options, hosts)
    ranks = options.np or sum(map(len, placed.values()))
    config = resolve_config(options.arguments, ranks, hosts[0].name in local)
    reach = reached_by(options)
    if options.dry_run:
        print_commands(sites(options, reach, local, placed, {}), options.forward)
        return 0
    _require_tool(options, hosts, local)
    answers = check_hosts(options, reach, hosts, local, config)
    if options.check:
        return 0
    placed = allocate(hosts, options.np, {answer.host: answer.gpus for answer in answers})
    network = network_variables(answers, options, start_rendezvous(placed))
    return Job(sites(options, reach, local, placed, network), options.stop_timeout).run()


if __name__ == "__main__":
    # It ends at once: threads that wait for dead hosts are left behind.
    command.run(lambda: launch(parse()), label="launch/cluster.sh")
