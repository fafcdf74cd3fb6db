"""What a version's requests are compared with: a window of its own, measured once, written aside and renamed.

    rows of one version  ─>  first of each session  ─>  of each slice and signal: mean and spread, by hours of the week (of the
                             day, where there is less than two weeks); how much days differ beyond that; block and scatter of
                             its means; quantiles, to explain with

It never grows with the stream, for what drifts slowly would grow into it. Live requests never look like a held-out set, so it
is of live requests: the first of a version, or those that somebody accepted.

Letters: n requests, F streams, H hours of the week, of the day, or 1 where there is no rhythm (`week`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.errors import DataError
from shoal.loop.detector import BAND, BETS, Stream
from shoal.loop.watched import BY_NAME, WATCHED, are_requests, texts
from shoal.loop.week import chi2, day_to_day, hour_of, parts_of
from shoal.machine import write_aside

FORMAT, VERSION = "shoal.reference", 1
EVERY = "all"  # the slice of all requests
LEARNED = 2_000  # requests of a reference, one a session
LEAST_VALUES = 200  # of a signal, that it is watched
LEAST_SLICE = 300  # requests of a slice that is watched for itself
MOST_SLICES = 8
CLIP = (1.0, 99.0)  # percentiles
ABOVE, BELOW = "above", "below"  # beyond them
FAILED = "failed"  # has no rhythm that is right: what fails at noon each day is to be looked at
BLOCKS = (10, 25, 50)  # values; the first whose means follow each other by less than LAG
LAG = 0.2
WIDER = 1.1  # of the scatter of block means, for it is an estimate
LEAST_BAND = 0.1  # standard deviations of a request: the reference's own error
LEAST_SPREAD = 0.25  # of a signal in a part of the week, in standard deviations of all its values
PART_OF_MEANS, PART_OF_SHARES = 40, 100  # values in each part of the week, or of the day
QUANTILES = 201
USUAL, RHYTHM = 2.3263479, 3.719016  # normal quantiles of what chance stays below in 99 %, and in 99.99 %
MOST_LOG, HALVINGS = 300.0, 12  # of an exponential that is still a number; of a search


@dataclass(frozen=True)
class Standard:
    """What one signal of one slice is like."""

    signal: str
    slice: str
    values: int
    low: float
    high: float  # values beyond `low` and `high` count as these
    mean: list[float]  # [H]
    spread: list[float]  # [H] standard deviations of a request
    block: int
    scatter: float
    share: float | None = None  # of a signal of 0 and 1, or of one that is nearly always `usual`
    usual: float | None = None
    quantiles: list[float] = field(default_factory=list)
    tail: str = ""  # above, below: how often values are beyond `high`, or `low`; "": what they are
    band: float = BAND  # standard deviations of a request that it may move: `BAND`, or more where days differ by more

    def standardised(self, values: np.ndarray, at: np.ndarray) -> np.ndarray:
        """`values` [n] as `detector` takes them, NaN where they are, of requests that came `at` [n], epoch seconds."""
        known = ~np.isnan(values)
        if self.tail:
            found = values > self.high if self.tail == ABOVE else values < self.low
        elif self.share is not None:
            found = values if self.usual is None else values != self.usual
        else:
            found = np.clip(values, self.low, self.high)
        part = hour_of(at, len(self.mean))
        return np.where(known, (found - np.array(self.mean)[part]) / np.array(self.spread)[part], np.nan)

    @property
    def stream(self) -> Stream:
        by_part = self.share is not None and len(self.mean) > 1
        return Stream(self.signal, self.slice, self.block, self.scatter, self.share, self.tail, by_part, self.band)


@dataclass(frozen=True)
class Reference:
    """All that a detector needs to know of requests as they were."""

    weights: str  # of the version that answered them
    began: float  # epoch seconds of the first
    ended: float
    requests: int
    standards: tuple[Standard, ...]
    why: str = ""  # somebody accepted it, and said so

    @property
    def streams(self) -> list[Stream]:
        return [standard.stream for standard in self.standards]

    @property
    def hours(self) -> float:
        return (self.ended - self.began) / 3600

    def standardised(self, table: pa.Table) -> np.ndarray:
        """[F, n] of captured rows, in their order; NaN where a row is of another slice, or has no value."""
        at, slices = moments(table), np.array(texts(table, "slice"), dtype=object)
        raw = {name: BY_NAME[name].of(table) for name in {standard.signal for standard in self.standards}}
        found = np.full((len(self.standards), len(table)), np.nan)
        for row, standard in enumerate(self.standards):
            values = raw[standard.signal]
            if standard.slice != EVERY:
                values = np.where(slices == standard.slice, values, np.nan)
            found[row] = standard.standardised(values, at)
        return found

    def write(self, path: Path) -> None:
        told = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_aside(path, json.dumps(told, allow_nan=False) + "\n", sync=True)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Raises DataError for a file that is none, or of another version."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            form, version = told.pop("format"), told.pop("version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no reference", got=str(error), do="remove it, and it learns anew") from error
        if (form, version) != (FORMAT, VERSION):
            raise DataError(f"{path}", got=f"{form} {version}", allowed=f"{FORMAT} {VERSION}")
        try:
            return cls(**{**told, "standards": tuple(Standard(**one) for one in told["standards"])})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is no reference", got=str(error), do="remove it, and it learns anew") from error


def moments(table: pa.Table) -> np.ndarray:
    """float64 [n], when each request ended, in epoch seconds."""
    return np.asarray(table["at"].to_numpy(zero_copy_only=False), dtype=float) / 1000


def measured(table: pa.Table, weights: str, *, why: str = "") -> Reference:
    """The reference that these rows make, one a session, in their order. Raises DataError where they have no signal that
    could be watched."""
    if not len(table):
        raise DataError("a reference of no requests", do="capture some first")
    at, slices = moments(table), np.array(texts(table, "slice"), dtype=object)
    standards = []
    for name in [EVERY, *_large(slices)]:
        here = np.ones(len(table), bool) if name == EVERY else slices == name
        for signal in WATCHED:
            values = signal.of(table)[here]
            known = ~np.isnan(values)
            if known.sum() >= LEAST_VALUES:
                when = at[here][known]
                whole = _standard(signal.name, name, values[known], when)
                standards += [_banded(one, values[known], when) for one in _with_tails(whole, values[known], when)]
    if not standards:
        wanted = f"{LEAST_VALUES} requests with one signal, such as prompt_tokens"
        raise DataError("a reference without a signal", got=f"{len(table)} requests", allowed=wanted)
    return Reference(weights, float(at.min()), float(at.max()), int(are_requests(table).sum()), tuple(standards), why)


def _large(slices: np.ndarray) -> list[str]:
    """Slices that are watched for themselves: the largest, where there are several."""
    names, counts = np.unique(slices.astype(str), return_counts=True)
    order = sorted(zip(-counts, names.tolist(), strict=True))
    return [name for count, name in order if -count >= LEAST_SLICE and name][:MOST_SLICES] if len(names) > 1 else []


def _standard(signal: str, name: str, values: np.ndarray, at: np.ndarray) -> Standard:
    low, high = (float(edge) for edge in np.percentile(values, CLIP))
    quantiles = np.quantile(values, np.linspace(0, 1, QUANTILES)).tolist()
    is_share = bool(np.isin(values, (0.0, 1.0)).all())
    if is_share or low == high:
        usual = None if is_share else low
        ones = values if usual is None else values != usual
        share, mean, spread = _shares(ones, at, rhythm=signal != FAILED)
        return Standard(signal, name, len(values), low, high, mean, spread, BLOCKS[0], 1.0, share, usual, quantiles)
    clipped = np.clip(values, low, high)
    of_hour, part = parts_of(at, PART_OF_MEANS)
    parts = range(int(of_hour.max()) + 1)
    means = np.array([clipped[part == each].mean() for each in parts])
    spreads = np.array([clipped[part == each].std() for each in parts])
    # the few values of a part may have missed what is rare: beside a spread that is too small it would be far out
    spreads = np.maximum(spreads, float((clipped - means[part]).std()))
    # what is always the same in its part of the week has no spread there at all, and one other request would ring
    spreads = np.maximum(spreads, LEAST_SPREAD * float(clipped.std()))
    block, scatter = _scatter((clipped - means[part]) / spreads[part])
    scatter *= float(np.sqrt(1 + block * len(parts) / len(values)))  # the means of the parts are estimates, too
    mean, spread = means[of_hour].tolist(), spreads[of_hour].tolist()
    return Standard(signal, name, len(values), low, high, mean, spread, block, scatter, quantiles=quantiles)


def _shares(ones: np.ndarray, at: np.ndarray, *, rhythm: bool = True) -> tuple[float, list[float], list[float]]:
    """How often `ones` [n], of 0 and 1, is 1; and by which mean and spread of each part of the day values are standardised [H]:
    none, where parts differ by no more than chance makes of them, or there is to be no `rhythm`."""
    share = float((ones.sum() + 1) / (len(ones) + 2))
    of_hour, part = parts_of(at, PART_OF_SHARES)
    parts = int(of_hour.max()) + 1
    if parts == 1 or not rhythm:
        return share, [0.0], [1.0]
    counts, sums = np.bincount(part, minlength=parts), np.bincount(part, weights=ones, minlength=parts)
    apart = float((counts * (sums / counts - share) ** 2).sum() / (share * (1 - share)))
    if apart <= chi2(parts - 1, RHYTHM):
        return share, [0.0], [1.0]
    sure = 1 - (parts - 1) / apart  # of what parts differ by, the rest is chance (James and Stein)
    shares = (share + sure * ((sums + 2 * share) / (counts + 2) - share))[of_hour]
    return share, shares.tolist(), np.sqrt(shares * (1 - shares)).tolist()


def _with_tails(whole: Standard, values: np.ndarray, at: np.ndarray) -> list[Standard]:
    """It, and of a mean how often values are far out: of the few requests that are new among many old ones this tells more."""
    if whole.share is not None or whole.block != BLOCKS[0]:  # what follows each other is far out in rows, too
        return [whole]
    found = [whole]
    for tail, ones in ((ABOVE, values > whole.high), (BELOW, values < whole.low)):
        share, mean, spread = _shares(ones, at)
        found.append(
            replace(whole, mean=mean, spread=spread, block=BLOCKS[0], scatter=1.0, share=share, quantiles=[], tail=tail)
        )
    return found


def _banded(standard: Standard, values: np.ndarray, at: np.ndarray) -> Standard:
    """It, with a band as wide as one day may be from others, where there are days enough to tell."""
    found = standard.standardised(values, at)
    if standard.share is not None and not standard.stream.by_part:
        found = (found - standard.share) / np.sqrt(standard.share * (1 - standard.share))
    apart = day_to_day(found, at, len(standard.mean))
    return standard if apart is None else replace(standard, band=max(LEAST_BAND, apart))


def _scatter(values: np.ndarray) -> tuple[int, float]:
    """Values in a block so that the means of neighbours hardly follow each other, and the standard deviation of these means; or
    more than that, where few values are far from all others: what is bet on a mean of those is no e-value by its standard
    deviation alone."""
    for block in BLOCKS:
        means = values[: len(values) // block * block].reshape(-1, block).mean(axis=1)
        if len(means) < 4 or _follows(means) < LAG:
            break
    scatter = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return block, max(WIDER * scatter, 1 / float(np.sqrt(block)), WIDER * _honest(values, block))


def _honest(values: np.ndarray, block: int) -> float:
    """The least scatter with which no bet on the mean of `block` independent ones of these `values`, of mean 0, has more than 1
    in the mean: then the mean of exp(l v / (block scatter)), to the power of `block`, is at most exp(l^2 / 2)."""
    bets = np.concatenate([BETS, -BETS])[:, None] / block

    def honest(scatter: float) -> bool:
        most = np.abs(bets).max() * float(np.abs(values).max()) / scatter
        logs = block * np.log(np.exp(bets * values / scatter).mean(axis=1)) if most < MOST_LOG else np.inf
        return bool(np.all(logs <= (bets[:, 0] * block) ** 2 / 2))

    low, high = 0.5 / float(np.sqrt(block)), 1 / float(np.sqrt(block))
    while not honest(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if honest(middle) else (middle, high)
    return high


def _follows(means: np.ndarray) -> float:
    """How much each of `means` is like the one before: lag-1 correlation."""
    off = means - means.mean()
    return float(off[1:] @ off[:-1] / max(float(off @ off), 1e-12))


def explained(standard: Mapping[str, Any] | Standard, values: np.ndarray) -> dict[str, float]:
    """To explain and never to alarm: PSI over tenths of the reference and the Kolmogorov-Smirnov distance of `values` [n], each
    with the size that chance alone stays below in 99 % of all cases for so few values."""
    one = standard if isinstance(standard, Standard) else Standard(**standard)
    values = values[~np.isnan(values)]
    count, before = len(values), one.values
    if not count:
        return {}
    edges = np.unique(np.quantile(one.quantiles, np.linspace(0, 1, 11)[1:-1]))
    old, new = (np.bincount(np.searchsorted(edges, some, side="right"), minlength=len(edges) + 1) / len(some)
                for some in (np.array(one.quantiles), values))  # fmt: skip
    floor = 0.5 / count
    psi = float(((new - old) * np.log(np.maximum(new, floor) / np.maximum(old, floor))).sum())
    grid = np.unique(np.concatenate([one.quantiles, values]))
    apart = [np.searchsorted(np.sort(some), grid, side="right") / len(some) for some in (one.quantiles, values)]
    chance = 1 / count + 1 / before
    return {
        "n": float(count), "psi": psi, "psi_chance": chance * chi2(len(edges), USUAL),
        "ks": float(np.abs(apart[0] - apart[1]).max()), "ks_chance": 1.628 * float(np.sqrt(chance)) + 0.5 / QUANTILES,
    }  # fmt: skip
