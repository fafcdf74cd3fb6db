"""Lossless self-speculation: a deep request drafts with its own first layer group, and its other groups verify.

    draft     group 1 runs the newest token, its exit proposes the next, group 1 runs that, ... : k drafts, and the states
              and K/V of k+1 rows after group 1, which are the real ones
    verify    groups 2.. take the k+1 states as one causal chunk; the sampler draws a token from each row
    accept    drafts are right as far as they equal those tokens; the first token after them is good as well: 1 to k+1 tokens

Drawing is a race with noise that depends on (seed, position, token) alone (`sampler.py`), for a draft and for the token that
verifies it alike. So what comes out is the token that plain decoding would have drawn at that place, in greedy decoding and
in sampling: not only the distribution is kept but the tokens are, whatever was drafted, and whether it was (decision 0006).
An answer that has a tolerance may keep drafts that differ, too, and then depends on what was drafted (`tolerance.py`).

Nothing else ever sees a draft: the step's commit appends what was accepted, moves the lengths, and gives back the units
beyond them. Penalties, grammars, stop strings and logprobs are functions of the tokens, so there is nothing to roll back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from shoal.engine.events import Sampling
from shoal.engine.guided import Grammar
from shoal.engine.plan import Outcome, Plan, Sampled, Work
from shoal.engine.running import Running

PLAIN = 2  # steps without drafts at a batch size, before there is anything to compare with
ADVANCE = 4.0  # steps without drafts, whose time drafting at a batch size may lose before it is known
LOSS = 0.01  # what it may lose beyond that, of the time of all steps
CREDIT = 8.0  # steps, whose time it may lose at most after it has gained more
AGAIN = 64  # every so many steps one that seems worse is run
TRY = 2  # drafts of such a step, where none seem worth it
FADE = 0.9  # weight of a step, or of a draft, after the next one
FASTER, SLOWER = 0.3, 0.1  # weight of a step that was, beside those before it
SPIKE = 4.0  # a step counts as at most so many times as long as others of its kind: the machine paused
AHEAD = 6  # tokens that an answer with a tolerance drafts at most, where nobody says otherwise
FEW = 4  # requests of a step that nobody has measured yet: so many drafts are thought to pay
SEEN = 2.0  # drafts of other answers that count as much as all others of them, for one that begins


def ahead_of(running: Running, tokens: list[int]) -> Running:
    """A copy of `running` as it would be if its tokens were `tokens`, for the runner and the sampler."""
    ahead = copy.copy(running)
    ahead.tokens, ahead.holding = tokens, running.holding.ahead(tokens)
    return ahead


@dataclass(eq=False, slots=True)
class Place:
    """What the sampler reads of a request that has the first `tokens` of its own alone: a copy of all of it takes ten times as
    long, for each row that is verified."""

    tokens: list[int]
    prompt_len: int
    seed: int
    watched: bool
    sampling: Sampling
    grammar: Grammar | None

    @classmethod
    def of(cls, running: Running, count: int) -> Place:
        """`running` with `count` tokens."""
        tokens, grammar = running.tokens[:count], running.grammar
        return cls(tokens, running.prompt_len, running.seed, running.watched, running.sampling, grammar)


def verification(work: Work, ahead: Running) -> Work:
    """What is left of `work` when the drafts stand in `ahead`: all its rows through groups 2.., each with a sample."""
    return replace(work, running=ahead, count=len(ahead.tokens) - work.start, first=1, drafts=0, verify=True)


def accept(drafts: Sequence[int], verified: Sequence[Sampled]) -> Sampled:
    """The tokens that stand, the first with the others `after` it; `verified` [k+1] are those of the rows of the newest
    token and of `drafts` [k]."""
    good = 0
    while good < len(drafts) and verified[good].error is None and verified[good].token == drafts[good]:
        good += 1
    return replace(verified[0], after=tuple(verified[1 : good + 1]), drafted=len(drafts))


@dataclass
class _Took:
    """Seconds of the steps of one kind, as they are with little beside them: one that is slower than those before counts less,
    since others' work on the machine takes time as well."""

    seconds: float = 0.0
    steps: int = 0
    last: int = 0  # number of the last

    def add(self, seconds: float, number: int) -> None:
        self.steps, self.last = self.steps + 1, number
        if self.steps == 1:
            self.seconds = seconds
        weight = max(1 / self.steps, FASTER) if seconds < self.seconds else SLOWER
        self.seconds += weight * (min(seconds, SPIKE * self.seconds) - self.seconds)


