"""Sampled audits: full depth looks at some of the answers that the router decides within a tolerance, once they are told; where
they lose more than they may, the router's choices go deeper until they do not (docs/decisions/0007).

What an answer loses is the mean of KL(full depth || exit) over its places, its end among them: what the router calls a gap,
with full depth's own law for a reference after the same words. The words' own likelihood would not do: for y drawn from an
exit, E[log p_full(y) - log p_exit(y)] <= 0, so an exit always looks good by it. Answers that are sent to full depth lose
nothing and count as well, since what is promised is a mean over all.

    decided ──one in 32──> told ──> waits ──> full depth over prompt and answer, in rows that are free ──> `Evidence`

An audit is no request: nobody hears of it, it holds units only where nobody lacks them, and gives them back to whoever does.
All audits together take `COST` of the engine's work. What they say is of one engine, and lost with it: so of one model, as are
its router's bounds, and of no adapter, whose answers no router decides.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field

from shoal.config import GROUPS, ModelConfig
from shoal.engine.holding import NEVER
from shoal.engine.metrics import Samples, sample
from shoal.engine.pages import Pages
from shoal.engine.plan import Outcome, Plan, Span, Work
from shoal.engine.running import Running
from shoal.model.cost import head_flops, layer_flops
from shoal.model.router import TOLERANCES, Calibration

SHARE = 1 / 32  # of the answers that the router decides within a tolerance
COST = 0.01  # of all other work of the engine, that audits may take
WAITING = 8  # answers that wait to be looked at, at most
# answers at full depth that are dropped after a look that was, until one comes to its end: else those that are looked at would
# be dropped where units lack, and those that lose nothing learned of. After so many they are learned of all the same: where
# all go to full depth, nothing else would ever say that a correction is too large
LIKEWISE = 32
TRIES = 3  # times that one may lose its units to others, and that steps with one may fail

DOUBT = 0.05  # chance that a router which keeps its promise is ever corrected
BETS = (1 / 32, 1 / 8, 1 / 2)  # shares of what it has that a gambler puts on the next answer's losing more than it may
RATE = 0.2  # nats that predicted gaps are shifted by, for each nat that an answer lost beyond what it may
MOST = 1.0  # nats a token that an answer counts with at most


@dataclass
class Evidence:
    """What audits have said of answers at one of the tolerances that a router has bounds for, which is what each may lose.

    A test by betting first: who bets a share b of what he has that an answer loses more than it may gets 1 + b (lost / allowed
    - 1) times that, which in expectation is no gain while answers lose in the mean at most what they may, however what they
    lose is spread. So the chance that gamblers who began with 1 ever have 1 / `DOUBT` is at most `DOUBT`, looked at after each
    answer (Ville's inequality; Waudby-Smith and Ramdas, arXiv 2010.09686). The k-th answer's gamblers begin with 1 / (k (k +
    1)), all together with 1: else long quiet would have ruined them, and a router that turns wrong would be found ever later.

    From that answer on the router is corrected, for good: its predicted gaps are shifted by `shift`, which rises with what
    answers lose too much and falls with what they lose too little, never below 0 (Gibbs and Candes, arXiv 2106.00170). At full
    depth nothing is lost, so it stays below some H. As the sum of the steps is at most where they lead, of the n answers from
    there on the mean of (lost - allowed) is at most H / (`RATE` n), whatever the traffic, with what one loses cut at `MOST`.
    """

    answers: int = 0
    lost: float = 0.0  # nats a token, summed over answers
    allowed: float = 0.0  # the same
    proven: bool = False
    shift: float = 0.0
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(BETS))

    def learn(self, lost: float, allowed: float) -> None:
        """One more answer has lost so many nats a token, where it may lose `allowed`, above 0."""
        self.answers, self.lost, self.allowed = self.answers + 1, self.lost + lost, self.allowed + allowed
        lost, count = min(lost, MOST), self.answers
        if not self.proven:
            ratio, fresh = lost / allowed - 1, 1 / (count * (count + 1))
            self.wealth = [(had + fresh) * (1 + bet * ratio) for had, bet in zip(self.wealth, BETS, strict=True)]
            self.proven = sum(self.wealth) / len(BETS) + 1 / (count + 1) >= 1 / DOUBT
        if self.proven:
            self.shift = max(0.0, self.shift + RATE * (lost - allowed))


def bounded(tolerance: float | None) -> float | None:
    """The tolerance whose bound the router takes for `tolerance`; None where it has none, and full depth is taken."""
    return None if tolerance is None else max((each for each in TOLERANCES if each <= tolerance), default=None)


def spans(running: Running, layers: int) -> list[Span]:
    """Rows from which exits before the one after `layers` gave the tokens of an answer, its end among them."""
    begin = running.prompt_len - 1
    cut, end = begin + running.looked, begin + running.drawn
    found = ((running.least, begin, cut), (running.layers, cut, end))
    return [(exit_, first, last) for exit_, first, last in found if first < last and exit_ < layers]


class Audits:
    """Which answers are looked at, the one that is now, and what came of it. The scheduler says when; no tensors here."""

    def __init__(self, config: ModelConfig, pages: Pages, seed: int = 0) -> None:
        self._config, self._pages, self._draws = config, pages, random.Random(seed)
        self._waiting: deque[Running] = deque()  # none of them live; the first may hold units
        self._begun = False  # does it?
        self._found: list[float] = []  # what it lost so far
        self._tries = 0
        self._likewise = 0  # answers at full depth that are still to be dropped, as a look was
        self._failed = 0  # steps with one
        self._owed = 0.0  # rows of a group that audits had beyond their share of the work
        # a head's work in rows of a group
        self._head = head_flops(config) / (layer_flops(config, config.train_length) / GROUPS)
        self.evidence = {Calibration.default_tolerance: Evidence()}
        self.rows = self.dropped = 0

    # --- answers come -------------------------------------------------------------------------------------------------

    def shift(self, tolerance: float | None) -> float:
        """Nats that the router is to take its predicted gaps for too small, for an answer of this tolerance."""
        found = self.evidence.get(bounded(tolerance) or 0.0)
        return 0.0 if found is None else found.shift

    def decided(self, running: Running) -> None:
        """The router has decided on `running`, now is when it is chosen: whatever comes of it. Not of guided answers: where a
        grammar leaves one token, nothing is lost however the laws of all tokens differ."""
        if bounded(running.request.quality_tolerance) is not None and running.grammar is None:
            running.audited = self._draws.random() < SHARE and self._owed <= 0 and self._failed < TRIES

    def told(self, running: Running) -> None:
        """An answer that was chosen has ended well. One of full depth waits as well, though nothing runs for it, and is dropped
        where the look before it was (`LIKEWISE`)."""
        self._pass()
        if self._failed >= TRIES or self._most(running) > self._pages.total:
            self.dropped += 1
            return
        if len(self._waiting) >= WAITING:
            if self._begun:
                self.dropped += 1
                return
            self.drop()  # the first, for which units lack: else nothing would be looked at until it has them
        self._waiting.append(running)

    # --- a step -------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return not self._waiting

    @property
    def holder(self) -> list[Running]:
        """Who holds units beside the live requests."""
        return [self._waiting[0]] if self._begun else []

    def aside(self, room: int, beside: int) -> int:
        """Rows of `room` that prompts leave it, at most a page: else a queue of prompts that never ends would leave it none."""
        page = self._config.page
        return max(0, min(page, room - page)) if self._can(beside) else 0

    def work(self, room: int, beside: int) -> Work | None:
        """The next rows of what is looked at, at most `room`, where `beside` units stay available; and its units."""
        if room < 1 or not self._can(beside):
            return None
        running = self._waiting[0]
        holding, every = running.holding, spans(running, self._config.layers)
        if not self._begun:
            running.groups, self._found, self._begun = GROUPS, [], True
            holding.enter(self._pages, GROUPS, scoring=False)
            holding.offered = [NEVER] * GROUPS  # its pages are for nobody else
            holding.at = min(holding.at, every[0][1])
        start, end = holding.at, min(holding.at + room, every[-1][2])
        holding.take(self._pages, end, GROUPS)
        cut = [(layers, max(first, start), min(last, end)) for layers, first, last in every]
        seen = [(layers, first, last) for layers, first, last in cut if first < last]
        return Work(running, start, end - start, 0, GROUPS, audit=True, spans=seen)

    def took(self, plan: Plan, outcome: Outcome, rows: int) -> None:
        """Take in a step of so many `rows`, summed over groups."""
        work, heads, mine = plan.audit, float(len(outcome.samples)), 0.0
        if work is not None:
            rows -= work.count * GROUPS
            mine = work.count * GROUPS + 2 * len(outcome.lost) * self._head
        self._owed = max(0.0, self._owed + mine - COST * (rows + heads * self._head))
        if work is None:
            return
        self.rows += work.count
        self._found += outcome.lost
        running = work.running
        if work.end == spans(running, self._config.layers)[-1][2]:
            lost = math.fsum(self._found) / running.drawn
            self._likewise = 0
            self._leave()
            if math.isfinite(lost):
                self._learn(running, lost)
            else:
                self.dropped += 1

    def make_room(self, lack: int) -> bool:
        """Release its units for who lacks so many, if it holds as many; it begins anew later. Returns whether it did."""
        if not self._begun or sum(self._waiting[0].holding.owned) < lack:
            return False
        self._waiting[0].holding.release(self._pages)
        self._begun, self._tries = False, self._tries + 1
        if self._tries >= TRIES:
            self.drop()
        return True

    def drop(self) -> None:
        """Look no longer at the first that waits."""
        self.dropped += 1
        self._likewise = LIKEWISE
        self._leave()

    def failed(self) -> None:
        """A step failed in which it was looked at. After a few of them nothing is looked at any more."""
        self._failed += 1
        self.drop()
        while self._failed >= TRIES and self._waiting:
            self.drop()

    def samples(self) -> Samples:
        """What `engine.metrics` shows of it."""
        found: Samples = {sample("audit_rows"): self.rows, sample("audits_dropped"): self.dropped}
        for tolerance, of in self.evidence.items():
            found[sample("audited_answers", tolerance=tolerance)] = of.answers
            found[sample("audited_lost_nats", tolerance=tolerance)] = of.lost
            found[sample("audited_allowed_nats", tolerance=tolerance)] = of.allowed
            found[sample("router_correction_nats", tolerance=tolerance)] = of.shift
        return found

    def _can(self, beside: int) -> bool:
        """Are there units for one that waits, with `beside` to spare?"""
        self._pass()
        return bool(self._waiting) and self._fits(beside)

    def _pass(self) -> None:
        """Be done with the first that wait where nothing is to be looked at: each counts as far as the look before it did."""
        while self._waiting and not spans(self._waiting[0], self._config.layers):
            if self._likewise:
                self._likewise, self.dropped = self._likewise - 1, self.dropped + 1
            else:
                self._learn(self._waiting[0], 0.0)
            self._leave()

    def _fits(self, beside: int) -> bool:
        """Are there units for all of the first that waits, with `beside` to spare?"""
        running = self._waiting[0]
        if self._begun:
            lack = running.holding.lacking(len(running.tokens), GROUPS)
        else:
            lack = running.holding.needed(self._pages, GROUPS)
        return lack + beside <= self._pages.available

    def _most(self, running: Running) -> int:
        return running.holding.pages_for(len(running.tokens)) * GROUPS

    def _leave(self) -> None:
        running = self._waiting.popleft()
        self._begun, self._tries, self._found = False, 0, []
        running.holding.release(self._pages)

    def _learn(self, running: Running, lost: float) -> None:
        """`running` lost so many nats a token. It might lose what its bound promises, not the larger tolerance that it may
        have asked for: that would make up for what those lose that asked for no more."""
        allowed = bounded(running.request.quality_tolerance)
        assert allowed is not None
        self.evidence.setdefault(allowed, Evidence()).learn(lost, allowed)
