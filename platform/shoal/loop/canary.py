"""What is to become of a canary: the checks of its evidence, and whether that is enough to go on or back.

    step     share of the conversations
    0        shadow: copies of requests, whose answers nobody reads
    1, 2, 3  5, 25, 50 %

Each check compares people who had something bad of the canary with people who had it of the stable version at the same time,
one person once a step (`evidence`). It may be looked at after every request: all together take back an equal canary in at most
3.5 % of all trials (`ALPHA` each), whatever the traffic. A check condemns where the canary is worse for sure, by more than its
margin, and for `LEAST_PEOPLE` or more. A step ends when enough people were seen and all checks that it needs are clear, never
by the clock. Votes are given by whom it pleases: they condemn, and clear nothing. Of several API keys none condemns alone.

What answers are worth nobody knows who has no labels. Two things say that they are worth less: they do not come to an end
(cut by their length), and the model is less sure of them. Unsure is an answer whose sampled NLL is above the 75th
percentile of the stable version's latest ones of some such length, by more than `NATS`, as at most a quarter of its own are:
a mean of one token is spread wider than one of six, and where all is nearly certain, twice nothing is nothing. Another model is
another model: one that is less sure by 0.2 standard deviations nearly always stays (decision 0025). Of a talk the first
answer alone counts, since those after it are no news, and neither clears a step.

Calls of tools that nobody could follow are counted once an answer has been read (decision 0025): not of shadows, whose answers
nobody reads.

Slow is an answer beyond 1.25 times the 95th percentile of what the stable version's latest answers took; none is condemned for
it before some of the stable version's were timed beside its own.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shoal.loop.canary_state import SHARES, Canary
from shoal.loop.evidence import KINDS, LEAST_PEOPLE, OF, Evidence, differences, log_evidence

ALPHA = 0.005  # share of equal canaries that one check condemns at most
CONDEMNED = math.log(1 / ALPHA)  # log likelihood ratio
SLOW = 1.25  # times the stable version's 95th percentile
LEAST_TIMES = 20  # answers of the stable version before any is called slow
LOOKED_AT = 16  # of so many tokens of an answer the NLL of one is known (`engine.signals.EVERY`)

UNSURE = 0.75  # quantile of the stable version's NLL ...
NATS = 0.02  # ... a token: what chance makes of it where all is nearly certain
FEW = 4  # people whose answers of the stable version were timed, before a canary is too slow beside them

Decision = Literal["wait", "next", "back", "done"]


@dataclass(frozen=True)
class Check:
    """One check, as it stands."""

    name: str
    count: int  # people who had something bad of the canary
    of: int  # of so many
    stable: float  # share of the stable version's, over all steps
    more: float  # how much larger the canary's share is than the stable version's at the same time
    margin: float  # how much larger it may be
    evidence: float  # that the canary is worse: log likelihood ratio, up to `CONDEMNED`
    needed: bool  # for a step to end

    @property
    def condemned(self) -> bool:
        return self.evidence >= CONDEMNED and self.more > self.margin and self.count >= LEAST_PEOPLE

    @property
    def cleared(self) -> bool:
        return self.evidence <= 0 or self.more <= self.margin


# name, kind of evidence, how much larger the canary's share may be, whether a step needs it cleared
CHECKS = (
    ("failures", "failures", 0.0125, True),
    ("invalid answers", "invalid", 0.025, True),
    ("slow answers", "slow", 0.1, True),
    ("thumbs down", "down", 0.05, False),
    ("cut answers", "cut", 0.1, False),
    ("unsure answers", "unsure", 0.125, False),
    ("invalid calls", "wrong", 0.05, False),
)
QUALITY = ("cut", "unsure")
MOST = 0.5  # share of the stable version's from which on that is what is asked


def checks(evidence: Evidence) -> list[Check]:
    """All of them."""
    counts = evidence.weighed()
    more = differences(counts)
    return [_check(counts, more, *each) for each in CHECKS]


def _check(all_counts: np.ndarray, more: np.ndarray, name: str, kind: str, margin: float, needed: bool) -> Check:
    counts = all_counts[:, :, KINDS.index(kind)]
    (known, _, bad), (of, _, count) = counts.sum(0)
    stable = bad / known if known else 0.0
    ratio = log_evidence(counts)
    if kind == "slow" and known < FEW:
        ratio = min(ratio, 0.0)  # slow beside what? a canary that has just been loaded slows both
    # worse beside what? and where half of the stable version's are so, it is what is asked
    if kind in QUALITY and (known < LEAST_TIMES or stable >= MOST):
        ratio = min(ratio, 0.0)
    return Check(name, round(count), round(of), float(stable), float(more[KINDS.index(kind)]), margin, ratio, needed)


def judged(canary: Canary, evidence: Evidence) -> tuple[Decision, str]:
    """What is to become of a canary, and why, in words."""
    counts = evidence.weighed()
    more = differences(counts)
    # the others are clear; this is called after each request
    some = [_check(counts, more, *each) for each in CHECKS if more[KINDS.index(each[1])] > each[2]]
    bad = next((check for check in some if check.condemned), None)
    if bad is not None:
        beside = f"{bad.stable:.1%} of the stable version's, {bad.more:+.1%} at the same time"
        return "back", f"{bad.name}: {bad.count} of {bad.of} people, {beside}"
    seen = evidence.people(canary.step)
    if seen < canary.enough:
        return "wait", f"{seen} of {canary.enough} people"
    open_ = next((check for check in some if check.needed and not check.cleared), None)
    if open_ is not None:
        return "wait", f"{open_.name} not clear yet: {open_.count} of {open_.of} people"
    if canary.step + 1 < len(SHARES):
        return "next", f"{seen} people, all checks clear"
    return "done", f"{int(evidence.counts[:, 1, 0, OF].sum())} people over all steps, all checks clear"


def advanced(canary: Canary, since: str) -> Canary:
    """The next step."""
    return replace(canary, step=canary.step + 1, since=since)


class _Latest:
    """The latest values of something, in their order too."""

    def __init__(self, keep: int) -> None:
        self._latest, self._sorted = deque[float](maxlen=keep), list[float]()

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        if len(self._latest) == self._latest.maxlen:
            del self._sorted[bisect_left(self._sorted, self._latest[0])]
        self._latest.append(value)
        insort(self._sorted, value)

    def percentile(self, share: float = 0.95) -> float:
        """The smallest that so many are not above.

        Examples:
            >>> from shoal.loop.canary import _Latest
            >>> latest = _Latest(20)
            >>> for n in range(40):
            ...     latest.add(float(n))
            >>> latest.percentile()
            38.0
        """
        return self._sorted[max(0, math.ceil(share * len(self)) - 1)]


class Pace:
    """How long the stable version's latest answers took, and how sure it was of them: what is slow, and what is unsure."""

    def __init__(self, keep: int = 200) -> None:
        self._keep = keep
        self._first, self._token = _Latest(keep), _Latest(keep)
        self._nll: dict[int, _Latest] = {}  # by `_like`

    def observe(self, first: float, token: float | None, nll: float | None = None, tokens: int = 0) -> None:
        """Seconds to the first token, and of each after it; of the first answer of a talk nats of the sampled tokens, and how
        many `tokens` it has."""
        known = self._nll.setdefault(_like(tokens), _Latest(self._keep))
        for kept, value in ((self._first, first), (self._token, token), (known, nll)):
            if value is not None:
                kept.add(value)

    def is_slow(self, first: float, token: float | None) -> bool | None:
        """Of an answer; None where too little is known."""
        if len(self._first) < LEAST_TIMES:
            return None
        late = first > SLOW * self._first.percentile()
        return late or (
            token is not None and len(self._token) >= LEAST_TIMES and token > SLOW * self._token.percentile()
        )

    def is_unsure(self, nll: float | None, tokens: int = 0) -> bool | None:
        """Of an answer of so many `tokens`; None where too little is known of such."""
        known = self._nll.get(_like(tokens))
        if nll is None or known is None or len(known) < LEAST_TIMES:
            return None
        return nll > known.percentile(UNSURE) + NATS

    def patience(self, least: float, times: float) -> float:
        """Seconds to wait for a token of a canary before it counts as one that does not come."""
        return max(least, times * self._first.percentile()) if len(self._first) >= LEAST_TIMES else math.inf


def _like(tokens: int) -> int:
    """The same for answers of which as many tokens were looked at, or less than twice as many."""
    return (-(-tokens // LOOKED_AT)).bit_length()
