"""Whose request goes before whose: payers (API keys) share the engine evenly, and of one payer its clients.

A request's rank is its place among what its payer has in the engine now: 1 is its next, 2 the one after. So all have
a first request before anybody has a second, and of one payer all clients have. A rank falls as those before it end, and
nothing of the past counts. Counted from the oldest request in the engine, ranks stood still while that one ran, and who had
sent more than others waited for its end.

Of equal ranks the one goes first that has had its rank for longer, not the one that came first: else who sent much would
always have the oldest. The request that is first of all stays so until it ends, so all end.

Ranks are counted anew once a step and before one comes after others have ended, since it has its rank for less long than
those that rose; not for each that ends: a thousand that leave at once cost what they are.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

from shoal.engine.events import LATER
from shoal.engine.plan import Work
from shoal.engine.running import Running

TOLERATED = 0.5  # of a step: who share it evenly are not to have steps of their own for nothing
KEPT = 4.0  # steps of all requests that who asked for less than its share may have before others
REMEMBERED = 4096  # payers that have no work now

Group = tuple[int, str]  # priority and payer
Account = str | None  # of seconds: a payer's, or None, that of all that may wait


class Shares:
    """The live requests of each payer and priority, in the order in which they came."""

    def __init__(self) -> None:
        self._groups: dict[Group, dict[Running, None]] = {}
        self._changed: dict[Group, None] = {}  # since they were settled
        self.ended = False  # has any ended since?
        self._numbers = itertools.count(1)  # of requests, and of places in the order

    def joins(self, running: Running) -> None:
        """Give `running` its number, and the order in which it would join the others; these keep theirs until they `settle`."""
        mine = self._groups.get(_group(running), {})
        running.number = next(self._numbers)
        running.turn = 1 + sum(other.request.client == running.request.client for other in mine)
        running.order = (running.order[0], 1 + sum(other.turn <= running.turn for other in mine), running.number)

    def joined(self, running: Running) -> None:
        """`running` is now one of those that are live."""
        group = _group(running)
        self._groups.setdefault(group, {})[running] = None
        self._changed.setdefault(group)

    def left(self, running: Running) -> None:
        """`running` has ended."""
        self.ended = True
        group = _group(running)
        self._changed.pop(group, None)
        del self._groups[group][running]
        if self._groups[group]:
            self._changed[group] = None  # behind those that lost one before it: it has its ranks for less long
        else:
            del self._groups[group]

    def settle(self) -> bool:
        """Give all their order among those that are there now. Returns whether any may have another than before."""
        changed, self._changed, self.ended = self._changed, {}, False
        for group in changed:
            self._settle([*self._groups[group]])
        return bool(changed)

    def _settle(self, mine: list[Running]) -> None:
        turns = Counter[str]()
        for other in mine:
            turns[other.request.client] += 1
            if other.turn != turns[other.request.client]:
                other.turn = turns[other.request.client]
                other.order = (*other.order[:2], next(self._numbers))
        mine.sort(key=lambda other: (other.turn, other.order[2]))
        for rank, other in enumerate(mine, start=1):
            if other.order[1] != rank:
                other.order = (other.order[0], rank, next(self._numbers))


class Seconds:
    """The engine's seconds that payers have had, of those that have work: each is to have as many as the others.

    A payer that comes starts with as many as the one that has had least, less a step of all requests, for which it may have
    waited. One that comes again and has left its share to others may have `KEPT` of these steps before them: so the next
    request of who asks for little, now and then, is done in steps of its own. What it has had is remembered while others have
    work: else who asks again at once would have as many each time, and who goes after each long step would owe nothing for it.
    Who had more than others when it went owes no more than that when it comes again, whoever else came and went meanwhile.

    Nor does a payer that comes start with less, by more than these steps, than an even share since the last step that all had
    part in: where one came before the other had ended, each started with less than that one had, and who was there before
    them had nothing for as long as they came. And who is behind and cannot run, since it waits for a place or for memory,
    falls back by no more than these steps: else it took all that time back at once when it was let in.

    What may wait is one payer, whoever it is of: else a batch of thirty rows, which none is behind, took thirty times as long
    from a key with one row in each of its steps. It falls back as those do that cannot run, since it has no steps of its own.
    """

    def __init__(self) -> None:
        self._had: dict[Account, float] = {}  # of those that share
        # what the others had, with the same zero, and by how much that was more than any of those that stayed had
        self._away = OrderedDict[Account, tuple[float, float]]()
        self._behind: set[Account] = set()
        self._full = 0.0  # of the last step that all had part in who could
        self._even = 0.0  # what who had most then would have by now, had all shared evenly since

    def behind(self, payers: Collection[Account]) -> Collection[Account]:
        """Those of `payers`, who have work now, that have had less than another by more than `TOLERATED` of a step of all, and
        are to have steps of their own."""
        self._come_and_go(payers)
        limit = self._most - TOLERATED * self._full
        self._behind = {payer for payer, had in self._had.items() if had < limit}
        return self._behind - {None}

    def took(self, works: Sequence[Work], seconds: float) -> None:
        """A step of `works`, planned by what `behind` said, took so many seconds."""
        rows = Counter[Account]()
        for work in works:
            rows[account(work.running)] += (work.count + work.drafts) * (work.last - work.first)
        before = self._most
        for payer, count in rows.items():
            self._had[payer] += seconds * count / max(1, rows.total())
        self._even += seconds / max(1, len(self._had))
        for payer in self._behind:
            had = self._had[payer]
            self._had[payer] = max(had, min(had + self._most - before, self._most - KEPT * self._full))
        if self._had.keys() - self._behind <= rows.keys():
            self._full, self._even = seconds, self._most

    def _come_and_go(self, payers: Collection[Account]) -> None:
        gone = [payer for payer in self._had if payer not in payers]
        if len(gone) == len(self._had):
            self._had.clear()
            self._away.clear()
            gone = []
        leave = [(payer, self._had.pop(payer)) for payer in gone]
        fair, most = self._fair, self._most
        for payer, had in leave:
            self._away[payer] = had, max(0.0, had - most)
            if len(self._away) > REMEMBERED:
                self._away.popitem(last=False)
        for payer in payers:
            if payer not in self._had:
                had, lead = self._away.pop(payer, (fair - self._full, 0.0))
                self._had[payer] = max(min(had, max(most, fair) + lead), fair - KEPT * self._full)

    @property
    def _most(self) -> float:
        return max(self._had.values(), default=0.0)

    @property
    def _fair(self) -> float:
        """What who comes is measured by."""
        return max(min(self._had.values(), default=0.0), self._even)


def clearly_before(running: Running, other: Running) -> bool:
    """By more than one rank: equals would take each other's place at every step. All are before what may wait for them."""
    return (may_wait(other) and not may_wait(running)) or running.order[1] + 1 < other.order[1]


def may_wait(running: Running) -> bool:
    """Is it of a priority that gives its place to any other?"""
    return running.order[0] >= LATER


def account(running: Running) -> Account:
    """Whose seconds it has."""
    return None if may_wait(running) else running.request.payer


def _group(running: Running) -> Group:
    return running.order[0], running.request.payer
