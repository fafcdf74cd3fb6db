"""The manifest of a checkpoint: size and sha256 of each of its files, written last, so that its presence means complete."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from shoal.config import read_file
from shoal.errors import ShoalError

MANIFEST = "manifest.json"


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Name -> ``bytes`` and ``sha256`` of the files that are in `directory` now."""
    files = sorted(p for p in directory.iterdir() if p.is_file())
    return {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = read_file(path / MANIFEST)
        for name, entry in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except (ShoalError, OSError, KeyError, TypeError) as error:
        return str(error)
    return None


def write_json(path: Path, value: object) -> None:
    """Write `value`, and see it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
