"""`shoal bench intervals`: how often the 95 % intervals that Shoal states hold the truth, by simulation, with few units.

Each kind draws data whose truth is known and asks the code that the report, the gate and the watch ask. Units are documents,
conversations or people (of regret batches of re-runs). An interval that is not stated neither holds nor misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.turns import show
from shoal.errors import ShoalError, UsageError
from shoal.evaluate.intervals import (
    UNKNOWN,
    Interval,
    crossed,
    median,
    of_bounded,
    of_mean,
    of_quotient,
    of_share,
)
from shoal.loop.paired import paired
from shoal.loop.regret import BATCH, Regret
from shoal.machine import cores

SIZES = (5, 10, 33)  # units
LEAST_HELD = 0.93  # share of the stated intervals
LEAST_STATED = 50  # intervals, below which their share says nothing
SEEDS = 5
Draws = np.random.Generator


def bits_a_byte(rng: Draws, units: int, spread: float) -> tuple[Interval, float]:
    """Documents of very different lengths, the longer ones with fewer bits a byte."""
    length, skill = rng.normal(0, spread, units), rng.normal(0, 0.35, units)
    n_bytes = np.exp(6 + length)
    found = of_quotient(n_bytes * np.exp(skill - 0.05 * length), n_bytes, units)
    return found.interval, math.exp(0.35**2 / 2 + (0.95**2 - 1) * spread**2 / 2)


def share(rng: Draws, units: int, true: float, alike: float = 0.0) -> tuple[Interval, float]:
    """Rows of their own, or, where those of a group are `alike` (their correlation), groups of very different sizes."""
    if not alike:
        return of_share((rng.random(units) < true).tolist(), range(units)).interval, true
    groups = _groups(rng, units)
    own = rng.beta(true * (1 / alike - 1), (1 - true) * (1 / alike - 1), units)
    return of_share((rng.random(len(groups)) < own[groups]).tolist(), groups.tolist()).interval, true


def skewed(rng: Draws, units: int, together: bool) -> tuple[Interval, float]:
    """Lognormal values, one a group or some that are alike."""
    groups = _groups(rng, units) if together else np.arange(units)
    part = 0.7 if together else 1.0  # of the variance of the logarithm that a group has in common
    logs = part**0.5 * rng.normal(size=units)[groups] + (1 - part) ** 0.5 * rng.normal(size=len(groups))
    return of_mean(np.exp(logs).tolist(), groups.tolist()).interval, math.exp(0.5)


def difference(rng: Draws, units: int, lost: float, won: float, end: str) -> tuple[Interval, float]:
    """Two models' scores of the same questions: one of the gate's one-sided 95 % bounds."""
    drawn = rng.random(units)
    found = paired((drawn > 1 - won).astype(float).tolist(), (drawn < lost).astype(float).tolist(), range(units))
    return ((-math.inf, found.high) if end == "high" else (found.low, math.inf)), won - lost


def losses(rng: Draws, units: int, rare: float) -> tuple[Interval, float]:
    """What routing loses: nothing of most prompts, and up to 4 nats of some."""
    lost = (rng.random(units) < rare) * np.minimum(rng.exponential(1.0, units), 4.0)
    return of_bounded(lost.tolist(), range(units), 4.0).interval, rare * (1 - math.exp(-4))


def regret(rng: Draws, units: int, rare: float) -> tuple[Interval, float]:
    """What the watch says of re-runs, of which few lose something."""
    found = Regret(tolerance=0.05)
    for _ in range(units):
        lost = (rng.random(BATCH) < rare) * rng.exponential(0.05 / rare, BATCH)
        found.add([[float(one), 0.0] for one in lost])
    told = found.told()
    return (UNKNOWN if told is None else (told["low"], told["high"])), 0.05


def seeds(rng: Draws, units: int) -> tuple[Interval, float]:
    """What is added to answers, by groups and `SEEDS` trainings that both scatter."""
    groups = np.repeat(np.arange(units), 4)
    chance = rng.normal(0, 0.3, units)[groups] + rng.normal(0, 0.15, (SEEDS, 1))
    drawn = rng.random((SEEDS, len(groups)))
    return crossed(np.where(drawn < 0.5, np.sign(chance) * (drawn < np.abs(chance)), 0.0), groups.tolist()), 0.0


def middle(rng: Draws, units: int) -> tuple[Interval, float]:
    """The median of turns' times."""
    return median(np.exp(rng.normal(size=units)).tolist()), 1.0


