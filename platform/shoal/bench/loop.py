"""`shoal bench loop`: the closed loop on a trained model, from the first request that is different to what serves it.

detect   how soon a drift is noticed, and how often wrongly (`loop_detect`)
teach    from the first new request to a verdict, learned from corrections (`loop_teach`)
refuse   ten bad candidates, and which of the gate's checks refuses each (`loop_refuse`)
serve    shadow, canary, promotion, rollback and bad canaries, under traffic (`loop_serve`)
ray      the same through Ray Serve with one replica, of bad canaries the one whose weights are bad
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoal.bench import loop_detect, loop_refuse, loop_serve, loop_teach
from shoal.bench.loop_service import on_ray
from shoal.bench.turns import show
from shoal.errors import UsageError
from shoal.loop.reference import LEARNED
from shoal.loop.release import Release
from shoal.machine import threads
from shoal.model.model import Model

PARTS = ("detect", "teach", "refuse", "serve", "ray")


def loop(
    console: Console,
    *,
    model: Path,
    rows: int = LEARNED + loop_detect.QUIET,
    seeds: int = 20,
    keep: Path | None = None,
    parts: Sequence[str] = ("detect",),
    fp32: Path | None = None,
    data: Path | None = None,
    minutes: float = 3.0,
    seed: int = 0,
) -> None:
    """Measure `parts`. `model` is what is served, `fp32` its parent, `data` the corpus of both; the last two for "teach" and
    "refuse". Of "detect": `seeds` streams of each kind, from `rows` answered questions of the old shop and as many as there are
    of the others, at most; `keep`: a folder for the captured rows, from which the same command goes on. `minutes` of
    fine-tuning, and `seed`, of "teach". Raises UsageError."""
    if not parts or set(parts) - set(PARTS):
        raise UsageError("--parts", got=list(parts), allowed=PARTS)
    if {"teach", "refuse"} & set(parts) and (fp32 is None or data is None):
        raise UsageError("--parts teach and refuse", do="give --fp32 and --data: they train")
    torch.set_num_threads(threads())
    began, tables = time.monotonic(), list[Table]()
    loaded = Model.load(model)
    result: dict[str, Any] = {"model": str(loaded.name), "parts": list(parts)}

    def say(line: str) -> None:
        console.print(line, highlight=False)

    if "detect" in parts:
        pools = loop_detect.pools(loaded, rows, keep, say)
        found = loop_detect.detection(pools, seeds, loaded.config.vocab)
        tables.append(loop_detect.shown(found, seeds))
        result |= {"seeds": seeds, "rows": {name: len(pool) for name, pool in pools.items()}, "detection": found}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        release = Release(work / "release")
        if {"teach", "serve", "ray"} & set(parts):
            release.add(model, fp32=fp32, why="the benchmark")
        if "teach" in parts and data is not None:
            result["teach"] = asyncio.run(loop_teach.teach(release, data, work / "teach", minutes, say, seed=seed))
            tables.append(loop_teach.shown(result["teach"]))
        if "refuse" in parts and fp32 is not None and data is not None:
            result["refuse"] = loop_refuse.refuse(fp32, data, work / "refuse", say)
            tables.append(loop_refuse.shown(result["refuse"]))
        if "serve" in parts:
            result["serve"] = asyncio.run(loop_serve.serve(release, work / "serve", say))
            tables.append(loop_serve.shown(result["serve"]))
        if "ray" in parts:
            way = loop_serve.serve(release, work / "ray", say, bad=loop_serve.BAD_WEIGHTS, by=on_ray)
            result["ray"] = asyncio.run(way)
            tables.append(loop_serve.shown(result["ray"], "one replica on Ray Serve"))
        show(console, tables, result | {"seconds": round(time.monotonic() - began)})
