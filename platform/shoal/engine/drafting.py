"""Which requests draft how many tokens in a step: as many as give most tokens a second, by what is measured.

What a step costs is known by batch size, by the drafts of the longest and by the rows of all (`price`), where no prompt was in
it; one beside a prompt is judged as the last without. How many of its drafts will stand is known of each answer, from those
like it and from its own (`acceptance`). So in one step an answer may draft beside one that does not.

What is not known is tried: by an answer whose task nobody has drafted for, and again after ever more steps, of all and of its
own, where it did not pay. What that may lose is counted, in steps without drafts, whatever was expected: the drafts of a task
may lose what they have gained, at most `CREDIT`, and beyond that all together `LOSS` of the time and `ADVANCE` once. Where that
is spent, who has gained nothing waits. Of what one task gains all others together may lose one step at most (`SHARED`).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from shoal.engine.acceptance import Kinds, Record
from shoal.engine.events import MAX_DRAFTS
from shoal.engine.plan import Outcome, Plan
from shoal.engine.price import ALIKE, Price, Prices
from shoal.engine.running import Running

ADVANCE = 1.5  # steps without drafts, whose time drafting may lose at most before it is known
LOSS = 0.01  # what it may lose beyond that, of the time of all steps
TRY = 2  # drafts of a try
AGAIN = 64  # of so many answers that it does not pay to audit, one is
WORTH = 1.03  # tokens a second beside those without drafts, from which on it is done
AHEAD = 6  # tokens that an answer with a tolerance drafts at most, where nobody says otherwise
FEW = 4  # requests of a step that nobody has measured yet: so many drafts are thought to pay
TOLERANCES = (0.0, 0.05, 0.1, 0.2, 0.4)  # up to each, answers are alike


def best(
    answers: Sequence[tuple[float, int]], batch: int, shares: tuple[float, float, float]
) -> tuple[float, list[int]]:
    """How many tokens each of `answers` drafts for most tokens a second, and how many those are beside a step without drafts.
    Of each: with which probability a draft stands if those before it do, and how many it may draft; they are among `batch`
    requests. `shares`: what a step costs more, once, for each draft of the longest and for each of all, in steps without.

    What a draft gives is worth its row where it is more than that row would give at the rate that is reached: so limits follow
    from the rate, the rate from the limits, and both rise until neither does (Dinkelbach's method: no other choice is better).
    """
    fixed, each, row = shares
    chosen, rate, better = [0] * len(answers), 1.0, True
    while better:
        better, reached, most, price = False, rate, 0, rate * row * batch
        limits, gains = _gains(answers, price)
        gained, rows = 0.0, 0
        for ahead, (tokens, count) in enumerate(gains, 1):
            gained, rows = gained + tokens, rows + count
            found = (1 + gained / batch) / (1 + max(0.0, fixed + each * ahead + row * rows))
            if found > reached * (1 + 1e-9):
                reached, most, better = found, ahead, True
        if better:
            chosen = [min(most, limit) for limit in limits]
        rate = reached
    return rate, chosen


def _gains(answers: Sequence[tuple[float, int]], price: float) -> tuple[list[int], list[tuple[float, int]]]:
    """How many drafts of each answer give more than `price`, and of the first, second, .. drafts of all together: how many
    tokens they give, and how many those are."""
    limits, tokens, counts = [], [0.0] * MAX_DRAFTS, [0] * MAX_DRAFTS
    for share, room in answers:
        stands, drafts = share, 0
        while drafts < room and stands > price:
            tokens[drafts] += stands
            counts[drafts] += 1
            stands, drafts = stands * share, drafts + 1
        limits.append(drafts)
    return limits, list(zip(tokens, counts, strict=True))[: max(limits, default=0)]


class Drafting:
    """What the engine knows of drafts, and who drafts in the step that is being planned.

    At most as many as they ask for. With a `max_batch` nothing is measured: all draft as many up to that batch size."""

    def __init__(self, most: int, max_batch: int | None = None, able: bool = True, cheap: float = 0.25) -> None:
        """`most` tokens are drafted ahead by requests that do not say otherwise; none by a model that is not `able` to, for
        want of an early exit. `cheap`: the first exit's share of the layers, which a draft is thought to cost until that is
        measured."""
        self._most, self._max_batch, self._able = most, max_batch, able
        self.prices = Prices(cheap)
        self.kinds = Kinds()
        self._left = ADVANCE  # steps without drafts, whose time all drafting may still lose
        self._now = 0  # steps in which somebody could draft
        self._measured = 0  # requests of the last of them that was measured
        self._counted: dict[Running, int] = {}  # who drafts how much; nobody else does, whatever comes into the step
        self._could = False  # has somebody of the step room for drafts?
        self._denied = 0  # answers that were not audited because drafts did not pay

    def stop(self) -> None:
        """Nobody drafts."""
        self._counted, self._could = {}, False

    def start(self, decoding: Sequence[Running], rows: int) -> int:
        """Decide whether those of `decoding` that ask for drafts get them, and return the rows that it takes: none where it
        does not pay, or where all of `decoding` and the drafts would be more than `rows`."""
        self.stop()
        rooms = [(running, room) for running in decoding if (room := self._room(running))]
        if not rooms:
            return 0
        self._could, batch = True, len(decoding)
        for running, _ in rooms:
            _record(running).task.time += 1 / batch
        measured = self._max_batch is None
        counted = self._chosen(rooms, batch) if measured else dict(rooms) if batch <= (self._max_batch or 0) else {}
        drafts = sum(counted.values())
        if batch + drafts > rows:
            return 0
        self._counted = counted
        return drafts

    def drafts(self, running: Running) -> int:
        """How many tokens `running` drafts ahead of its next row: none if it was not among those that `start` counted, so that
        drafts never take more rows, or units, than were found free for them."""
        return self._counted.get(running, 0)

    def audits(self, running: Running, batch: int, groups: int) -> bool:
        """Is an answer with a tolerance to run at full depth (all `groups`) with drafts, rather than as deep as the router
        says, now that `batch` requests run? Of those that it does not pay for one in `AGAIN` is all the same: where nobody
        drafts, nobody would ever learn that it pays again."""
        if not self._able or running.sampling.speculative == 0 or running.sampling.max_tokens < 2:
            return False
        if self._max_batch is not None:
            return batch <= self._max_batch
        price = self._price(batch)
        if not price.plain:
            if batch <= FEW:
                return True
        else:
            record = self._record(running, groups, running.request.quality_tolerance)
            answers = [(record.share, record.most)] * batch
            if (self._left > 0 or record.credit) and best(answers, price.batch, price.shares())[0] > WORTH:
                return True
        self._denied += 1
        return self._denied % AGAIN == 0

    def learn(self, plan: Plan, outcome: Outcome, seconds: float) -> None:
        """Take in what a step gave; of its time, one that prefilled says nothing, nor does one where nobody could have drafted:
        it may be of shallow answers, beside which no draft would ever pay."""
        if not self._could or self._max_batch is not None:
            return
        self._now += 1
        self._left = min(ADVANCE, self._left + LOSS)
        alone, batch = all(work.count == 1 and work.sample for work in plan.works), len(plan.works)
        if alone:
            self._measured = batch
        if not self._counted:
            if alone:
                self.prices.at(batch).learn_plain(seconds)
            return
        # one that would end the answer, or could not be drawn, is none of `drafted`, and was a draft all the same
        drafted = [
            (work.running, sampled, max(1, sampled.drafted))
            for work, sampled in zip(plan.samples, outcome.samples, strict=True)
            if work.drafts
        ]
        most, rows = 0, 0
        for _, _, count in drafted:
            most, rows = max(most, count), rows + count
        if alone and rows:
            self.prices.learn(batch, most, rows, seconds)
        elif alone and not drafted:  # all were left out for want of units
            self.prices.at(batch).learn_plain(seconds)
        price = self._price(sum(work.sample and work.count == 1 for work in plan.works))
        extra = price.extra(most, rows) if price.plain and rows else 0.0
        for running, sampled, count in drafted:
            good = len(sampled.after)
            assert running.acceptance is not None
            if sampled.drafted:  # an end says nothing of the drafts before it
                running.acceptance.add(good, min(good + 1, count))
            # each pays its share of the step by its rows, and gains its tokens' share of one without
            gained = good / price.batch - extra * count / rows
            self._left += running.acceptance.earn(gained, self._now)

    def _chosen(self, rooms: Sequence[tuple[Running, int]], batch: int) -> dict[Running, int]:
        """Which of `rooms` draft how much, in a step of `batch` requests."""
        price = self._price(batch)
        if not price.plain:
            return {}
        may = [(running, room) for running, room in rooms if self._left > 0 or _record(running).credit]
        if not may:
            return {}
        answers = [(_record(running).share, room) for running, room in may]
        rate, drafts = best(answers, price.batch, price.shares())
        if rate > WORTH:
            if self.prices.at(batch).look(rate):
                return {}
            return {running: count for (running, _), count in zip(may, drafts, strict=True) if count}
        if self._left > 0:
            for running, room in may:
                if _record(running).task.due(self._now):
                    return {running: min(TRY, room)}
        return {}

    def _price(self, batch: int) -> Price:
        """By which drafts of a step with `batch` requests are judged. Beside a prompt fewer decode than before it and after.
        What such a step takes is no measure, so it is judged as the last that was one: a token that drafts give now is one less
        to compute in steps like that."""
        return self.prices.known(self._measured if batch < self._measured <= ALIKE * batch else batch)

    def _room(self, running: Running) -> int:
        """As many as it asks for and its answer has room for."""
        record = running.acceptance
        if record is None:
            if running.groups is None:
                return 0
            record = running.acceptance = self._record(running, running.groups, running.tolerance)
        if not record.most or running.holding.states_from is not None or running.told is not None:
            return 0  # after `told` drafts would follow what is drawn now, and the next token is another one
        most = running.sampling.max_tokens if running.look is None else running.look  # which comes no later
        room = most - running.answered - 1
        return room if room < record.most else record.most

    def _record(self, running: Running, groups: int, tolerance: float | None) -> Record:
        """Of an answer that runs through `groups` and may lose `tolerance`."""
        sampling = running.sampling
        default = max(self._most, AHEAD if tolerance is not None else 0)
        most = default if sampling.speculative is None else sampling.speculative
        if not self._able or groups < 2:
            most = 0
        way = (
            groups, running.request.adapter, sampling.temperature == 0, sampling.guided is None,
            bisect.bisect_left(TOLERANCES, tolerance or 0.0),
        )  # fmt: skip
        return Record(most, self.kinds.of(way, running.tokens[: running.prompt_len]))


def _record(running: Running) -> Record:
    assert running.acceptance is not None
    return running.acceptance
