"""Imported by launch/cluster.py: before any rank starts, is each host there, alike, and fit for the run?

What a host is, its own doctor says (job/doctor.py). Here the hosts are asked side by side, each within a bound, their
answers are compared, and whatever would end the run later becomes a :class:`Problem` now.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

from rich.table import Table

from job.fitness.checks import unlike_processors

_CLOCK_WARNING_SECONDS = 5.0
_NO_DIRECTORY, _NO_COMMAND = 90, (126, 127)

_FACTS = {"commit", "python", "packages", "processor", "free_disk_bytes", "data", "interfaces", "clock_unix_seconds"}

# It goes over standard input: a login shell that is csh takes no newline in a quoted word, and `!` for history.
#
# What the doctor cannot know: by which addresses this host and the launcher see each other (sshd sets SSH_CONNECTION;
# Slurm tells half of it), how many ranks it takes by default, and whether it holds checkpoints of this run.
_SCRIPT = """
cd {directory} || exit {no_directory}
{settings}
echo "connection=${{SSH_CONNECTION:-$({connection})}}"
echo "gpus=$({gpus})"
echo "checkpoints=$(ls -d {checkpoints}/step-* 2>/dev/null | grep -c .)"
exec {doctor} </dev/null
"""
SHELL = ("sh", "-s")  # what is started on every host, to read the script
_NOTICE = re.compile(r"srun: error: \S+ task 0: Exited with exit code \d+")  # which is known


class Problem(NamedTuple):
    """What keeps a host from taking part, and what to do about it. A warning keeps nobody."""

    host: str
    field: str
    message: str
    remedy: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.host}: {self.field}: {self.message}; {self.remedy}"


class Question(NamedTuple):
    """What every host is asked.

    Args:
        python: the interpreter, by its path on every host.
        root: the checkout, by its path on every host.
        directory: where the ranks are to run.
        run_dir: the run's folder.
        arguments: those of train.py.
        settings: variables of the ranks by which a host counts its GPUs.
    """

    python: str
    root: Path
    directory: Path
    run_dir: Path
    arguments: Sequence[str]
    settings: Mapping[str, str] = {}

    def script(self, ranks: Optional[int]) -> str:
        """What a shell runs on a host that is to have so many ranks; None for what the doctor expects by itself."""
        expected = ["-np", str(ranks)] if ranks else []
        doctor = [self.python, str(self.root / "job" / "doctor.py"), "--json", *expected, *self.arguments]
        return _SCRIPT.format(
            directory=shlex.quote(str(self.directory)),
            no_directory=_NO_DIRECTORY,
            settings="\n".join(f"export {name}={shlex.quote(value)}" for name, value in self.settings.items()),
            connection=shlex.join([self.python, "-I", str(self.root / "launch" / "hosts" / "srun.py")]),
            checkpoints=shlex.quote(str(self.run_dir / "checkpoints")),
            gpus=shlex.join([self.python, "-I", str(self.root / "job" / "distributed" / "gpus.py")]),
            doctor=shlex.join(doctor),
        )


@dataclass
class Answer:
    """What one host said. Without ``facts`` it said nothing that could be understood, and ``problem`` tells why."""

    host: str
    problem: Optional[Problem] = None
    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, str]] = field(default_factory=list)
    address: str = ""  # by which the launcher reaches the host
    launcher: str = ""  # the launcher's address, as the host sees it
    gpus: int = 0
    checkpoints: int = 0
    clock_ahead_seconds: float = 0.0  # at least; 0 if it may be right

    @property
    def started(self) -> str:
        """Another one after each start of the host; empty if it is not known."""
        return str(self.facts.get("started", ""))


Remedy = Callable[[str, str], str]  # for a host that was not reached, and what was written of it
Found = tuple[list[Answer], list[Problem]]  # what hosts have said, and what is wrong with them


def ask_all(
    commands: Mapping[str, Sequence[str]],
    question: Question,
    timeout: float,
    remedy: Remedy,
    ranks: Mapping[str, Optional[int]] = {},
) -> list[Answer]:
    """Ask all hosts at once, each by the command that starts a shell there, and with the ranks that it is to have.

    Takes little more than ``timeout`` seconds, whatever they do.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
        return list(
            pool.map(lambda host: ask(host, commands[host], question, timeout, remedy, ranks.get(host)), commands)
        )


