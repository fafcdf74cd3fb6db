"""Frozen suites: files of held-out chats that every candidate is asked, and nobody may change.

SUITES/  suites.json    {"format": "shoal.suites", "suites": [{"name", "file", "sha256", "kind", "most_tokens"}, ...]}
         *.jsonl        chats with answers; safety-*.jsonl may lose no item, recent-*.jsonl must be won
         uses.jsonl     a line each time that they were asked: what is asked often is learned by those who choose
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from shoal.data.chats.rows import labels
from shoal.errors import DataError, ResourceError
from shoal.loop.capture import append
from shoal.machine import sha256_of, write_aside

FORMAT, VERSION = "shoal.suites", 1
MANIFEST, USES = "suites.json", "uses.jsonl"
FROZEN, SAFETY, RECENT = "frozen", "safety", "recent"
TIRED = 50  # uses from which on a suite should be drawn anew


@dataclass(frozen=True)
class Suite:
    name: str
    file: str
    sha256: str
    kind: str
    most_tokens: int | None = None  # of an answer; None: by its task


def freeze(folder: Path, most_tokens: int | None = None) -> list[Suite]:
    """Make the suites of the .jsonl files in `folder`: their hashes are what they must have from then on, and an answer to
    them may have so many tokens [by its task]. Raises DataError where they are frozen already, and where there is no file."""
    manifest = folder / MANIFEST
    if manifest.exists():
        raise DataError(f"{folder} is frozen", do="take a new folder: figures of two suites are not comparable")
    files = [path for path in sorted(folder.glob("*.jsonl")) if path.name != USES] if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} holds no suite", allowed="files of chats with answers, NAME.jsonl")
    suites = [Suite(path.stem, path.name, sha256_of(path), _kind(path.stem), most_tokens) for path in files]
    each = [{key: value for key, value in asdict(suite).items() if value is not None} for suite in suites]
    told = {"format": FORMAT, "version": VERSION, "suites": each}
    write_aside(manifest, json.dumps(told, indent=1) + "\n", sync=True)
    return suites


def read(folder: Path) -> list[Suite]:
    """The suites of a folder, their files as they were frozen. Raises DataError for a folder that is none, and names a
    file that changed or is gone."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form = (told["format"], told["version"])
        suites = [Suite(**one) for one in told["suites"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} holds no frozen suites", got=str(error), do="freeze them: shoal gate --freeze"
        ) from error
    if form != (FORMAT, VERSION):
        raise DataError(f"{folder}", got=f"{form[0]} {form[1]}", allowed=f"{FORMAT} {VERSION}")
    for suite in suites:
        path = folder / suite.file
        if not path.is_file():
            raise DataError(f"suite {suite.name}: {path} is gone", do="put it back")
        if (found := sha256_of(path)) != suite.sha256:
            do = "put it back, or freeze a new folder: a suite that changes compares nothing"
            raise DataError(f"suite {suite.name} has changed", got=found[:12], allowed=suite.sha256[:12], do=do)
    return suites


def tasks(folder: Path) -> set[str]:
    """Tasks of the chats in the suites of a folder that ask what is known. Raises DataError as `read`."""
    return {task for suite in read(folder) if suite.kind == FROZEN for task, _ in labels(folder / suite.file)}


def looked_at(recent: Path) -> frozenset[int]:
    """The groups of what is new by which the gate looks at a router; a retrained one is fitted to the others. A group's side
    follows from itself alone: whoever else is forgotten, it stays there. Raises DataError for a file that cannot be read."""
    return frozenset(
        group for _, group in labels(recent) if xxhash.xxh3_64_intdigest(f"router {group}".encode()) % 2 == 0
    )


def use(folder: Path, told: Mapping[str, Any]) -> int:
    """Note that the suites are asked, and return how often they have been. Raises ResourceError where it cannot be noted."""
    path = folder / USES
    try:
        append(path, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **told})
        return len(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        do = "make room: suites that are asked and not counted are soon known by heart"
        raise ResourceError(f"{path} cannot be written", got=error.strerror, do=do) from error


def _kind(name: str) -> str:
    return next((kind for kind in (SAFETY, RECENT) if name == kind or name.startswith(f"{kind}-")), FROZEN)
