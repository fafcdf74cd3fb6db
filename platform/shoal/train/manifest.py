"""The manifest of a checkpoint: size and sha256 of each of its files, written last, so that its presence means complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from shoal.config import read_file
from shoal.errors import ShoalError
from shoal.machine import sha256_of

MANIFEST, STATE = "manifest.json", "state.json"
STEP = re.compile(r"step-[0-9]{8}")  # names of checkpoints; anything else is not ours


def entry(file: Path) -> dict[str, Any]:
    """What a manifest says of `file`: ``bytes`` and ``sha256``."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = read_file(path / MANIFEST)
        if STATE not in manifest:
            return f"{MANIFEST} does not list {STATE}"
        for name, listed in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != listed["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {listed['bytes']}"
            if sha256_of(file) != listed["sha256"]:
                return f"{name} does not match its sha256"
    except (ShoalError, OSError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None
