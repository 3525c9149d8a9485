"""Going on with a run: from which checkpoint, and whether it is one of the same run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from job.checkpoints.commits import Commits, open_commits
from job.checkpoints.store import BackgroundWriter, Checkpoint, Damaged, Store, decode_arrays, decode_state, read
from job.config import Config, fields
from job.errors import CheckpointError, UsageError
from job.fitness.facts import commit, versions
from job.run_dir import CHECKPOINTS

if TYPE_CHECKING:  # for check(), which runs before anything that takes long to import
    from job.checkpoints.state import Arrays, RunState
    from job.distributed.comm import Comm

# What may differ: it changes where and how fast a run learns, but not what. A run may be made longer; with a cosine
# schedule that changes what it learns.
_FREE = {
    "run.dir", "run.overwrite", "run.device", "run.deterministic", "run.resume", "run.resume_ignoring",
    "run.on_nonfinite", "run.step_timeout_seconds", "run.profile_steps", "train.epochs", "train.max_steps",
    "train.log_every_steps",
    "data.dir", "data.format", "data.on_damaged", "data.decode_threads", "data.cache_dir", "data.mirrors",
    "data.batch_per_rank", "data.test_batch_per_rank", "data.download_timeout_seconds", "data.download_attempts",
    "data.lock_timeout_seconds", "checkpoint.every_steps", "checkpoint.keep",
    "elastic.commit_every_steps", "elastic.timeout_seconds", "elastic.cooldown_seconds", "elastic.max_resets",
}  # fmt: skip
_LENGTH = {"train.epochs", "train.max_steps"}
# What a run did before these keys were there, where that is not their default.
_BEFORE = {"model.fuse_batch_norm": False, "model.direct_convolution": False}

# To be raised by a version whose loops add up in another order than before, and so come to other bits.
_ORDER_OF_SUMS = 2


def identity(config: Config, ranks: int, digests: Mapping[str, str]) -> dict[str, Any]:
    """All keys with their values, the batch and the data as what they come to."""
    values = config.model_dump(mode="json")
    values["data"]["global_batch"] = config.data.global_batch_of(ranks)
    values["data"]["sha256"] = dict(digests)
    if config.train.fp16_allreduce:
        values["train"]["fp16_allreduce"] = f"on {ranks} ranks"  # on others it comes to other bits
    return {key: _value(values, key) for key, _ in fields()}


def differences(of: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What keeps a run of identity ``of`` from going on as ``now``, a key a line; nothing if the list is empty."""
    free = {*(_FREE - _LENGTH if now["schedule.name"] == "cosine" else _FREE), *now["run.resume_ignoring"]}
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields()}
    was = {**defaults, **_BEFORE, **of}  # a key that was not there yet mostly had the effect of its default
    return [
        f"{key}: {was[key]} there, {now.get(key)} now" for key in was if key not in free and was[key] != now.get(key)
    ]


def check(config: Config, ranks: int) -> None:
    """Find out early, and without touching anything, what can be known of a resumption before the data is.

    Raises:
        CheckpointError: there is nothing to go on from.
        UsageError: what there is is of another run.
    """
    if config.run.resume != "never" and (found := _find(config, warn=lambda message: None)):
        now = identity(config, ranks, config.data.sha256.model_dump())
        of = decode_state(found.state)["config"]
        known = {key: value for key, value in now.items() if value != "any" and key != "data.shards"}
        if not _batch_may_limit(config, ranks, of["data.shards"]):
            known["data.shards"] = max(config.data.shards, ranks)
        require_same_run(found, {**of, **known})


def goes_on(config: Config) -> bool:
    """Whether the run is to go on from a checkpoint, intact or not, and does not begin."""
    newest = config.run.resume == "auto" and Store(config.run.dir / CHECKPOINTS, 1).paths()
    return bool(newest) or config.run.resume not in ("auto", "never")


def _batch_may_limit(config: Config, ranks: int, there: int) -> bool:
    """Whether a run with ``there`` shards may be what this one comes to, because its smallest batch holds no more."""
    half = config.data.global_batch_of(ranks) // config.train.accumulate_steps // 2  # the last batch is no smaller
    return there >= half and max(config.data.shards, ranks) > there


