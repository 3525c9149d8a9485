"""What a run has learned, read from its folder: the network, its weights, and what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from job.checkpoints.store import Damaged, Store, decode_arrays, decode_state, network_of, read, score_of
from job.config import Config, ModelConfig, load_config
from job.data.dataset import FASHION_MNIST, Description
from job.errors import CheckpointError, UsageError
from job.run_dir import CHECKPOINTS, CONFIG, DATASET


@dataclass(frozen=True)
class Trained:
    """A network with its weights."""

    model: ModelConfig
    about: Description
    weights: dict[str, np.ndarray]  # and running statistics, by their place in the network: ``3.running_mean``
    step: int  # that the run had taken
    commit: str  # of the code that trained it
    accuracy: Optional[float] = None  # on the test set, as the run measured it at this step


def configuration(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in ``folder``, with ``overrides`` for what has been moved since.

    Raises:
        UsageError: the folder is not that of a run, or its configuration is not valid.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the run.dir of a run")
    if not (folder / CONFIG).is_file():
        runs = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG}"))
        hint = f"; did you mean {' '.join(runs[:5])}{' ...' if len(runs) > 5 else ''}?" if runs else ""
        raise UsageError(f"{folder}: holds no {CONFIG}, so it is not the folder of a run{hint}")
    return load_config(folder / CONFIG, overrides)


def load(folder: Path, config: Config, checkpoint: str = "last") -> Trained:
    """Read the weights of a run.

    Args:
        folder: of the run.
        config: of the run.
        checkpoint: ``last``, ``best`` (by test accuracy), or the number of steps that the run had taken.

    Raises:
        UsageError: there is no such checkpoint.
        CheckpointError: it is damaged, or of an earlier version.
    """
    path = Store(folder / CHECKPOINTS, 1).choose(checkpoint)
    try:
        found = read(path)
    except Damaged as error:
        raise CheckpointError(f"{error}; another one of this run may do: --checkpoint STEP") from None
    weights = network_of(decode_arrays(found.arrays))
    commit = decode_state(found.state).get("commit") or "unknown"
    return Trained(config.model, _described(folder, config), weights, found.step, commit, score_of(path))


class Best(NamedTuple):
    """The checkpoint with the highest test accuracy."""

    step: int
    accuracy: float


def best(folder: Path) -> Optional[Best]:
    """Of a run's checkpoints, the best that was measured; None if none was."""
    try:
        path = Store(folder / CHECKPOINTS, 1).choose("best")
    except UsageError:
        return None
    return Best(int(path.name.partition("-")[2]), score_of(path))


def require_same_data(trained: Trained, found: Description) -> None:
    """Refuse to compare on other data than the run's.

    Raises:
        UsageError: its classes or its pictures are others.
    """
    if (found.classes, found.shape) != (trained.about.classes, trained.about.shape):
        raise UsageError(
            f"the data has {len(found.classes)} classes of pictures of shape {found.shape}, the run's had"
            f" {len(trained.about.classes)} of {trained.about.shape}, or other names; give the run's as data.dir=FOLDER"
        )


def _described(folder: Path, config: Config) -> Description:
    file = folder / DATASET
    if not file.is_file():
        if config.data.format == "idx":  # a run from before there was a choice
            return FASHION_MNIST
        raise UsageError(f"{file}: is missing, and without it the names of the classes are not known; put it back")
    try:
        return Description.from_mapping(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file}: is not what a run writes there; put it back") from None