Kind = Callable[[Draws, int], tuple[Interval, float]]
KINDS: dict[str, Kind] = {
    "bits a byte": partial(bits_a_byte, spread=1.0),
    "bits a byte, lengths of heavier tails": partial(bits_a_byte, spread=1.5),
    **{f"share of {p:.0%}": partial(share, true=p) for p in (0.5, 0.05, 0.95)},
    **{f"share of {p:.0%}, in groups": partial(share, true=p, alike=0.3) for p in (0.5, 0.05, 0.95)},
    "mean of skewed values": partial(skewed, together=False),
    "mean of skewed values, in groups": partial(skewed, together=True),
    **{f"paired difference, {end} bound": partial(difference, lost=0.2, won=0.1, end=end) for end in ("low", "high")},
    **{f"paired difference, rare, {end} bound": partial(difference, lost=0.03, won=0.01, end=end) for end in ("low", "high")},
    "loss": partial(losses, rare=0.3),
    "loss, rare": partial(losses, rare=0.05),
    "regret of re-runs": partial(regret, rare=0.2),
    "regret of re-runs, rare losses": partial(regret, rare=0.01),
    f"difference over {SEEDS} seeds": seeds,
    "median": middle,
}  # fmt: skip


def held(name: str, units: int, runs: int, seed: int = 0) -> tuple[int, int]:
    """How many of `runs` intervals of a kind were stated, and how many of these held the truth."""
    rng, found, stated = np.random.default_rng((seed, units, *name.encode())), 0, 0
    for _ in range(runs):
        (low, high), true = KINDS[name](rng, units)
        if math.isfinite(low) or math.isfinite(high):
            stated += 1
            found += low - 1e-9 <= true <= high + 1e-9
    return stated, found


def intervals(console: Console, *, runs: int, seed: int = 0) -> dict[str, Any]:
    """Print, of each kind and number of units, which share of `runs` intervals held the truth. Returns them. Raises UsageError,
    and ShoalError where a share is too small."""
    if runs < 1:
        raise UsageError("--runs", got=runs, allowed="1 or more")
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        begun = {(name, units): pool.submit(held, name, units, runs, seed) for name in KINDS for units in SIZES}
        for (name, units), one in begun.items():
            stated, right = one.result()
            share_ = right / stated if stated >= min(LEAST_STATED, runs) else None
            found.setdefault(name, {})[str(units)] = {"held": share_, "stated": stated / runs}
    table = Table(
        "interval", *(f"{units} units" for units in SIZES), title=f"held the truth, of {runs} each; in brackets: stated"
    )
    for name, by in found.items():
        table.add_row(name, *map(_cell, by.values()))
    show(console, [table], {"runs": runs, "seed": seed, "intervals": found})
    missed = [
        f"{name} at {units} units"
        for name, by in found.items()
        for units, one in by.items()
        if one["held"] is not None and one["held"] < LEAST_HELD
    ]
    if missed:
        raise ShoalError(
            f"intervals that hold the truth in less than {LEAST_HELD:.0%}", got=", ".join(missed), do="see the table"
        )
    return found


def _cell(one: dict[str, Any]) -> str:
    shown = "-" if one["held"] is None else f"{one['held']:.1%}"
    return shown if one["stated"] == 1 else f"{shown} ({one['stated']:.0%})"


def _groups(rng: Draws, units: int) -> np.ndarray:
    """Of each row its group; groups of 1 to some 50 rows."""
    return np.repeat(np.arange(units), np.maximum(1, np.exp(rng.normal(2, 0.8, units)).astype(int)))