def ask(
    host: str,
    command: Sequence[str],
    question: Question,
    timeout: float,
    remedy: Remedy,
    ranks: Optional[int] = None,
) -> Answer:
    """Run the question on one host and read what comes back."""
    began = time.time()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(question.script(ranks), timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        more = f"{remedy(host, '')}; or give it more time with --check-timeout"
        return Answer(host, Problem(host, "reachable", f"no answer within {timeout:g} s", more))
    errors = _NOTICE.sub("", errors)
    if process.returncode not in (0, _NO_DIRECTORY) and "connection=" not in output:
        last = _last(errors, process.returncode)
        return Answer(host, Problem(host, "reachable", last, remedy(host, errors)))
    answer = Answer(host, _failure(host, process.returncode, errors, question))
    if not answer.problem:
        _understand(answer, output, errors, question)
    if answer.facts:
        answer.clock_ahead_seconds = _ahead(float(answer.facts["clock_unix_seconds"]), began, time.time())
    return answer


def _failure(host: str, code: int, errors: str, question: Question) -> Optional[Problem]:
    if code == _NO_DIRECTORY:
        return Problem(
            host, "directory", f"{question.directory} is not there", "start from a directory that all hosts have"
        )
    if code in _NO_COMMAND:
        return Problem(host, "environment", _last(errors, code), f"run {question.root}/launch/setup.sh on {host}")
    return None


def _last(errors: str, code: int) -> str:
    return errors.strip().splitlines()[-1] if errors.strip() else f"exit code {code}"


def _understand(answer: Answer, output: str, errors: str, question: Question) -> None:
    """Take in the answer; a login script may have written something before it."""
    start = output.find("\n{") + 1
    for line in output[:start].splitlines():
        name, _, value = line.partition("=")
        if name == "connection" and len(value.split()) == 4:
            answer.launcher, _, answer.address, _ = value.split()
        elif name == "gpus":
            answer.gpus = int(value) if value.isdigit() else 0
        elif name == "checkpoints":
            answer.checkpoints = int(value or 0)
    try:
        said, _ = json.JSONDecoder().raw_decode(output[start:])
        if missing := _FACTS - said["facts"].keys():
            raise KeyError(*missing)
        answer.facts, answer.checks = said["facts"], said["checks"]
    except (ValueError, KeyError, TypeError, AttributeError):
        last = (errors or output).strip().splitlines()[-1:] or ["it said nothing"]
        answer.problem = Problem(
            answer.host,
            "doctor",
            last[0],
            f"bring {question.root} there to this commit, and see job/doctor.py --json on {answer.host}",
        )


def _ahead(clock: float, began: float, ended: float) -> float:
    """By how much a clock that was read between the two times is ahead of ours, at least; negative if it is behind."""
    return clock - ended if clock > ended else min(0.0, clock - began)


# --- what the answers mean -------------------------------------------------------------------------------------------


def judge(answers: Sequence[Answer], root: Path) -> list[Problem]:
    """All problems: of each host by itself, and of each host against the others."""
    there = [answer for answer in answers if not answer.problem]
    return [
        *(answer.problem for answer in answers if answer.problem),
        *_complaints(there),
        *_aliases(there),
        *_odd_commits(there, root),
        *_odd_packages(there, root),
        *_odd_processors(there),
        *_misplaced_checkpoints(answers),
        *_clocks(there),
    ]


def _complaints(answers: Sequence[Answer]) -> Iterator[Problem]:
    for answer in answers:
        writes = answer is answers[0]  # rank 0 runs there; the others never look at the run's folder
        for check in answer.checks:
            # Gloo, which connects the hosts, crashes where a host's own name has no address; elsewhere it may be so.
            wrong = check["status"] == "fail" or (check["status"] == "warn" and check["name"] == "hostname")
            if wrong and (writes or check["name"] not in ("disk", "run.dir")):
                yield Problem(answer.host, check["name"], check["message"], check["remedy"])


def _aliases(answers: Sequence[Answer]) -> Iterator[Problem]:
    """One machine by two names would give two ranks the same GPU, and each the cores of both."""
    first: dict[str, str] = {}
    for answer in answers:
        machine = answer.facts.get("machine")
        if machine and first.setdefault(machine, answer.host) != answer.host:
            message = f"is the same machine as {first[machine]}"
            yield Problem(answer.host, "host", message, "name it once in the hostfile, with slots=N")


def _odd_commits(answers: Sequence[Answer], root: Path) -> Iterator[Problem]:
    usual = _usual([answer.facts["commit"] for answer in answers])
    for answer in answers:
        commit = answer.facts["commit"]
        if commit != usual:
            yield Problem(
                answer.host,
                "commit",
                f"{_short(commit)}, where {_others(answers, 'commit', usual)} {_short(usual)}",
                f"bring {root} to one commit on all hosts",
            )
    if usual and usual.endswith("-dirty") and len(answers) > 1:
        message = f"{_short(usual)} with changes that are not committed, which may differ between the hosts"
        yield Problem("all hosts", "commit", message, "commit them to be sure", warning=True)


def _odd_packages(answers: Sequence[Answer], root: Path) -> Iterator[Problem]:
    names = sorted({name for answer in answers for name in _versions(answer)})
    for name in names:
        versions = [_versions(answer).get(name, "none") for answer in answers]
        usual = _usual(versions)
        for answer, version in zip(answers, versions):
            if version != usual:
                yield Problem(
                    answer.host,
                    "packages",
                    f"{name} {version}, where the others have {usual}",
                    f"run {root}/launch/setup.sh on {answer.host}",
                )


def _odd_processors(answers: Sequence[Answer]) -> Iterator[Problem]:
    for place, message in unlike_processors([answer.facts["processor"] for answer in answers]).items():
        remedy = "bits may depend on which host computes what: use one kind of machine for the same bits"
        yield Problem(answers[place].host, "processor", message, remedy, warning=True)


def _misplaced_checkpoints(answers: Sequence[Answer]) -> Iterator[Problem]:
    """Rank 0 alone reads and writes the run's folder: a run that was left on another host's disk would start anew."""
    first = answers[0]
    for answer in answers[1:]:
        if answer.checkpoints and not first.checkpoints and not first.problem:
            yield Problem(
                answer.host,
                "run.dir",
                f"holds checkpoints which {first.host}, where rank 0 runs, does not see",
                f"put run.dir on a file system that both see, name {answer.host} first, or give another run.dir",
            )


def _clocks(answers: Sequence[Answer]) -> Iterator[Problem]:
    for answer in answers:
        ahead = answer.clock_ahead_seconds
        if abs(ahead) > _CLOCK_WARNING_SECONDS:
            message = f"{abs(ahead):.0f} s or more {'ahead of' if ahead > 0 else 'behind'} this machine's"
            yield Problem(
                answer.host, "clock", message, "let a time service set it, or times in logs mislead", warning=True
            )


def _versions(answer: Answer) -> dict[str, str]:
    python = str(answer.facts["python"])
    return {**answer.facts["packages"], "Python": python}


def _usual(values: Sequence[Any]) -> Any:
    """The most frequent value; of equally frequent ones that of the first host."""
    return Counter(values).most_common(1)[0][0] if values else None


def _others(answers: Sequence[Answer], fact: str, usual: Any) -> str:
    hosts = [answer.host for answer in answers if answer.facts[fact] == usual]
    return f"{hosts[0]} has" if len(hosts) == 1 else f"{len(hosts)} others have"


def _short(commit: Optional[str]) -> str:
    if commit is None:
        return "unknown (no git there)"
    sha, dash, dirty = commit.partition("-")
    return sha[:10] + dash + dirty


# --- by which interface ----------------------------------------------------------------------------------------------


def place(answers: Sequence[Answer], local: set[str]) -> None:
    """Give the hosts that were asked without ssh the address by which the others see them, or saw them before."""
    seen = next((answer.launcher for answer in answers if answer.launcher and answer.host not in local), "")
    for answer in answers:
        if answer.host in local:
            answer.address = answer.launcher = seen or answer.launcher or "127.0.0.1"


def interfaces(answers: Sequence[Answer], wanted: Sequence[str]) -> dict[str, str]:
    """The interface of each host that answered: of the ``wanted`` ones the first that it has, else the one by which
    the launcher reaches it. Hosts that have none are left out.
    """
    chosen = {}
    for answer in answers:
        has: Mapping[str, Sequence[str]] = answer.facts.get("interfaces", {})
        fitting = [name for name in wanted if has.get(name)] if wanted else _carrying(has, answer.address)
        if fitting:
            chosen[answer.host] = fitting[0]
    return chosen


def judge_network(
    answers: Sequence[Answer], wanted: Sequence[str], own_addresses: set[str], launcher: Optional[str]
) -> Iterator[Problem]:
    """What is wrong with how hosts and launcher see each other; ``launcher`` is the address that the user gave."""
    chosen = interfaces(answers, wanted)
    for answer in answers:
        if answer.problem:
            continue
        if answer.host not in chosen:
            has = ", ".join(f"{name} {' '.join(a)}".strip() for name, a in answer.facts["interfaces"].items()) or "none"
            missing = (
                f"none is named {' or '.join(wanted)}" if wanted else f"none carries its address {answer.address!r}"
            )
            yield Problem(
                answer.host, "interface", f"{missing} (there are: {has})", "name one with --network-interface"
            )
        elif not launcher and answer.launcher not in own_addresses:
            message = f"it sees this machine as {answer.launcher or 'unknown'}, which is no address of this machine"
            yield Problem(answer.host, "interface", message, "give --launcher-address with one that the hosts reach")


def _carrying(has: Mapping[str, Sequence[str]], address: str) -> list[str]:
    return [name for name, addresses in has.items() if address in addresses]


# --- the table -------------------------------------------------------------------------------------------------------


def table(
    answers: Sequence[Answer], ranks: Mapping[str, int], chosen: Mapping[str, str], problems: Sequence[Problem]
) -> Table:
    """One line a host, one column a check; what is wrong is red, what is only worth knowing yellow."""
    view = Table(title="hosts", title_justify="left")
    for column in ("host", "ranks", "reachable", "commit", "packages", "data", "free disk", "interface", "clock"):
        view.add_column(column, overflow="fold")
    bad = {(problem.host, problem.field): problem for problem in problems}

    def mark(host: str, name: str, text: str) -> str:
        problem = bad.get((host, name))
        return f"[{'yellow' if problem.warning else 'red'}]{text}[/]" if problem else text

    for answer in answers:
        host, facts = answer.host, answer.facts
        if answer.problem:
            view.add_row(
                host,
                str(ranks.get(host, 0)),
                f"[red]{'no' if answer.problem.field == 'reachable' else answer.problem.field}[/]",
            )
            continue
        view.add_row(
            host,
            str(ranks.get(host, 0)),
            "yes",
            mark(host, "commit", _short(facts["commit"])),
            mark(host, "packages", "differ" if (host, "packages") in bad else "same"),
            mark(host, "data", "yes" if facts["data"] else "[yellow]to fetch[/]"),
            mark(host, "disk", f"{facts['free_disk_bytes'] / 1e9:.0f} GB"),
            mark(host, "interface", f"{chosen.get(host, 'none')} {answer.address}".strip()),
            mark(host, "clock", f"{answer.clock_ahead_seconds:+.0f} s" if answer.clock_ahead_seconds else "right"),
        )
    return view
