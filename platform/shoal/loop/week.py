"""The rhythm of traffic: which hours of the day or of the week requests came in, and how much days differ beyond it.

Letters: n requests, H hours of the week, of the day, or 1 where no rhythm may be known; P parts.
"""

from __future__ import annotations

import numpy as np

DAY, WEEK = 86_400, 7 * 86_400
DAY_HOURS, WEEK_HOURS = 24, 168
TWO_WEEKS, ONE_DAY, QUARTERS = 13.9 * DAY, 0.9 * DAY, 4  # seconds; parts of a day that all have enough values
FEWEST_DAYS = 7  # from which on it may be told how much days differ
# normal quantiles: of a variance that may be as much as 5 % larger; of a day that is another
LOW, HIGH = -1.6448536, 2.0


def hour_of(at: np.ndarray, hours: int) -> np.ndarray:
    """Which of `hours` equal parts of the day, or of the week where they are more than a day has, `at` [n] is in, UTC."""
    span = WEEK if hours > DAY_HOURS else DAY
    return np.asarray(at % span // (span / hours), dtype=int)


def parts_of(at: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part each hour is in [H], and which each of `at` [n]: parts of neighbouring hours that have `least` values, or 0.4
    of them beside busy ones, so that a quiet night hides no rhythm. Hours of the week where `at` spans two weeks, of the day
    where it spans one, else one part of all."""
    weekly = len(at) > 0 and np.ptp(at) >= TWO_WEEKS
    quarters = np.bincount(hour_of(at, QUARTERS), minlength=QUARTERS)
    if not weekly and np.ptp(at) < ONE_DAY and (quarters < least).any():
        return np.zeros(1, int), np.zeros(len(at), int)
    hours = WEEK_HOURS if weekly else DAY_HOURS
    hour = hour_of(at, hours)
    found, part, full = np.zeros(hours, int), 0, 0
    for each, count in enumerate(np.bincount(hour, minlength=hours).tolist()):
        whole = full >= (0.4 * least if count >= least else least)
        part, full = (part + 1, count) if whole else (part, full + count)
        found[each] = part
    if full < least:  # the end goes on in the beginning
        found[found == part] = 0
    return (found, found[hour]) if found.any() else (np.zeros(1, int), np.zeros(len(at), int))


def day_to_day(values: np.ndarray, at: np.ndarray, hours: int) -> float | None:
    """How far the mean of one day may be from that of others, beyond what its own requests make of it: `HIGH` standard
    deviations between days, by the upper 95 % bound of their variance. `values` [n] have mean 0 in each of the `hours` [H]
    that their means were taken from. None where there are fewer than `FEWEST_DAYS`."""
    days, index, counts = np.unique(np.floor(at / DAY), return_inverse=True, return_counts=True)
    if len(days) < FEWEST_DAYS:
        return None
    means = np.bincount(index, weights=values) / counts
    means_of = np.ptp(at) / WEEK if hours == WEEK_HOURS else float(len(days))  # days that each mean is of
    free = len(days) * (1 - 1 / max(means_of, 1.5))
    total = float((counts * means**2).sum()) * len(days) / free
    most = total * free / max(chi2(free, LOW), 1e-3)
    return HIGH * float(np.sqrt(max(0.0, most - len(days) * float(values.var())) / counts.sum()))


def chi2(degrees: float, normal: float) -> float:
    """The quantile of chi-squared that `normal` is of a normal distribution (Wilson and Hilferty 1931): that of 99 % is right
    to 0.5 % from 3 degrees on."""
    degrees = max(1.0, degrees)
    part = 2 / (9 * degrees)
    return degrees * max(0.0, 1 - part + normal * float(np.sqrt(part))) ** 3
