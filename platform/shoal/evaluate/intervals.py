"""95 % intervals of what is stated: of shares, means, quotients of sums, other figures of sums, and medians.

Rows of one document are not independent: what is missed in one is often missed in the next. So every interval takes the group
of each row, and is as wide as the number of groups makes it.

shares      exact (Clopper and Pearson 1934); of clustered rows at an effective sample size (Korn and Graubard 1998)
all others  the delete-one-group jackknife with Student's t, or a studentised bootstrap of it where that is wider
none        of fewer than `LEAST` groups, or where fewer than `LEAST` groups differ: no method covers there

`shoal bench intervals` says how often they cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEAST = 5  # groups
TAIL = 0.025  # on either side
RESAMPLES = 1000
# what the tail of the bootstrap is less than that of few groups, up to so many: of skewed values it covers too little
CAUTION, FEW = 0.019, 25
AT_ONCE = 2_000_000  # numbers of a bootstrap in memory

Interval = tuple[float, float]
Groups = Sequence[int] | Sequence[str]  # of each row what it is of
UNKNOWN: Interval = (-np.inf, np.inf)


@dataclass(frozen=True)
class Figure:
    """A measured value, the 95 % interval of it, and on how many rows of how many groups it was measured."""

    value: float
    interval: Interval
    rows: int
    groups: int

    @property
    def ends(self) -> list[float] | None:
        """The interval for a report; None where there is none, for which JSON has no word."""
        return list(self.interval) if all(np.isfinite(self.interval)) else None

    def between(self, form: str = ".3f") -> str:
        """The interval as it stands beside the value."""
        return between(self.ends, form, self.groups)


def between(ends: Sequence[float] | None, form: str, groups: int | None = None) -> str:
    """An interval as a reader sees it, or why there is none."""
    if ends is not None:
        return f"{ends[0]:{form}} to {ends[1]:{form}}"
    return few(groups)


def few(groups: int | None) -> str:
    """Why there is no interval."""
    if groups is None:
        return f"too few groups, at least {LEAST}"
    if groups < LEAST:
        return f"too few: {groups} groups, at least {LEAST}"
    return f"too few of {groups} groups differ, at least {LEAST}"


def of_share(hit: Sequence[float], groups: Groups) -> Figure:
    """The share of rows that are a `hit`; where some are one in part (0 to 1) their mean, in an interval wide enough."""
    return _of_rows(hit, groups, part)


def of_mean(values: Sequence[float], groups: Groups) -> Figure:
    """The mean of some rows."""
    return _of_rows(values, groups, quotient)


def of_bounded(values: Sequence[float], groups: Groups, most: float) -> Figure:
    """The mean of values of 0 to `most` each. Where too few groups differ for the interval of a mean: the commonest value, for
    as many rows as may be others at most."""
    found = of_mean(values, groups)
    if found.ends is not None or found.groups < LEAST or not np.isfinite([*values, most]).all():
        return found
    kinds, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    usual = float(kinds[counts.argmax()])
    others = of_share([value != usual for value in values], groups).interval[1]
    low, high = usual - others * max(usual, 0.0), usual + others * max(most - usual, 0.0)
    return Figure(found.value, (min(low, found.value), max(high, found.value)), found.rows, found.groups)


def of_quotient(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, rows: int) -> Figure:
    """A quotient of two sums over groups, of `rows` in all."""
    value = float(np.sum(above)) / max(float(np.sum(below)), 1e-300)
    return Figure(value, quotient(above, below), rows, len(above))


def of_part(hits: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Figure:
    """A share, by the hits and rows of each group."""
    rows = float(np.sum(counts))
    return Figure(float(np.sum(hits)) / max(1.0, rows), part(hits, counts), int(rows), len(counts))


def exact(hits: float, count: float) -> Interval:
    """Of a share, `hits` of `count` independent rows (Clopper and Pearson 1934): it holds the true share in 95 % or more,
    however few are missed; all of 0 to 1 without any."""
    low = float(special.betaincinv(hits, count - hits + 1, TAIL)) if hits > 0 else 0.0
    return low, float(special.betaincinv(hits + 1, count - hits, 1 - TAIL)) if hits < count else 1.0


def part(hits: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Interval:
    """Of a share, by the hits and rows of each group: the exact one at as many independent rows as would scatter as these
    groups do, and fewer, since their scatter is itself uncertain (Korn and Graubard 1998). Where fewer than `LEAST` groups have
    a hit, or a miss, at least as wide as if each group were one row."""
    found, rows = np.asarray(hits, dtype=float), np.asarray(counts, dtype=float)
    groups, count = len(rows), float(rows.sum())
    if groups < LEAST or count <= 0 or not np.isfinite(found).all():
        return UNKNOWN
    share = min(max(float(found.sum()) / count, 0.0), 1.0)
    if groups == count:
        return exact(share * count, count)
    coarse = exact(share * groups, groups)
    off = found - share * rows
    square = float(off @ off)
    if share in (0.0, 1.0):
        return coarse
    independent = count
    if square > 0:
        scatter = square * groups / (groups - 1) / count**2 * (count - 1) / count
        freedom = max(1.0, min(count**2 / float(rows @ rows) - 1, 2 * square**2 / float((off**4).sum())))
        narrower = student(1 - TAIL, count - 1) / student(1 - TAIL, freedom)
        independent = min(count, share * (1 - share) / scatter * narrower**2)
    low, high = exact(share * independent, independent)
    if min(int((found > 0).sum()), int((found < rows).sum())) < LEAST:
        return min(low, coarse[0]), max(high, coarse[1])
    return low, high


def quotient(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray) -> Interval:
    """Of a quotient of two sums over groups, such as bits over bytes. A group that holds nothing below is left out."""
    pairs = np.stack([np.asarray(above, dtype=float), np.asarray(below, dtype=float)], axis=1)
    pairs = pairs[pairs[:, 1] > 0]
    low, high = of_sums(pairs, lambda totals: totals[:, 0] / totals[:, 1], pairs[:, 1])
    return max(low, 0.0) if np.isfinite(low) and pairs.min() >= 0 else low, high


def of_sums(sums: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], sizes: np.ndarray) -> Interval:
    """Of a figure of sums over groups. `sums` [G, k] of each group; `figure` gives [R] from sums over groups [R, k]; `sizes`
    [G] of the groups."""
    if len(sums) < LEAST:
        return UNKNOWN
    total = sums.sum(0)
    if not np.isfinite(total).all():
        return UNKNOWN
    return jackknifed(float(figure(total[None])[0]), figure(total - sums), sizes)


def jackknifed(value: float, without: np.ndarray, sizes: np.ndarray) -> Interval:
    """Of a `value`, by what it is `without` each group [G], and the groups' `sizes` [G]: the wider of two. Student's t, with as
    many groups as would weigh the same (Kish), for a few large ones say little of how all scatter; and a studentised
    bootstrap, for where most groups are alike and a few are far off, mean and scatter are too small together."""
    count = len(without)
    if count < LEAST or not np.isfinite(without).all():
        return UNKNOWN
    pseudo = value + (count - 1) * (value - without)
    scale = max(abs(value), float(np.abs(pseudo - value).max()))
    _, same = np.unique(np.round((pseudo - value) / (scale or 1.0), 9), return_counts=True)
    if count - same.max() < LEAST and same.max() > 1:
        return UNKNOWN
    error = float(pseudo.std(ddof=1)) / count**0.5
    half = student(1 - TAIL, max(1.0, float(sizes.sum()) ** 2 / float(sizes @ sizes) - 1))
    tail = TAIL - CAUTION * min(1.0, (FEW / count) ** 0.5)
    high, low = np.quantile(_students(pseudo - pseudo.mean(), sizes, error), (tail, 1 - tail), method="nearest")
    return value - error * max(half, float(low)), value + error * max(half, -float(high))


def crossed(values: np.ndarray, groups: Groups) -> Interval:
    """Of the mean of differences [S, n] of S runs on the same rows: over runs and the rows' groups, both (Cameron, Gelbach and
    Miller 2011), with Student's t of the fewer."""
    kinds, of = np.unique(np.asarray(groups), return_inverse=True)
    if min(len(values), len(kinds), int((np.bincount(of, (values != 0).any(0)) > 0).sum())) < LEAST:
        return UNKNOWN
    middle = float(values.mean())
    cells = np.stack([np.bincount(of, row - middle) for row in values])
    runs, rows = (float((cells.sum(axis) ** 2).sum()) * n / (n - 1) for axis, n in ((1, len(values)), (0, len(kinds))))
    squares = max(runs, rows, runs + rows - float((cells**2).sum()))
    half = student(1 - TAIL, min(cells.shape) - 1) * squares**0.5 / values.size
    return middle - half, middle + half


