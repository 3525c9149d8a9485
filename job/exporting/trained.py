"""What a run has learned, read from its folder: the network, its weights, and what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from job.checkpoints.store import Damaged, Store, decode_arrays, decode_state, part_of, read, score_of, step_of
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
    averaged: bool = False  # whether these are the moving average of the weights (train.average_decay)


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


def load(folder: Path, config: Config, checkpoint: str = "last", average: bool = True) -> Trained:
    """Read the weights of a run.

    Args:
        folder: of the run.
        config: of the run.
        checkpoint: ``last``, ``best`` (of those that were measured), or the number of steps that the run had taken.
        average: whether to take the moving average of the weights, if the run keeps one.

    Raises:
        UsageError: there is no such checkpoint.
        CheckpointError: it is damaged, or of an earlier version.
    """
    try:
        found = read(Store(folder / CHECKPOINTS, 1).choose(checkpoint))
    except Damaged as error:
        raise CheckpointError(f"{error}; another one of this run may do: --checkpoint STEP") from None
    arrays, state = decode_arrays(found.arrays), decode_state(found.state)
    averaged = part_of(arrays, "average") if average else {}
    weights = averaged or part_of(arrays, "network")
    measured = state["parts"]["records"].get("last_test") or {}
    accuracy = (
        measured.get("average_accuracy" if averaged else "accuracy") if measured.get("step") == found.step else None
    )
    about = _described(folder, config)
    commit = state.get("commit") or "unknown"
    return Trained(config.model, about, weights, found.step, commit, accuracy, bool(averaged))


def better(folder: Path, checkpoint: str) -> Optional[int]:
    """The step of the checkpoint that was measured to be better than the one asked for; None if there is none."""
    store = Store(folder / CHECKPOINTS, 1)
    chosen, best = store.choose(checkpoint), store.best()
    scores = [score_of(path) for path in (chosen, best) if path]
    return step_of(best) if best and None not in scores and scores[1] > scores[0] else None


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
