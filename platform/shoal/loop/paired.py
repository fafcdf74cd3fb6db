"""Two models on the same questions: is one no worse than the other, how surely, and how many questions would it take.

Scores are 0 to 1 a question; what is compared is their difference, question by question, so that a hard one is hard for both.
Bounds are one-sided 95 %, as wide as the groups make them (questions of one person or document are not independent), by
Student's t, and never narrower than what no difference at all among so few would allow (as Wilson's for a share of 0). Of
fewer than five groups there are none: -1 and 1.

Letters: n questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95, Z90 = 1.644854, 1.281552  # one-sided 95 %; and 90 % power
MARGIN = 0.03  # a share that may be lost
LEAST_RECENT = 200  # questions on which a candidate must be better

PASS, FAIL, INCONCLUSIVE, SKIPPED = "pass", "fail", "inconclusive", "skipped"


@dataclass(frozen=True)
class Check:
    """One thing that was held against the stable version. `value` with its bounds `low` and `high`, and `limit`, which it must
    keep; `needed`: questions that it would take to say; `used`: the share of its margin that is taken (`margins`)."""

    name: str
    status: str  # pass, fail, inconclusive or skipped
    told: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    items: int = 0
    groups: int = 0
    needed: int | None = None
    used: float | None = None


@dataclass(frozen=True)
class Paired:
    """The mean difference of a candidate's scores from the other's, with its bounds."""

    mean: float
    low: float  # 95 % one-sided
    high: float
    items: int
    groups: int
    apart: float  # mean square of the differences: of scores of 0 and 1 the share of questions on which the two differ
    alone: float  # questions that tell as much as one independent of all others does

    def needed(self, margin: float, true: float = 0.0) -> int | None:
        """Questions of this kind with which 9 of 10 candidates whose true difference is `true` are found to be above -`margin`;
        None where none are enough."""
        if true <= -margin:
            return None
        apart = max(self.apart, Z95**2 / max(self.items, 1))
        return math.ceil((Z95 + Z90) ** 2 * min(apart, 1.0) * self.alone / (margin + true) ** 2)


def paired(candidate: Sequence[float], other: Sequence[float], groups: Sequence[int]) -> Paired:
    """Of n scores each, 0 to 1, and the group of each question."""
    import numpy as np  # which who reads a verdict, as `shoal --help` does, need not load

    from shoal.evaluate.intervals import LEAST, student

    off = np.asarray(candidate, dtype=float) - np.asarray(other, dtype=float)
    of = np.unique(np.asarray(groups), return_inverse=True)[1]
    count, kinds = len(off), int(of.max(initial=-1)) + 1
    if not count:
        return Paired(0.0, -1.0, 1.0, 0, 0, 0.0, 1.0)
    mean, apart = float(off.mean()), float((off**2).mean())
    alone = 1.0
    if kinds > 1 and off.var() > 0:
        sums = np.bincount(of, off - mean)
        scatter = float(sums @ sums) * kinds / (kinds - 1) * (count - 1) / count
        alone = max(1.0, scatter / (count * float(off.var())))
    effective = count / alone
    spread = math.sqrt(max(0.0, apart + Z95**2 / effective - mean**2) / effective)
    if kinds < LEAST:  # little says how much alike the answers to one person's questions are
        return Paired(mean, -1.0, 1.0, count, kinds, apart, alone)
    half = student(0.95, kinds - 1) * spread
    return Paired(mean, max(-1.0, mean - half), min(1.0, mean + half), count, kinds, apart, alone)


def not_worse(found: Paired, margin: float = MARGIN) -> tuple[str, int | None]:
    """Whether a candidate is shown to lose at most `margin`, and, where that cannot be said, the questions it takes. It fails
    where it is worse for sure, or lost more than that as measured."""
    if found.items and found.low >= -margin:
        return PASS, None
    if found.items and (found.high < 0 or found.mean <= -margin):
        return FAIL, None
    return INCONCLUSIVE, found.needed(margin, min(0.0, found.mean)) if found.items else None


def better(found: Paired, least: int) -> tuple[str, int | None]:
    """Whether a candidate is shown to be better, on at least so many questions."""
    if found.items < least:
        return INCONCLUSIVE, least
    if found.low > 0:
        return PASS, None
    if found.mean <= 0:
        return FAIL, None
    return INCONCLUSIVE, math.ceil((Z95 + Z90) ** 2 * found.apart * found.alone / found.mean**2)
