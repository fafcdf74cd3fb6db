"""`shoal bench loop`: the closed loop on a trained model, from the first request that is different to what serves it.

detect   how soon a drift is noticed, and how often wrongly (`loop_detect`)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.bench import loop_detect
from shoal.bench.turns import show
from shoal.loop.reference import LEARNED
from shoal.model.model import Model


def loop(
    console: Console,
    *,
    model: Path,
    rows: int = LEARNED + loop_detect.QUIET,
    seeds: int = 20,
    keep: Path | None = None,
) -> None:
    """Detection with `seeds` streams of each kind, from `rows` answered questions of the old shop and as many as there
    are of the others, at most. `keep`: a folder for the captured rows, from which the same command goes on."""
    began = time.monotonic()
    tables: list[Table] = []
    loaded = Model.load(model)
    result: dict[str, Any] = {"model": str(loaded.name), "seeds": seeds}
    pools = loop_detect.pools(loaded, rows, keep, lambda line: console.print(line))
    found = loop_detect.detection(pools, seeds, loaded.config.vocab)
    tables.append(loop_detect.shown(found, seeds))
    result |= {"rows": {name: len(pool) for name, pool in pools.items()}, "detection": found}
    show(console, tables, result | {"seconds": round(time.monotonic() - began)})
