"""Training runs to look at: which there are under one folder, and the curves of one. Read only; off without a folder.

A run is any folder at most `DEEPEST` below it that holds a ``metrics.jsonl``; its name is its path from there. What a request
may name is checked letter by letter and then on the disk, so that it leads nowhere else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from shoal.api.wire import BodyTooLargeError, NotFoundError
from shoal.errors import ConfigError, RequestError
from shoal.train import log

DEEPEST = 3  # folders below the one that is given
MOST_RUNS = 200  # listed, the newest first
MOST_BYTES = 32 * 2**20  # of a metrics file that is read
TAIL_BYTES = 64 * 2**10  # of its end, which says how far the run is
MOST_POINTS = 400  # of a curve
STALE_SECONDS = 120.0  # without a word, and a run that has not ended counts as stopped
CURVES = ("step", "loss", "bpb", "patch", "rate", "grad_norm", "tokens_per_second", "utilisation", "tokens", "patches")

_NAME = re.compile(rf"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){{0,{DEEPEST - 1}}}", re.ASCII)


def runs_routes(folder: Path) -> APIRouter:
    """The routes over the runs in `folder`. Raises ConfigError when it is no folder."""
    root = folder.resolve()
    if not root.is_dir():
        raise ConfigError("runs", got=str(folder), allowed="a folder that holds training runs")
    router = APIRouter(prefix="/v1/shoal/runs", tags=["training runs"])

    @router.get("")
    def list_runs() -> dict[str, Any]:
        """The runs, the one that spoke last first."""
        files = sorted(((path.stat().st_mtime, path) for path in _files(root)), reverse=True)[:MOST_RUNS]
        return {"object": "list", "data": [_summary(root, path, spoke) for spoke, path in files]}

    @router.get("/{name:path}")
    def get_run(name: str) -> dict[str, Any]:
        """One run: how it started, its curves (at most `MOST_POINTS` points), its held-out evaluations, how it ended, and how
        many lines of its metrics could not be read."""
        path = _find(root, name)
        return {**_summary(root, path, path.stat().st_mtime), **_history(path, name)}

    return router


def _files(root: Path) -> Iterator[Path]:
    """Every metrics file under `root` that is a file of its own, not a link."""
    for at, folders, files in os.walk(root):
        depth = len(Path(at).relative_to(root).parts)
        folders[:] = [name for name in folders if depth < DEEPEST and _NAME.fullmatch(name)]
        path = log.metrics_file(at)
        if depth and path.name in files and not path.is_symlink():
            yield path


def _find(root: Path, name: str) -> Path:
    """The metrics file of the run `name`. Raises NotFoundError, BodyTooLargeError."""
    path = log.metrics_file(root / name) if _NAME.fullmatch(name) else None
    if path is None or not path.is_file() or path.resolve() != path:
        raise NotFoundError("no such run", param="name", got=name[:100], do="GET /v1/shoal/runs lists them")
    if path.stat().st_size > MOST_BYTES:
        raise BodyTooLargeError("the run's metrics", got=path.stat().st_size, allowed=f"at most {MOST_BYTES} bytes")
    return path


def _summary(root: Path, path: Path, spoke: float) -> dict[str, Any]:
    """Name, state (running, done, stopped), step, share done, seconds left, and when the run spoke last (Unix time)."""
    last = _last(path)
    state = "done" if last.get("kind") == "end" else "running" if time.time() - spoke < STALE_SECONDS else "stopped"
    return {
        "name": path.parent.relative_to(root).as_posix(),
        "state": state,
        "step": last.get("step"),
        "progress": 1.0 if state == "done" else last.get("progress"),
        "eta": last.get("eta") if state == "running" else None,
        "spoke": spoke,
    }


def _last(path: Path) -> dict[str, Any]:
    """What the last records of a metrics file say together, a later one over an earlier one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        records = [record for line in file.read().split(b"\n") if (record := log.parse(line)) is not None]
    found: dict[str, Any] = {}
    for record in records[-3:]:  # an evaluation and a checkpoint may follow a step
        found |= record
    return found


def _history(path: Path, name: str) -> dict[str, Any]:
    found = log.history(path.parent)
    if found.unreadable and not found.records:
        raise RequestError(
            "not the metrics of a training run", param="name", got=name, do="look at the file that is there"
        )
    records = found.records
    steps = [record for record in records if record["kind"] == "step"]
    kept = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    if steps and kept[-1] is not steps[-1]:
        kept.append(steps[-1])
    return {
        "start": next((record for record in reversed(records) if record["kind"] == "start"), None),
        "curves": {key: [record.get(key) for record in kept] for key in CURVES},
        "evals": [record for record in records if record["kind"] == "eval"][-MOST_POINTS:],
        "end": next((record for record in reversed(records) if record["kind"] == "end"), None),
        "unreadable": found.unreadable,
    }
