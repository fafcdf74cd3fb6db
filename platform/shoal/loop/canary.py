"""The evidence of a canary: what it and the stable version did at the same time, and whether that is enough to go on or back.

    step     share of the conversations
    0        shadow: copies of requests, whose answers nobody reads
    1, 2, 3  5, 25, 50 %

Each check is Wald's sequential test of a share (of answers that failed, were invalid, slow, cut or unsure, of calls that are
invalid, of thumbs down): it may be looked at after every request, and condemns a good version in `ALPHA` of the cases and
clears a bad one in `BETA`. What is tolerated is the share of the stable version at the same time: where both fail, the machine
is at fault. That is an estimate, so none is condemned before its share is larger for sure (`surely_more`). A step ends when
enough requests were seen and all checks are clear, never by the clock. Votes are given by whom it pleases: they condemn, and
clear nothing.

What answers are worth nobody knows who has no labels. Two things say that they are worth less: they do not come to an end
(cut by their length), and the model is less sure of them. Unsure is an answer whose sampled NLL is above the 75th
percentile of the stable version's latest ones of some such length, by more than `NATS`, as at most a quarter of its own are:
a mean of one token is spread wider than one of six, and where all is nearly certain, twice nothing is nothing. Twice as many
of a canary's are too many: that is 0.67 standard deviations where these are normal. They ask for twice the evidence (`WORTH`),
so that one that is less sure by 0.2, which is no drift either, nearly always stays (decisions 0088, 0092). Of a talk the
first answer alone counts, since those after it are no news, and neither clears a step.

Calls of tools that nobody could follow are counted once an answer has been read (decision 0097): not of shadows, whose answers
nobody reads.

Slow is an answer beyond 1.25 times the 95th percentile of what the stable version's latest answers took; none is condemned for
it before some of the stable version's were timed beside its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

SHARES = (0.0, 0.05, 0.25, 0.5)
SHADOWS, REQUESTS = 200, 300  # that a step takes at least
ALPHA, BETA = 0.01, 0.05
SLOW = 1.25  # times the stable version's 95th percentile
LEAST_TIMES = 20  # answers of the stable version before any is called slow
LOOKED_AT = 16  # of so many tokens of an answer the NLL of one is known (`engine.signals.EVERY`)

UNSURE = 0.75  # quantile of the stable version's NLL ...
NATS = 0.02  # ... a token: what chance makes of it where all is nearly certain
FEW = 4  # of its answers at the same time, before a canary is too slow beside them

Decision = Literal["wait", "next", "back", "done"]


@dataclass(frozen=True)
class Canary:
    """A version on trial, as ``release.json`` keeps it."""

    version: int
    step: int  # index into `SHARES`
    since: str  # time of the step, ISO 8601
    shadows: int = SHADOWS
    requests: int = REQUESTS
    began: int = 0  # number of the change that it began with: what tells it from a trial of the same version before

    def same(self, other: Canary | None) -> bool:
        """Whether that is a step of the same trial."""
        return other is not None and (self.version, self.began) == (other.version, other.began)

    @property
    def share(self) -> float:
        return SHARES[self.step]

    @property
    def enough(self) -> int:
        """Requests that its step takes at least."""
        return self.requests if self.step else self.shadows


@dataclass
class Tally:
    """What one version did."""

    requests: int = 0
    failures: int = 0  # that were not the client's fault
    invalid: int = 0  # answers of nothing, or of one token again and again
    timed: int = 0  # answers whose times were compared
    slow: int = 0  # of them: late first token, or slow tokens
    votes: int = 0
    down: int = 0  # thumbs
    talks: int = 0  # whose first answer came to an end
    cut: int = 0  # of them: by its length
    heard: int = 0  # of them: whose NLL was compared
    unsure: int = 0  # of these
    called: int = 0  # answers with calls of tools
    wrong: int = 0  # of them: with one of a tool that was not offered, or without an object of arguments

    def share(self, what: str, of: str) -> float:
        """Of `of`, with one of each kind added, so that it is never certain."""
        return (getattr(self, what) + 1) / (getattr(self, of) + 2)


@dataclass
class Evidence:
    """Of one canary, over all its steps."""

    canary: Tally = field(default_factory=Tally)
    stable: Tally = field(default_factory=Tally)
    step: int = 0  # requests of the canary in its present step


def added(one: Evidence, other: Evidence, sign: int = 1) -> Evidence:
    """The counts of both together; with `sign` -1 those of `one` without the other's.

    Examples:
        >>> from shoal.loop.canary import Evidence, Tally, added
        >>> added(Evidence(canary=Tally(5, 2), step=5), Evidence(canary=Tally(3, 1), step=1), -1).canary.failures
        1
    """

    def tallies(a: Tally, b: Tally) -> Tally:
        return Tally(*(getattr(a, each.name) + sign * getattr(b, each.name) for each in fields(Tally)))

    return Evidence(tallies(one.canary, other.canary), tallies(one.stable, other.stable), one.step + sign * other.step)


@dataclass(frozen=True)
class Check:
    """One check, as it stands."""

    name: str
    count: int
    of: int
    tolerated: float  # share
    evidence: float  # log likelihood ratio; up to `CONDEMNED`, down to `CLEARED`
    needed: bool  # for a step to end

    @property
    def condemned(self) -> bool:
        return self.evidence >= CONDEMNED

    @property
    def cleared(self) -> bool:
        return self.evidence <= CLEARED


CONDEMNED = math.log((1 - BETA) / ALPHA)  # 4.55
CLEARED = math.log(BETA / (1 - ALPHA))  # -2.99
SUSPECTED = CONDEMNED - 0.01  # as far as a check goes beside a stable version that may be as bad
MOST = 0.5  # share of the stable version's that is tolerated at most
EVEN, RARE = (1.0, 1.0), (0.5, 9.5)  # of which shares are: a bad canary's, and those of what serves well

# name, counted, of which, least share that is tolerated, how much more is too much, whether a step needs it cleared
KINDS = (
    ("failures", "failures", "requests", 0.005, 0.025, True),
    ("invalid answers", "invalid", "requests", 0.005, 0.05, True),
    ("slow answers", "slow", "timed", 0.05, 0.2, True),
    ("thumbs down", "down", "votes", 0.05, 0.2, False),
    ("cut answers", "cut", "talks", 0.05, 0.2, False),
    ("unsure answers", "unsure", "heard", 1 - UNSURE, 0.25, False),
    ("invalid calls", "wrong", "called", 0.05, 0.2, False),
)
QUALITY = ("cut", "unsure")
WORTH = 0.5  # of their evidence counts: another model is another model, and may be a little less sure


def sprt(count: int, of: int, tolerated: float, more: float) -> float:
    """Log likelihood ratio of `count` in `of` for a share of `tolerated + more` against `tolerated`.

    Examples:
        >>> from shoal.loop.canary import CLEARED, CONDEMNED, sprt
        >>> [sprt(k, k, 0.005, 0.025) > CONDEMNED for k in (2, 3)]
        [False, True]
        >>> sprt(0, 120, 0.005, 0.025) < CLEARED
        True
    """
    high = tolerated + more
    return count * math.log(high / tolerated) + (of - count) * math.log((1 - high) / (1 - tolerated))


def surely_more(canary: tuple[int, int], stable: tuple[int, int]) -> bool:
    """Whether (count, of) of a canary has a larger share than that of the stable version, by a Bayes factor of 1 / `ALPHA`: the
    stable version's share is an estimate, and what is tolerated by it alone condemns many a good canary where both fail.

    Examples:
        >>> from shoal.loop.canary import surely_more
        >>> surely_more((3, 3), (0, 3)), surely_more((5, 20), (1, 19)), surely_more((30, 120), (19, 2000))
        (True, False, True)
    """
    (count, total), (known, of) = canary, stable
    if count * of <= known * total and of:
        return False
    apart = _chance(count, total, EVEN) + _chance(known, of, RARE)
    return apart - _chance(count + known, total + of, RARE) >= math.log(1 / ALPHA)


def _chance(count: int, of: int, prior: tuple[float, float]) -> float:
    """Log of the chance of `count` in `of`, in one order, of a share that is Beta distributed."""
    a, b = prior
    return _beta(a + count, b + of - count) - _beta(a, b)


def _beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def checks(evidence: Evidence) -> list[Check]:
    """All of them."""
    found = []
    for name, count, of, least, more, needed in KINDS:
        told = evidence.stable
        tolerated = least if getattr(told, of) < _least(count) else max(least, min(MOST, _rate(told, count, of)))
        here, total = getattr(evidence.canary, count), getattr(evidence.canary, of)
        ratio = sprt(here, total, tolerated, more) * (WORTH if count in QUALITY else 1.0)
        if count == "slow" and getattr(told, of) < _least(count):
            ratio = min(ratio, 0.0)  # slow beside what? a canary that has just been loaded slows both
        # worse beside what? and where half of the stable version's are so, it is what is asked
        if count in QUALITY and (getattr(told, of) < LEAST_TIMES or tolerated >= MOST):
            ratio = min(ratio, 0.0)
        if not surely_more((here, total), (getattr(told, count), getattr(told, of))):
            ratio = min(ratio, SUSPECTED)
        found.append(Check(name, here, total, tolerated, ratio, needed))
    return found


def _least(count: str) -> int:
    """Answers of the stable version at the same time, before its share is tolerated."""
    return FEW if count == "slow" else LEAST_TIMES


def _rate(tally: Tally, count: str, of: str) -> float:
    """The stable version's share, less what chance may have added: half of a standard error."""
    total: int = getattr(tally, of)
    share = getattr(tally, count) / total
    return float(share - 0.5 * math.sqrt(share * (1 - share) / total))


