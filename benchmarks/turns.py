"""What all benchmarks share: variants in turns, and the table with its line of JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from shoal.evaluate.answering import machine

K = TypeVar("K")


def in_turns(runs: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, float]:
    """Median of each run over `rounds`, all runs in turns, after one turn that is not counted."""
    found: dict[K, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            value = run()
            if number:
                found[key].append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def show(console: Console, tables: list[Table], result: dict[str, Any]) -> None:
    """Print `tables`, load and threads, and `result` with the machine as the last line."""
    for table in tables:
        console.print(table)
    result["machine"] = machine()
    console.print(f"load {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads", highlight=False)
    print(json.dumps(result))


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this package, wherever it is started."""
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))} | more
