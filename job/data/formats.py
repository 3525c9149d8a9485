"""The data set that the configuration names, in whichever format it is kept."""

from __future__ import annotations

from job.config import DataConfig
from job.data import idx, pictures
from job.data.dataset import Dataset


def load(config: DataConfig) -> Dataset:
    """Find it, and fetch what is missing of Fashion-MNIST.

    Raises:
        DataError: something is missing or damaged. The message names it and says what to do.
    """
    return pictures.load(config) if config.format == "folder" else idx.load(config)


def digests(config: DataConfig, dataset: Dataset) -> dict[str, str]:
    """What the data is, by the keys of ``data.sha256``."""
    return pictures.digests(config) if config.format == "folder" else idx.digests(config, dataset)