def median(values: Sequence[float]) -> Interval:
    """Of the median of independent values: two of them, as far from the middle as 95 % asks for."""
    some = sorted(values)
    count = len(some)
    out = next((at for at in range(count // 2, -1, -1) if special.bdtr(at, count, 0.5) <= TAIL), None)
    return UNKNOWN if out is None else (some[out], some[-1 - out])


def student(below: float, freedom: float) -> float:
    """What a Student's t with so many degrees of freedom is `below` by that chance."""
    return float(special.stdtrit(freedom, below))


def _of_rows(values: Sequence[float], groups: Groups, interval: Callable[[np.ndarray, np.ndarray], Interval]) -> Figure:
    """The mean of rows, with the `interval` of the sums and sizes of their groups."""
    kinds, of = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(of, np.asarray(values, dtype=float)), np.bincount(of).astype(float)
    return Figure(sum(values) / max(1, len(values)), interval(sums, sizes), len(values), len(kinds))


def _students(off: np.ndarray, sizes: np.ndarray, error: float) -> np.ndarray:
    """Student's t of resamples of groups that are `off` the value [G], where a sum of `sizes` [G] is divided by; infinite where
    a resample does not scatter."""
    count, draws, found = len(off), np.random.default_rng(0), []
    part = sizes / sizes.mean()
    for begin in range(0, RESAMPLES, some := max(1, AT_ONCE // count)):
        drawn = draws.integers(0, count, (min(some, RESAMPLES - begin), count))
        mine, size = off[drawn], part[drawn]
        total = size.mean(1)
        middle = mine.mean(1) / total
        rest = mine - middle[:, None] * size
        scatter = np.sqrt(np.square(rest).sum(1) / (count * (count - 1))) / total
        far = np.where(middle == 0, 0.0, np.copysign(np.inf, middle))
        found.append(np.divide(middle, scatter, out=far, where=scatter > 1e-9 * error))
    return np.concatenate(found)
