"""The files of an adapter wherever they lie: in a folder, or in S3, without torch."""

from __future__ import annotations

import math
from pathlib import Path

from shoal.data import models
from shoal.errors import CheckpointError
from shoal.model import adapter_files
from shoal.model.adapter_files import CONFIG, WEIGHTS, AdapterFiles

MOST_CONFIG = 2**20  # bytes


def here(directory: str | Path, most: float = math.inf) -> Path:
    """The directory on this machine; of ``s3://...`` its copy, of at most `most` bytes of weights. Raises CheckpointError where
    it lacks a file, DataError where S3 does not answer, ResourceError where the disk is full."""
    return models.some(directory, {CONFIG: MOST_CONFIG, WEIGHTS: most})


def read(directory: str | Path, most: int | None = None) -> AdapterFiles:
    """As `adapter_files.read`. Raises as `here` too."""
    place = here(directory, math.inf if most is None else most)
    try:
        return adapter_files.read(place, most)
    except CheckpointError as error:
        raise CheckpointError(error.message.replace(str(place), str(directory))) from error
