"""95 % intervals of the report's figures: of shares, of means, and of quotients of sums.

Rows of one document are not independent: what is missed in one is often missed in the next. So every interval takes the group
of each row, and is as wide as the number of groups makes it; where each row is a group of its own, it is the textbook's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lgamma

import numpy as np

Z = 1.959964  # standard deviations on either side of the middle that hold 95 % of a normal distribution
LEVELS = (2.5, 97.5)  # percentiles of resamples
RESAMPLES = 1000

Interval = tuple[float, float]
Groups = Sequence[int] | Sequence[str]  # of each row what it is of


@dataclass(frozen=True)
class Figure:
    """A measured value, the 95 % interval of it, and on how many rows of how many groups it was measured."""

    value: float
    interval: Interval
    rows: int
    groups: int

    @property
    def ends(self) -> list[float] | None:
        """The interval for a report; None where it is unbounded, for which JSON has no word."""
        return list(self.interval) if all(np.isfinite(self.interval)) else None


def of_share(hit: Sequence[float], groups: Groups) -> Figure:
    """The share of rows that are a `hit`; where some are one in part (0 to 1) their mean, in an interval wide enough."""
    return Figure(sum(hit) / max(1, len(hit)), share(hit, groups), len(hit), len(set(groups)))


def of_mean(values: Sequence[float], groups: Sequence[int]) -> Figure:
    """The mean of some rows."""
    return Figure(sum(values) / max(1, len(values)), mean(values, groups), len(values), len(set(groups)))


def of_quotient(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, rows: int) -> Figure:
    """A quotient of two sums over groups, of `rows` in all."""
    value = float(np.sum(above)) / max(float(np.sum(below)), 1e-300)
    return Figure(value, quotient(above, below), rows, len(above))


def wilson(hits: float, count: float) -> Interval:
    """Of a share, `hits` of `count` independent rows (Wilson 1927); all of 0 to 1 without any."""
    if count <= 0:
        return 0.0, 1.0
    share, more = hits / count, Z**2 / count
    middle = (share + more / 2) / (1 + more)
    half = Z / (1 + more) * float(np.sqrt(share * (1 - share) / count + more / (4 * count)))
    # none and all are no matter of rounding: a table would say 2.8e-17
    return middle - half if hits > 0 else 0.0, middle + half if hits < count else 1.0


def exact(hits: int, count: int) -> Interval:
    """Of a share, `hits` of `count` independent rows (Clopper and Pearson 1934): it holds the true share in 95 % or more,
    however few are missed; all of 0 to 1 without any."""
    tail = (1 - 0.95) / 2
    low = 0.0 if hits == 0 else _bisected(lambda p: _at_least(hits, count, p) < tail)
    high = 1.0 if hits == count else _bisected(lambda p: 1 - _at_least(hits + 1, count, p) > tail)
    return low, high


def share(hit: Sequence[float], groups: Groups) -> Interval:
    """Of the share of rows that are a `hit`: Wilson's at the number of independent rows that would scatter as these do in their
    groups (Kish's effective sample size), at most all of them."""
    values, of = np.asarray(hit, dtype=float), np.unique(np.asarray(groups), return_inverse=True)[1]
    count, kinds = len(values), int(of.max(initial=-1)) + 1
    if kinds == 0:
        return 0.0, 1.0
    mean = float(values.mean())
    if kinds == 1 or mean in (0.0, 1.0):  # groups that all agree say nothing about how rows of one agree
        return wilson(mean * kinds, kinds)
    off = np.bincount(of, values - mean)
    scatter = float(off @ off) * kinds / (kinds - 1) * (count - 1) / count
    independent = count / max(1.0, scatter / (count * mean * (1 - mean)))
    return wilson(mean * independent, independent)


def mean(values: Sequence[float], groups: Sequence[int]) -> Interval:
    """Of a mean over rows: normal, with the scatter of the groups' sums about it. Unbounded for fewer than two groups."""
    some, of = np.asarray(values, dtype=float), np.unique(np.asarray(groups), return_inverse=True)[1]
    count, kinds = len(some), int(of.max(initial=-1)) + 1
    if kinds < 2:
        return -np.inf, np.inf
    middle = float(some.mean())
    off = np.bincount(of, some - middle)
    half = Z * float(np.sqrt(off @ off * kinds / (kinds - 1))) / count
    return middle - half, middle + half


def resampled(sums: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> Interval:
    """Of a figure of sums over groups: the percentiles of a bootstrap over groups.

    `sums` [G, k] of each group; `figure` gives [R] from sums of resampled groups [R, k]. Unbounded for fewer than two groups.
    """
    if len(sums) < 2:
        return -np.inf, np.inf
    draws = np.random.default_rng(seed)
    totals = np.stack([sums[draws.integers(0, len(sums), len(sums))].sum(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(figure(totals), LEVELS)
    return float(low), float(high)


def quotient(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """Of a quotient of two sums over groups, such as bits over bytes: that of a bootstrap over groups. A resample that holds
    nothing below is left out."""
    pairs = np.stack([np.asarray(above, dtype=float), np.asarray(below, dtype=float)], axis=1)
    pairs = pairs[pairs[:, 1] > 0]
    return resampled(pairs, lambda totals: totals[:, 0] / totals[:, 1], seed=seed)


def _at_least(hits: int, count: int, share_: float) -> float:
    """The chance of so many hits or more, where each of `count` is one by that share (strictly between 0 and 1)."""
    some = np.arange(hits, count + 1)
    ways = np.array([lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) for k in some])
    return float(np.exp(ways + some * np.log(share_) + (count - some) * np.log1p(-share_)).sum())


def _bisected(below: Callable[[float], bool]) -> float:
    """The share up to which `below` holds."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2
