"""Training runs to look at, in the form that `train.log` writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

START = {
    "kind": "start",
    "step": 0,
    "name": "fish",
    "parameters": 1_080_000,
    "mix": {"text": 0.6, "image": 0.2, "code": 0.2},
}
LIVE, ENDED = "now/pretrain", "before/pretrain"  # names of the runs


def write_runs(folder: Path) -> None:
    """Two runs: one that goes on, half done, and one that ended long ago."""
    say(folder, ENDED, START, *(step(n, of=20) for n in range(1, 21)), {"kind": "end", "step": 20, "steps": 20})
    os.utime(folder / ENDED / "metrics.jsonl", (1e9, 1e9))
    say(folder, LIVE, START, *(step(n) for n in range(1, 51)), evaluation(25), evaluation(50))


def say(folder: Path, name: str, *records: dict[str, Any]) -> None:
    """Appends `records` to the metrics of a run, as training does."""
    path = folder / name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(n: int, of: int = 100) -> dict[str, Any]:
    more = {"loss": 6 - 3 * n / of, "rate": 0.01, "tokens_per_second": 4000.0, "tokens": 1000.0, "patches": 150.0}
    return {"kind": "step", "step": n, "progress": n / of, "eta": float(of - n), **more}


def evaluation(n: int) -> dict[str, Any]:
    bpb = {kind: {"shallow": 3 - n / 100, "middle": 2.8 - n / 100, "full": 2.5 - n / 100} for kind in ("text", "code")}
    return {"kind": "eval", "step": n, "progress": n / 100, "bpb": bpb, "patch": None}
