"""A model that is ready to be asked, whatever it was read from: an exported file, or the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from job.checkpoints.store import weights_sha256
from job.data.dataset import Description
from job.errors import JobError
from job.exporting.trained import Trained


class Model(NamedTuple):
    """A model, and what its pictures and classes are."""

    about: Description
    probabilities: Callable[[np.ndarray], np.ndarray]  # of uint8 (n, height, width) or (n, height, width, 3)


def metadata(trained: Trained) -> dict[str, str]:
    """What every exported file says of itself: text by key. Lists, objects and numbers are JSON.

    Nothing in it depends on where the run is or on how many ranks it had.
    """
    facts: dict[str, Any] = {
        "classes": trained.about.classes,
        "input_shape": ["N", *input_shape(trained.about)],
        "input_type": "uint8",
        "step": trained.step,
        "commit": trained.commit,
        "weights_sha256": weights_sha256(trained.weights),
        "averaged": trained.averaged,
        "network": trained.model.model_dump(mode="json", exclude={"weights"}),  # which is where they came from
        "data": asdict(trained.about),
    }
    if trained.accuracy is not None:
        facts["test_accuracy"] = trained.accuracy
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in sorted(facts.items())}


def described(facts: Mapping[str, str], file: Path) -> Description:
    """What :func:`metadata` said of the data.

    Raises:
        JobError: another program has made the file.
    """
    try:
        return Description.from_mapping(json.loads(facts["data"]))
    except (KeyError, TypeError, ValueError):
        raise JobError(f"{file}: does not say what its classes are; give a model that job/export.py has made") from None


def input_shape(about: Description) -> tuple[int, ...]:
    """Of one picture, as ``numpy.asarray`` of a Pillow picture has it: (height, width), with 3 channels at the end."""
    channels, height, width = about.shape
    return (height, width) if channels == 1 else (height, width, channels)


def as_decoded(images: np.ndarray, about: Description) -> np.ndarray:
    """Pixels of a data set, (n, height, width) or (n, channels, height, width), as :func:`input_shape` has them."""
    images = np.asarray(images).reshape(-1, *about.shape).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images.reshape(-1, *input_shape(about)))