def judged(canary: Canary, evidence: Evidence) -> tuple[Decision, str]:
    """What is to become of a canary, and why, in words."""
    found = checks(evidence)
    bad = next((check for check in found if check.condemned), None)
    if bad is not None:
        return "back", f"{bad.name}: {bad.count} of {bad.of} requests, where {bad.tolerated:.1%} is tolerated"
    if evidence.step < canary.enough:
        return "wait", f"{evidence.step} of {canary.enough} requests"
    open_ = next((check for check in found if check.needed and not check.cleared), None)
    if open_ is not None:
        return "wait", f"{open_.name} not clear yet: {open_.count} of {open_.of}"
    if canary.step + 1 < len(SHARES):
        return "next", f"{evidence.step} requests, all checks clear"
    return "done", f"{evidence.canary.requests} requests over all steps, all checks clear"


def advanced(canary: Canary, since: str) -> Canary:
    """The next step."""
    return replace(canary, step=canary.step + 1, since=since)


class Pace:
    """How long the stable version's latest answers took, and how sure it was of them: what is slow, and what is unsure."""

    def __init__(self, keep: int = 200) -> None:
        self._keep = keep
        self._first: list[float] = []
        self._token: list[float] = []
        self._nll: dict[int, list[float]] = {}  # by `_like`

    def observe(self, first: float, token: float | None, nll: float | None = None, tokens: int = 0) -> None:
        """Seconds to the first token, and of each after it; of the first answer of a talk nats of the sampled tokens, and how
        many `tokens` it has."""
        known = self._nll.setdefault(_like(tokens), [])
        for kept, value in ((self._first, first), (self._token, token), (known, nll)):
            if value is not None:
                kept.append(value)
                del kept[: -self._keep]

    def is_slow(self, first: float, token: float | None) -> bool | None:
        """Of an answer; None where too little is known."""
        if len(self._first) < LEAST_TIMES:
            return None
        late = first > SLOW * percentile(self._first)
        return late or (
            token is not None and len(self._token) >= LEAST_TIMES and token > SLOW * percentile(self._token)
        )

    def is_unsure(self, nll: float | None, tokens: int = 0) -> bool | None:
        """Of an answer of so many `tokens`; None where too little is known of such."""
        known = self._nll.get(_like(tokens), [])
        if nll is None or len(known) < LEAST_TIMES:
            return None
        return nll > percentile(known, UNSURE) + NATS

    def patience(self, least: float, times: float) -> float:
        """Seconds to wait for a token of a canary before it counts as one that does not come."""
        known = [*self._first[-self._keep :]]
        return max(least, times * percentile(known)) if len(known) >= LEAST_TIMES else math.inf


def _like(tokens: int) -> int:
    """The same for answers of which as many tokens were looked at, or less than twice as many."""
    return (-(-tokens // LOOKED_AT)).bit_length()


def percentile(values: list[float], share: float = 0.95) -> float:
    """The smallest of `values` that so many are not above.

    Examples:
        >>> from shoal.loop.canary import percentile
        >>> percentile([float(n) for n in range(1, 21)])
        19.0
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
