"""safetensors: the weights by name, for whoever has the network. This project has it, and so reads them as a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from job.config import ModelConfig
from job.errors import JobError
from job.exporting.served import Model, described
from job.exporting.trained import Trained


def write(trained: Trained, facts: Mapping[str, str], file: Path) -> None:
    """Write the weights and running statistics as the run has them."""
    file.write_bytes(_in_order(save(trained.weights, dict(facts))))


def _in_order(content: bytes) -> bytes:
    """The library writes the metadata in an order that chance decides; with this they are in that of their keys.

    The format: the length of the header, the header as JSON padded with spaces to eight bytes, the numbers.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read(file: Path) -> Model:
    """Load weights, and the network that they are of.

    Raises:
        JobError: the file is damaged, or not one of this program, or the network is not there any more.
    """
    from job.exporting import graph

    try:
        with safe_open(str(file), "numpy") as stored:
            facts = stored.metadata() or {}
            weights: dict[str, np.ndarray] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise JobError(f"{file}: cannot be loaded: {error}") from None
    about = described(facts, file)
    model = ModelConfig.model_validate(json.loads(facts["network"]))
    return graph.model(Trained(model, about, weights, int(facts["step"]), facts["commit"]))