class Pays:
    """Steps of one batch size: what they took by how many tokens were drafted ahead, and what drafting has lost in them."""

    def __init__(self, batch: int) -> None:
        self.left = ADVANCE  # steps without drafts, whose time it may still lose
        self.steps = 0
        self._batch = batch
        self._took: dict[int, _Took] = {}
        self._seconds = self._tokens = 0.0  # of steps with drafts; these fade
        self._costs: list[float] = []

    def learn(self, drafts: int, seconds: float, tokens: int) -> None:
        """Take in a step that gave so many `tokens`, where some request drafted as many as `drafts` ahead."""
        self.steps += 1
        self._took.setdefault(drafts, _Took()).add(seconds, self.steps)
        self.left += LOSS
        if drafts:
            self._seconds, self._tokens = FADE * self._seconds + seconds, FADE * self._tokens + tokens
            if plain := self.plain:
                self.left += tokens / self._batch - min(self._took[drafts].seconds / plain, 1 + 2 * drafts)
        self.left = min(self.left, CREDIT)
        if drafts or self.steps % (AGAIN // 4) == 0:
            self._costs = []

    @property
    def plain(self) -> float:
        """Seconds of a step without drafts; 0 while that is not known."""
        took = self._took.get(0)
        return took.seconds if took is not None and took.steps >= PLAIN else 0.0

    @property
    def pays(self) -> bool:
        """Has drafting given more tokens a second than steps without, as far as is known?"""
        if not self._seconds or not self.plain:
            return self._batch <= FEW
        return self._tokens * self.plain > self._batch * self._seconds

    def costs(self, most: int, cheap: float) -> list[float]:
        """What a step costs that drafts 0, 1, .. `most` ahead, in steps without. What was not tried yet is thought to lie on
        the line between what was, and beyond that to cost `cheap` a draft."""
        if len(self._costs) <= most:
            known = {0: 1.0} | {k: took.seconds / self.plain for k, took in self._took.items() if k}
            self._costs = [_between(known, k, cheap) for k in range(most + 1)]
        return self._costs

    def longest_ago(self, most: int) -> int:
        """Which of 0, 1, .. `most` drafts was not tried for longest."""
        return min(range(most + 1), key=lambda k: self._took[k].last if k in self._took else 0)


def _between(known: dict[int, float], at: int, slope: float) -> float:
    below = max(k for k in known if k <= at)
    above = min((k for k in known if k >= at), default=None)
    if above is None:
        return known[below] + slope * (at - below)
    if above == below:
        return known[at]
    return known[below] + (known[above] - known[below]) * (at - below) / (above - below)


class Switch:
    """Does drafting pay at a batch size? Measured as the engine runs: drafts use what a small batch leaves idle, and a large
    one has nothing idle."""

    def __init__(self, max_batch: int | None = None) -> None:
        """`max_batch`: do not measure, but draft up to this batch size."""
        self.max_batch = max_batch
        self._sizes: dict[int, Pays] = {}

    def at(self, batch: int) -> Pays:
        """What is known of steps with `batch` requests."""
        return self._sizes.setdefault(batch, Pays(batch))

    def pays(self, batch: int) -> bool:
        """Has drafting paid at this batch size, as far as is known?"""
        return self.at(batch).pays if self.max_batch is None else batch <= self.max_batch


@dataclass
class _Stood:
    """How often a draft stood, of those that were verified. Faded where many answers share one."""

    good: float = 0.0
    tried: float = 0.0

    def share(self, before: _Stood) -> float:
        """The share that stands, `before` being what others' drafts say."""
        return (self.good + SEEN * (before.good + 1) / (before.tried + 1)) / (self.tried + SEEN)


def worth(answers: Sequence[tuple[float, int]], costs: Sequence[float], others: int = 0) -> list[float]:
    """Tokens in the time of a step without drafts, of a step that drafts 0, 1, .. ahead and costs `costs` of those. Of each of
    `answers`: with which probability a draft stands if those before it do, and how many it may draft; `others` draft none."""
    gained, stands = [0.0] * len(costs), 0.0
    for share, room in answers:
        stands = 1.0
        for ahead in range(1, min(room + 1, len(costs))):
            stands *= share
            gained[ahead] += stands
    tokens, rates = float(len(answers) + others), list[float]()
    for more, cost in zip(gained, costs, strict=True):
        tokens += more
        rates.append(tokens / cost)
    return rates


class Drafting:
    """Which requests draft how much, in the step that is being planned.

    At most as many as they ask for. Where it is measured (`Switch`), as many as give most tokens a second: by what steps have
    taken, and by how many of its drafts each has seen stand, those of other answers being what it begins with. So that what
    changes is noticed, an answer that has not drafted yet tries, and some every `AGAIN` steps. That costs at most `LOSS` of the
    time: what drafting loses is counted, whatever was expected of it, and where that is spent nobody drafts."""

    def __init__(self, most: int, switch: Switch, able: bool = True, cheap: float = 0.25) -> None:
        """`most` tokens are drafted ahead by requests that do not say otherwise, where `switch` says that it pays; none by a
        model that is not `able` to, for want of an early exit. `cheap`: the first exit's share of the layers, which a draft is
        thought to cost until that is measured."""
        self._most, self.switch, self._able, self._cheap = most, switch, able, cheap
        self._counted: dict[Running, int] = {}  # who drafts how much; nobody else does, whatever comes into the step
        self._all, self._own = _Stood(), WeakKeyDictionary[Running, _Stood]()
        self._could = False  # has somebody of the step room for drafts?
        self._denied = 0  # answers that were not audited because drafts did not pay

    def stop(self) -> None:
        """Nobody drafts."""
        self._counted, self._could = {}, False

    def start(self, decoding: Sequence[Running], rows: int) -> int:
        """Decide whether those of `decoding` that ask for drafts get them, and return the rows that it takes: none where it
        does not pay, or where all of `decoding` and the drafts would be more than `rows`."""
        rooms = {running: room for running in decoding if (room := self._room(running))}
        self._counted, self._could = {}, bool(rooms)
        if not rooms:
            return 0
        batch, limit = len(decoding), self.switch.max_batch
        if limit is None:
            most = self._ahead(rooms, self.switch.at(batch), batch - len(rooms))
        else:
            most = max(rooms.values()) if batch <= limit else 0
        counted = {running: min(room, most) for running, room in rooms.items()} if most else {}
        drafts = sum(counted.values())
        if batch + drafts > rows:
            return 0
        self._counted = counted
        return drafts

    def drafts(self, running: Running) -> int:
        """How many tokens `running` drafts ahead of its next row: none if it was not among those that `start` counted, so that
        drafts never take more rows, or units, than were found free for them."""
        return self._counted.get(running, 0)

    def audits(self, running: Running, batch: int) -> bool:
        """Is an answer with a tolerance to run at full depth with drafts, rather than as deep as the router says, now that
        `batch` requests run? Of those that it does not pay for one in `AGAIN` is all the same: where nobody drafts, nobody
        would ever learn that it pays again."""
        if not self._able or running.sampling.speculative == 0 or running.sampling.max_tokens < 2:
            return False
        if self.switch.pays(batch):
            return True
        self._denied += 1
        return self.switch.max_batch is None and self._denied % AGAIN == 0

    def learn(self, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """Take in what a step gave; of its time, one that prefilled says nothing, nor does one where nobody could have drafted:
        it may be of shallow answers, beside which no draft would ever pay."""
        for work, sampled in zip(plan.samples, outcome.samples, strict=True):
            if sampled.drafted:
                good, tried = len(sampled.after), min(len(sampled.after) + 1, sampled.drafted)
                own = self._own.setdefault(work.running, _Stood())
                own.good, own.tried = own.good + good, own.tried + tried
                self._all.good, self._all.tried = FADE * self._all.good + good, FADE * self._all.tried + tried
        if self._could and all(work.count == 1 and work.sample for work in plan.works):
            tokens = sum(1 + len(sampled.after) for sampled in outcome.samples)
            self.switch.at(len(plan.works)).learn(max(work.drafts for work in plan.works), seconds, tokens)

    def _ahead(self, rooms: dict[Running, int], size: Pays, others: int) -> int:
        """How many tokens those of `rooms` draft ahead at most, beside `others` that draft none, in a step whose batch size
        `size` knows."""
        if size.left < 0 or not size.plain:
            return 0
        most = max(rooms.values())
        own = [(self._own.get(running), room) for running, room in rooms.items()]
        nothing = _Stood()
        answers = [((stood or nothing).share(self._all), room) for stood, room in own]
        rates = worth(answers, size.costs(most, self._cheap)[: most + 1], others)
        best, turn = rates.index(max(rates)), size.steps % AGAIN == 0
        if best and turn:  # what all are compared with is looked at most often
            return size.longest_ago(most) if size.steps % (2 * AGAIN) else 0
        if best:
            return best
        return min(TRY, most) if turn or any(stood is None for stood, _ in own) else 0

    def _room(self, running: Running) -> int:
        """As many as it asks for and its answer has room for."""
        asked = running.sampling.speculative
        default = max(self._most, AHEAD if running.tolerance is not None else 0)
        most = default if asked is None else asked
        if not self._able or not most or running.groups is None or running.groups < 2:
            return 0
        if running.holding.states_from is not None:
            return 0
        if running.told is not None:
            return 0  # drafts would follow what is drawn now, and the next token is another one
        return min(most, running.sampling.max_tokens - running.answered - 1)
