"""`shoal bench drift`: how often `shoal watch` rings on ordinary traffic, and how soon it sees a new subject.

Each run writes simulated rows into a capture and lets `loop.watch.Watch` look at it, with the defaults of the command. No model
is needed. The watch learns for two weeks; then come 60 days in which nothing changes, or in which a fifth of the sessions turn
to a new subject.

Traffic has users who ask more or less often, each with a taste of their own, about subjects that differ in every signal. More
is asked by day than by night. With weekends, Saturday and Sunday have fewer requests and other subjects. With sessions, a user
asks several things in a row about one subject, and what they ask is alike.
"""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.turns import show
from shoal.errors import ShoalError, UsageError
from shoal.loop.capture import ROWS, Capture
from shoal.loop.looked import FOLDER, STATE
from shoal.loop.rows import SCHEMA
from shoal.loop.watch import HOURS, Watch
from shoal.machine import cores

DAY = 86_400
MONDAY = 1_795_996_800  # 2026-11-30 0:00, UTC
WATCHED_DAYS = 60
SUBJECTS, USERS = 8, 300
WEEKEND_SHARE = 0.4  # of the sessions of another day
TURNS, PAUSE_S = 4.0, 120.0  # requests in a session and seconds between them, in the mean
BETWEEN, ALIKE, TASTE = 0.7, 0.7, 0.5  # standard deviations between subjects, sessions of one user, and users
SHIFT, WITHIN_DAYS = 0.2, 3.0  # share of the sessions that turn to the new subject; days within which it is to be seen
MOST_FALSE, LEAST_SEEN = 0.05, 0.95  # shares of runs


@dataclass(frozen=True)
class Pattern:
    """What traffic is like."""

    name: str
    weekends: bool
    sessions: bool


PATTERNS = (
    Pattern("independent requests", weekends=False, sessions=False),
    Pattern("weekends", weekends=True, sessions=False),
    Pattern("sessions", weekends=False, sessions=True),
    Pattern("weekends and sessions", weekends=True, sessions=True),
)


def drift(console: Console, *, runs: int, daily: int, seed: int = 0) -> None:
    """Print, of each pattern, how many of `runs` had a false alarm in 60 days, and how many saw a new subject within three.
    `daily`: sessions of a working day. Raises UsageError, and ShoalError where a share is missed."""
    if runs < 1 or daily < 50:
        raise UsageError("--runs and --daily", got=f"{runs} and {daily}", allowed="1 run and 50 sessions, or more")
    found = {}
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        begun = [
            (pattern, [pool.submit(alarm_day, pattern, daily, (seed, run, 0)) for run in range(runs)],
             [pool.submit(alarm_day, pattern, daily, (seed, run, 1), SHIFT) for run in range(runs)])
            for pattern in PATTERNS
        ]  # fmt: skip
        for pattern, quiet, moved in begun:
            found[pattern.name] = _counted([one.result() for one in quiet], [one.result() for one in moved])
    show(console, [_shown(found, runs, daily)], {"runs": runs, "daily": daily, "traffic": found})
    missed = [
        name for name, one in found.items() if one["false"] > MOST_FALSE * runs or one["seen"] < LEAST_SEEN * runs
    ]
    if missed:
        raise ShoalError("too many false alarms, or new subjects seen late", got=", ".join(missed), do="see the table")


def _counted(quiet: list[float | None], moved: list[float | None]) -> dict[str, Any]:
    """Of the days of alarms: how many were false, how many in time, and when; None where too many were missed to tell."""
    days = np.array([np.inf if day is None else day for day in moved])
    middle, most = float(np.median(days)), float(days.max())
    return {
        "false": sum(day is not None for day in quiet), "seen": int(((days >= 0) & (days <= WITHIN_DAYS)).sum()),
        "median_days": middle if np.isfinite(middle) else None, "most_days": most if np.isfinite(most) else None,
    }  # fmt: skip


def _shown(found: dict[str, dict[str, Any]], runs: int, daily: int) -> Table:
    table = Table(title=f"shoal watch, {runs} runs of each kind of traffic, {daily} sessions a working day")
    heads = f"false alarms in {WATCHED_DAYS} days", f"seen in {WITHIN_DAYS:g} days", "days, median", "most"
    for name in ("traffic", *heads):
        table.add_column(name, justify="left" if name == "traffic" else "right")
    for name, one in found.items():
        days = ("-" if one[key] is None else f"{one[key]:.1f}" for key in ("median_days", "most_days"))
        table.add_row(name, f"{one['false']} of {runs}", f"{one['seen']} of {runs}", *days)
    return table


def alarm_day(pattern: Pattern, daily: int, seed: tuple[int, ...], shift: float = 0.0) -> float | None:
    """Days from the change, or from the end of the reference where `shift` is 0, to the alarm; None without one. The change
    comes within the first week after the reference, on another day of the week for each seed."""
    rng = np.random.default_rng(seed)
    learned = HOURS / 24
    change = learned + (1 + int(rng.integers(7)) if shift else 0)
    days = learned + 1 + WATCHED_DAYS if not shift else change + WITHIN_DAYS + 1
    with tempfile.TemporaryDirectory() as folder:
        capture = Capture(folder, create=True)
        part = capture.folder / ROWS / "day=2026-11-27" / "part-bench.parquet"
        part.parent.mkdir(parents=True)
        pq.write_table(traffic(rng, pattern, days, daily, change if shift else None, shift), part)
        Watch(folder, hours=HOURS).look(MONDAY + days * DAY)
        state = json.loads((Path(folder) / FOLDER / STATE).read_text())
    if state["detector"] is None:
        raise UsageError("--daily", got=daily, allowed="more: two weeks made no reference")
    alarm = state["detector"]["alarm"]
    return None if alarm is None else float((alarm["at"] - MONDAY) / DAY - change)


