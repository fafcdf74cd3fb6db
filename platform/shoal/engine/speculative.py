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

from shoal.engine.plan import Outcome, Plan, Sampled, Work
from shoal.engine.running import Running

TRIALS = 4  # steps at a batch size, drafting and not, before the faster is known
AGAIN = 64  # every so many steps the slower is tried once more
FADE = 0.9  # weight of a step after the next one of its kind
AHEAD = 4  # tokens that an answer with a tolerance drafts at most, where nobody says otherwise
FEW = 4  # requests of a step that nobody has measured yet: so many drafts are thought to pay
SEEN = 4.0  # drafts of other answers that count as much as all others of them, for one that begins


def ahead_of(running: Running, tokens: list[int]) -> Running:
    """A copy of `running` as it would be if its tokens were `tokens`, for the runner and the sampler."""
    ahead = copy.copy(running)
    ahead.tokens, ahead.holding = tokens, running.holding.ahead(tokens)
    return ahead


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
class _Cost:
    seconds: float = 0.0  # these four fade
    tokens: float = 0.0
    count: float = 0.0  # steps
    drafts: float = 0.0  # of the request that drafted most, summed over steps
    steps: int = 0


class Switch:
    """Does drafting pay at a batch size? Seconds a token with and without, measured as the engine runs: drafts use what a
    small batch leaves idle, and a large one has nothing idle."""

    def __init__(self, max_batch: int | None = None) -> None:
        """`max_batch`: do not measure, but draft up to this batch size."""
        self.max_batch = max_batch
        self._costs: dict[tuple[int, bool], _Cost] = {}

    def wants(self, batch: int) -> bool:
        """Should a step with `batch` decoding requests draft?"""
        if self.max_batch is not None:
            return batch <= self.max_batch
        with_, without = self._cost(batch, True), self._cost(batch, False)
        if min(with_.steps, without.steps) < TRIALS:
            return with_.steps <= without.steps
        pays = with_.seconds * without.tokens < without.seconds * with_.tokens
        return pays != ((with_.steps + without.steps) % AGAIN == 0)

    def learn(self, batch: int, drafts: int, seconds: float, tokens: int) -> None:
        """Take in a step that only decoded, where some request drafted as many as `drafts` ahead."""
        cost = self._cost(batch, drafts > 0)
        cost.seconds = FADE * cost.seconds + seconds
        cost.tokens = FADE * cost.tokens + tokens
        cost.count = FADE * cost.count + 1
        cost.drafts = FADE * cost.drafts + drafts
        cost.steps += 1

    def pays(self, batch: int) -> bool:
        """Has drafting paid at this batch size, as far as is known?"""
        if self.max_batch is not None:
            return batch <= self.max_batch
        with_, without = self._cost(batch, True), self._cost(batch, False)
        if not with_.steps or not without.steps:
            return batch <= FEW
        return with_.seconds * without.tokens < without.seconds * with_.tokens

    def price(self, batch: int) -> float | None:
        """What one more draft costs, as a share of a step without; None while that is not known."""
        with_, without = self._cost(batch, True), self._cost(batch, False)
        if not with_.drafts or not without.seconds:
            return None
        plain = without.seconds / without.count
        return max(0.0, with_.seconds - with_.count * plain) / (with_.drafts * plain)

    def _cost(self, batch: int, drafted: bool) -> _Cost:
        return self._costs.setdefault((batch, drafted), _Cost())


@dataclass
class _Stood:
    """How often a draft stood, of those that were verified. Faded where many answers share one."""

    good: float = 0.0
    tried: float = 0.0

    def share(self, before: _Stood) -> float:
        """The share that stands, `before` being what others' drafts say."""
        return (self.good + SEEN * (before.good + 1) / (before.tried + 1)) / (self.tried + SEEN)


def worth(share: float, price: float, most: int) -> int:
    """How many tokens to draft ahead, at most `most`: as many as give most tokens a second, where each stands with probability
    `share` if those before it do, and costs `price` steps. 0: none is worth it."""
    best, tokens, stands, rate = 0, 1.0, 1.0, 1.0
    for ahead in range(1, most + 1):
        stands *= share
        tokens += stands
        if tokens / (1 + ahead * price) > rate:
            best, rate = ahead, tokens / (1 + ahead * price)
    return best


class Drafting:
    """Which requests draft how much, in the step that is being planned.

    At most as many as they ask for. Where drafting is measured (`Switch`), each drafts as many as its own drafts so far make
    worth while, those of other answers being what it begins with. Where none is worth it, one is tried every `AGAIN` steps."""

    def __init__(self, most: int, switch: Switch, able: bool = True, cheap: float = 0.25) -> None:
        """`most` tokens are drafted ahead by requests that do not say otherwise, where `switch` says that it pays; none by a
        model that is not `able` to, for want of an early exit. `cheap`: the first exit's share of the layers, which a draft is
        thought to cost until that is measured."""
        self._most, self.switch, self._able, self._cheap = most, switch, able, cheap
        self._counted: dict[Running, int] = {}  # who drafts how much; nobody else does, whatever comes into the step
        self._all, self._own = _Stood(), WeakKeyDictionary[Running, _Stood]()
        self._idle = AGAIN  # steps since the last that drafted; the first that may, does
        self._could = False  # has somebody of the step room for drafts?
        self._denied = 0  # answers that were not audited because drafts did not pay

    def stop(self) -> None:
        """Nobody drafts."""
        self._counted, self._could = {}, False

    def start(self, decoding: Sequence[Running], rows: int) -> int:
        """Decide whether those of `decoding` that ask for drafts get them, and return the rows that it takes: none where it
        does not pay, or where all of `decoding` and the drafts would be more than `rows`."""
        rooms = {running: self._room(running) for running in decoding}
        self._could = any(rooms.values())
        counted = {running: self._worth(running, room, len(decoding)) for running, room in rooms.items()}
        drafts = sum(counted.values())
        on = drafts > 0 and len(decoding) + drafts <= rows and self.switch.wants(len(decoding))
        self._counted = counted if on else {}
        return drafts if on else 0

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
        self._idle += 1
        for work, sampled in zip(plan.samples, outcome.samples, strict=True):
            if sampled.drafted:
                self._idle = 0
                good, tried = len(sampled.after), min(len(sampled.after) + 1, sampled.drafted)
                own = self._own.setdefault(work.running, _Stood())
                own.good, own.tried = own.good + good, own.tried + tried
                self._all.good, self._all.tried = FADE * self._all.good + good, FADE * self._all.tried + tried
        if self._could and all(work.count == 1 and work.sample for work in plan.works):
            tokens = sum(1 + len(sampled.after) for sampled in outcome.samples)
            self.switch.learn(len(plan.works), max(work.drafts for work in plan.works), seconds, tokens)

    def _worth(self, running: Running, room: int, batch: int) -> int:
        """As many of `room` as its drafts are worth in a step of `batch`."""
        if not room or self.switch.max_batch is not None:
            return room
        own = self._own.get(running) or _Stood()
        price = self.switch.price(batch)
        ahead = worth(own.share(self._all), self._cheap if price is None else price, room)
        return ahead or int(self._idle >= AGAIN)

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
