"""What routing really loses, and how surely: the mean regret of re-runs, with bounds that hold however often one looks.

    re-runs ─> batches of 25 ─> windows, one begun every 20 batches ─> mean, and bounds that hold at all times at once

A batch's mean is moved by what the router predicted (prediction-powered inference): by how much more it predicted of all
requests since the last batch than of those that were asked again, times a factor that earlier batches give. So that a sample of
quiet hours speaks for the busy ones too, as far as the router sees the difference.

The bounds are an asymptotic confidence sequence (Waudby-Smith et al., arXiv 2103.06476): of t batches with v, the sum of the
squared standard errors of their means, mean +- sqrt(2 (v r^2 + 1) / (t^2 r^2) log(1 + sqrt(v r^2 + 1) / (2 d))). Windows share
the errors: the k-th may be wrong with probability `WRONG` / (k (k + 1)), on both sides together. So a long quiet past gives no
inertia, and all of them are right for ever with probability 1 - `WRONG`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.loop.rows import RERUN
from shoal.loop.watched import column, texts

BATCH = 25  # re-runs whose mean counts as one number
EVERY = 20  # batches from one window's beginning to the next
KEPT = 4  # windows
LEAST = 5  # batches, and re-runs that lost something, before a window says anything: its errors are estimates
BEST = 16  # batches at which its bounds are narrowest
WRONG = 0.05
# standard deviation of a regret, in tolerances, that is reckoned with at least: 25 zeros are not certain
LEAST_SPREAD = 0.5


@dataclass
class Window:
    """The batches since one moment."""

    number: int  # from 1
    batches: int = 0
    total: float = 0.0  # of the batches' means
    variance: float = 0.0  # sum of the squared standard errors of these
    first: float = 0.0  # the first of them
    lost: int = LEAST  # re-runs that lost something; in a file that does not say, enough

    def take(self, mean: float, variance: float, lost: int = 0) -> None:
        """One more batch."""
        self.lost += lost
        self.first = self.first or variance
        self.batches, self.total, self.variance = self.batches + 1, self.total + mean, self.variance + variance

    @property
    def mean(self) -> float:
        return self.total / self.batches

    @property
    def known(self) -> bool:
        return self.batches >= LEAST and self.lost >= LEAST

    @property
    def margin(self) -> float:
        """How far the mean regret is from `mean` at most; infinite while little is known: of rare losses the mean and its
        errors are too small together."""
        if not self.known:
            return math.inf
        wrong = WRONG / (self.number * (self.number + 1))
        sharp = (-2 * math.log(wrong) + math.log(-2 * math.log(wrong)) + 1) / (BEST * self.first)  # r^2
        grown = self.variance * sharp + 1
        return math.sqrt(2 * grown / (self.batches**2 * sharp) * math.log(1 + math.sqrt(grown) / wrong))


@dataclass
class Regret:
    """Of one version."""

    tolerance: float = 0.0  # nats a token that its router was fitted to keep
    reruns: int = 0
    # of what the router predicted of requests since the last batch: n, sum, sum of squares
    requests: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    pending: list[list[float]] = field(default_factory=list)  # [regret, bound] of re-runs that make no batch yet
    # of all batches: n, and sums of regret, bound, regret x bound, bound^2
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    windows: list[Window] = field(default_factory=lambda: [Window(1, lost=0)])

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Regret:
        """What `asdict` made of one."""
        return cls(**{**saved, "windows": [Window(**one) for one in saved["windows"]]})

    def update(self, table: pa.Table) -> None:
        """Take in rows of one version, in their order."""
        is_rerun = np.array([role == RERUN for role in texts(table, "role")], bool)
        regrets, bounds = column(table, "regret"), column(table, "regret_bound")
        asked, promised = column(table, "router_bound"), column(table, "tolerance")
        routed = ~is_rerun & ~np.isnan(asked) & np.isnan(promised)
        for place in np.flatnonzero(routed | (is_rerun & ~np.isnan(regrets) & ~np.isnan(bounds))).tolist():
            if routed[place]:
                value = float(asked[place])
                self.requests = [a + b for a, b in zip(self.requests, (1.0, value, value**2), strict=True)]
                continue
            if not np.isnan(promised[place]):
                self.tolerance = float(promised[place])
            self.add([[float(regrets[place]), float(bounds[place])]])

    def add(self, reruns: list[list[float]]) -> None:
        """Take in re-runs: regret and bound of each."""
        for one in reruns:
            self.pending.append(one)
            self.reruns += 1
            if len(self.pending) == BATCH:
                self._batch()

    def told(self) -> dict[str, float] | None:
        """`mean`, `low` and `high` of the regret and the `tolerance`, in nats a token, and how many `reruns` they are of: those
        of the window that shows most surely that the tolerance is broken, else of the longest. None while little is known."""
        known = [window for window in self.windows if window.known]
        if not known:
            return None
        shown = max(known, key=lambda window: (max(window.mean - window.margin, self.tolerance), window.batches))
        low, high = max(0.0, shown.mean - shown.margin), shown.mean + shown.margin
        found = {"mean": shown.mean, "low": low, "high": high, "tolerance": self.tolerance}
        return {name: round(float(value), 6) for name, value in found.items()} | {
            "reruns": float(BATCH * shown.batches)
        }

    def saved(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def _batch(self) -> None:
        """The re-runs that wait make one more batch of each window."""
        regret, bound = np.array(self.pending).T
        count, total, squares = self.requests
        factor = self._factor() if count > 1 else 0.0
        mean, of_all = float((regret - factor * bound).mean()), 0.0
        if factor:
            of_all = (squares - total**2 / count) / (count - 1) / count
            mean += factor * total / count
        least = (LEAST_SPREAD * self.tolerance) ** 2 or 1e-12
        variance = max(float((regret - factor * bound).var(ddof=1)), least) / BATCH + factor**2 * max(of_all, 0.0)
        sums = (BATCH, regret.sum(), bound.sum(), (regret * bound).sum(), (bound**2).sum())
        self.sums = [a + float(b) for a, b in zip(self.sums, sums, strict=True)]
        self.pending, self.requests = [], [0.0, 0.0, 0.0]
        if self.windows[-1].batches >= EVERY:
            self.windows = [*self.windows, Window(self.windows[-1].number + 1, lost=0)][-KEPT:]
        for window in self.windows:
            window.take(mean, variance, int((regret > 0).sum()))

    def _factor(self) -> float:
        """Nats of regret for a nat of the router's bound, by the batches before; 0 where they do not say."""
        count, regrets, bounds, products, squares = self.sums
        spread = squares - bounds**2 / count if count else 0.0
        return (products - regrets * bounds / count) / spread if spread > 1e-12 else 0.0


def broken(told: Mapping[str, float] | None) -> bool:
    """Whether the router does not keep what it was fitted to, by `Regret.told`."""
    return told is not None and told["low"] > told["tolerance"]