def traffic(
    rng: np.random.Generator, pattern: Pattern, days: float, daily: int, change: float | None, shift: float
) -> pa.Table:
    """Captured rows of `days`, from a Monday on, in the order of their times. From the day `change` on a share `shift` of the
    sessions has a new subject."""
    start = _starts(rng, pattern, days, daily)
    busy = 1 / (10 + np.arange(USERS))
    user = rng.choice(USERS, len(start), p=busy / busy.sum())
    hour, weekend = start / 3600 % 24, pattern.weekends & (start // DAY % 7 >= 5)
    # by day half of the subjects are asked about more, at weekends others
    lean = np.linspace(1, -1, SUBJECTS)[None] * (np.sin((hour - 6) / 12 * np.pi) - 1.5 * weekend)[:, None]
    odds = np.exp(lean + rng.normal(0, 0.5, (USERS, SUBJECTS))[user]).cumsum(axis=1)
    subject = (rng.random(len(start))[:, None] * odds[:, -1:] > odds).sum(axis=1)
    if change is not None:
        subject[(start >= change * DAY) & (rng.random(len(start)) < shift)] = SUBJECTS
    kinds = BETWEEN * rng.normal(size=(SUBJECTS + 1, 4))
    # 2 standard deviations of the surprisal: of the shop's new catalogue it was 3
    kinds[SUBJECTS] = (3.0, 1.5, -1.0, 1.0)
    own = kinds[subject] + TASTE * rng.normal(size=(USERS, 4))[user]
    turns = rng.geometric(1 / TURNS, len(start)) if pattern.sessions else np.ones(len(start), int)
    own += (ALIKE if pattern.sessions else 0.0) * rng.normal(size=own.shape)
    row = np.repeat(np.arange(len(start)), turns)
    turn = np.arange(len(row)) - np.repeat(turns.cumsum() - turns, turns)
    at = start[row] + turn * rng.exponential(PAUSE_S, len(row))
    order = np.argsort(at, kind="stable")
    order = order[at[order] < days * DAY]
    return _rows(rng, at[order], row[order], own[row[order]], user[row[order]], pattern)


def _starts(rng: np.random.Generator, pattern: Pattern, days: float, daily: int) -> np.ndarray:
    """When sessions begin, in seconds after the first Monday, 0:00."""
    day = np.arange(int(np.ceil(days)))
    volume = daily * np.where(pattern.weekends & (day % 7 >= 5), WEEKEND_SHARE, 1.0) * rng.gamma(100, 0.01, len(day))
    counts = rng.poisson(volume)
    by_hour = 1 + 0.9 * np.sin((np.arange(24) - 8) / 12 * np.pi)
    hour = rng.choice(24, int(counts.sum()), p=by_hour / by_hour.sum())
    found: np.ndarray = np.repeat(day, counts) * DAY + (hour + rng.random(len(hour))) * 3600
    return np.sort(found[found < days * DAY])


def _rows(
    rng: np.random.Generator, at: np.ndarray, session: np.ndarray, own: np.ndarray, user: np.ndarray, pattern: Pattern
) -> pa.Table:
    """Rows of requests that came `at` [n], in a `session` [n] of a `user` [n] each; `own` [n, 4]: what it is about."""
    count = len(at)
    noise = rng.normal(size=(count, 4))
    first, second, third, fourth = (own + noise).T
    who = user if pattern.sessions else np.arange(count)
    gaps = np.exp(-4 + 0.3 * second)
    columns: dict[str, Any] = {
        "id": np.arange(count).astype(str), "at": np.round((MONDAY + at) * 1000).astype(np.int64),
        "weights": np.full(count, "a"), "status": np.where(rng.random(count) < 0.002, 500, 200),
        "slice": np.where(user % 3 == 0, "desk", "shop"), "subject": np.char.add("user-", who.astype(str)),
        "conversation": np.char.add("talk-", np.arange(count).astype(str)),
        "prompt_surprisal": 4 + first, "prompt_nll": 3 + 0.5 * first + 0.5 * noise[:, 1],
        "router_distance": np.exp(0.3 * second), "router_bound": gaps, "answer_nll": 1 + 0.3 * second,
        "layers": np.where(gaps > np.exp(-4), 12, 6), "prompt_tokens": np.round(np.exp(4 + 0.6 * third)),
        "prompt_bytes": np.round(np.exp(4 + 0.6 * third) * (4 + 0.4 * first)),
        "answer_tokens": np.round(np.exp(4 + 0.5 * fourth)), "finish": np.where(fourth > 2.2, "length", "stop"),
    }  # fmt: skip
    given = [pa.array(columns[name]).cast(kind) if name in columns else pa.nulls(count, kind)
             for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)]  # fmt: skip
    return pa.table(given, schema=SCHEMA)