class Checkpoints:
    """The checkpoints of a run, written by rank 0 and used by all ranks.

    Args:
        writer: writes them; None on the other ranks.
        commits: the checkpoints in memory; None where there are none.
        comm: all ranks.
        config: of the run.
        identity: see :func:`identity`.
    """

    def __init__(
        self,
        writer: Optional[BackgroundWriter],
        commits: Optional[Commits],
        comm: Comm,
        config: Config,
        identity: dict[str, Any],
    ) -> None:
        self._writer = writer
        self._commits = commits
        self._comm = comm
        self._config = config
        self._identity = identity
        self._code: dict[str, Any] = {}
        if writer or commits:
            self._code = {"order_of_sums": _ORDER_OF_SUMS, "versions": versions(), "commit": commit()}

    def resume(self, state: RunState) -> None:
        """Load the checkpoint that ``run.resume`` asks for into ``state``; write the first one if the run has none.

        Where a supervisor has started the ranks again, a commit that is newer is taken instead.

        Raises:
            CheckpointError: all are damaged, or of another network.
            UsageError: it is of another run.
        """
        found = self._choose() if self._writer else None
        arrays = self._comm.broadcast_bytes(found.arrays if found else b"", "checkpoint arrays")
        values = self._comm.broadcast_bytes(found.state if found else b"", "checkpoint state")
        if arrays:
            state.load_state_dict(decode_arrays(arrays), decode_state(values)["parts"])
        # Before anything else is written: a run without a checkpoint of its own has nothing to lose.
        if not arrays or self._config.run.resume != "auto":
            self.save(state)
            self.finish()
        if self._commits:
            self._commits.tell(state.learner.steps)

    def keep(self, state: RunState, save: bool) -> None:
        """Save if ``save`` or when it is time for that, else commit when it is. All ranks call it after each step."""
        step, every_steps = state.learner.steps, self._config.checkpoint.every_steps
        if save or (every_steps and step % every_steps == 0):
            self.save(state)
        elif self._commits and self._commits.due(step):
            self._commits.write(step, *self._copy(state))
        if self._commits:
            self._commits.tell(step)

    def save(self, state: RunState) -> None:
        """Copy the state and start to write it to the disk. All ranks call it together, after the same step."""
        state.recorder.sync()
        arrays, described = self._copy(state)
        if self._writer:
            self._writer.write(state.learner.steps, arrays, described, state.recorder.score(state.learner.steps))

    def _copy(self, state: RunState) -> tuple[Arrays, dict[str, Any]]:
        arrays, values = state.state_dict()
        return arrays, {"config": self._identity, "ranks": self._comm.size, **self._code, "parts": values}

    @property
    def failing(self) -> bool:
        """Whether this rank knows of a checkpoint that could not be written."""
        return bool(self._writer and self._writer.failure)

    def finish(self) -> None:
        """Wait until nothing is being written. All ranks call it together.

        Raises:
            CheckpointError: a checkpoint could not be written. On all ranks.
        """
        if self._writer:
            self._writer.wait()
        failures = self._comm.gather_text(self._writer.failure if self._writer else "", "checkpoint written")
        if any(failures):
            raise CheckpointError("; ".join(filter(None, failures)))

    def _choose(self) -> Optional[Checkpoint]:
        found = _find(self._config, _warn)
        if found and self._commits:
            committed = self._commits.newest(_warn)
            found = committed if committed and committed.step > found.step else found
        if found:
            require_same_run(found, self._identity)
            if decode_state(found.state).get("order_of_sums", 1) != _ORDER_OF_SUMS:
                _warn(
                    "a version that adds up in another order has begun this run: it goes on, and ends with other bits"
                    " than the same run from its start"
                )
            print(f"going on after step {found.step}", flush=True)
        Store(self._config.run.dir / CHECKPOINTS, 1).tidy(found.step if found else -1)
        return found


@contextmanager
def open_checkpoints(config: Config, comm: Comm, digests: Mapping[str, str]) -> Iterator[Checkpoints]:
    """The checkpoints of this run; only rank 0 writes. What is being written at the end is finished."""
    store = Store(config.run.dir / CHECKPOINTS, config.checkpoint.keep)
    writer = BackgroundWriter(store) if comm.rank == 0 else None
    commits = open_commits(config.elastic.commit_every_steps, comm.local_rank == 0)
    try:
        yield Checkpoints(writer, commits, comm, config, identity(config, comm.size, digests))
    finally:
        if writer:
            writer.close()
        if commits:
            commits.close()


def require_same_run(found: Checkpoint, now: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another run.

    Raises:
        UsageError: naming each key in which they differ.
    """
    differing = differences(decode_state(found.state)["config"], now)
    if differing:
        keys = [line.partition(":")[0] for line in differing]
        raise UsageError(
            f"the checkpoint after step {found.step} is of another run; they differ in\n"
            + "\n".join(f"  {line}" for line in differing)
            + f"\ngive another run.dir, or add run.resume_ignoring=[{','.join(keys)}] to go on with the new values"
        )


def _find(config: Config, warn: Callable[[str], None]) -> Optional[Checkpoint]:
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return Store(config.run.dir / CHECKPOINTS, 1).newest(warn)
    try:
        return read(Path(config.run.resume))
    except Damaged as error:
        raise CheckpointError(f"run.resume: no checkpoint that can be gone on from: {error}") from None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values
