"""What the next step runs, of the requests that run and of those that wait: rows within the step's budget, units of the pool,
and who gives way where these are short. Pure Python, no tensors.

Rules that hold in every step: requests go in the order (priority, rank, arrival), where the rank is whose turn it is
(`shares`); with one client it is that of arrival. Every decoding request gets its row; what is left of the row budget goes to
prefills in chunks, and at least one page's worth always is left, so neither starves the other. Units are taken from requests
later in the order, and from requests whose reader is behind, never from earlier ones: the first request always advances, so
all end. A place and the units to enter are taken from those that rank clearly later.

What may wait (priority `events.LATER` and above) gives its place and its units to whatever else comes, and is computed on
later.

An answer that was told may be looked at by full depth (`audits`), in rows and units that the live ones leave.

Two exceptions. A payer that has had less of the engine's time than others has steps of its own until it has had as much
(`shares.Seconds`): a request in a step of thirty others' takes as long as they do. And while all requests decode, a step may
run the shallow ones alone, as otherwise they would wait in every step for the groups that others run through
(docs/decisions/0010). Such steps take at most `pace.SHALLOW_SHARE` of the time that full steps take, so no deep request is
slowed down by more than that.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection
from dataclasses import replace

from shoal.config import ModelConfig
from shoal.engine.audits import Audits
from shoal.engine.door import Door
from shoal.engine.drafting import Drafting
from shoal.engine.metrics import Metrics
from shoal.engine.pace import Pace
from shoal.engine.pages import Pages
from shoal.engine.plan import Plan, Work, next_work
from shoal.engine.running import Running
from shoal.engine.shares import Account, Seconds, account, clearly_before, may_wait


class Planning:
    """Who runs, who waits, and the next step of them. Who comes, ends, and gets tokens is the scheduler's, which is one."""

    def __init__(
        self,
        config: ModelConfig,
        pages: Pages,
        *,
        max_batch_tokens: int,
        max_batch: int,
        drafting: Drafting,
        clock: Callable[[], float],
    ) -> None:
        """At most `max_batch_tokens` rows and `max_batch` requests a step; `clock`: seconds."""
        self.config, self.pages, self.clock = config, pages, clock
        self.max_batch_tokens, self.max_batch = max_batch_tokens, max_batch
        self.running: list[Running] = []  # both in order
        self.waiting: list[Running] = []
        self.metrics = Metrics()
        self.pace = Pace()
        self.judge = Audits(config, pages)
        self._door = Door(pages, self.pace, self.metrics)
        self._drafting = drafting
        self._seconds = Seconds()

    def _next(self) -> Plan:
        """The next step; no works when nothing can run."""
        self._drafting.stop()
        self._give_place()
        next_ = next((running for running in self.waiting if not running.paused), None)
        can = [running for running in self.running if not running.paused] + ([next_] if next_ else [])
        payers = {account(running) for running in can}
        if (behind := self._seconds.behind(payers)) and (works := self._works(behind)):
            return Plan(works)
        works = self._rows(self._shallow_only(), 0)
        if works:
            return Plan(works, shallow=True)
        return Plan(self._works(payers, audit=True))

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, candidates: list[Running], room: int) -> list[Work]:
        """The next rows of those of `candidates` that can run: one of each that decodes, and `room` of the others in all. When
        units are short, drafts are left out first, then requests later in the order are preempted. None of those has rows in
        this step yet: `candidates` are in order, and one that was admitted alone found all of its units available."""
        works: list[Work] = []
        for running in candidates:
            if running.paused or running not in self.running:
                continue  # not in running: it was preempted for an earlier one of this loop
            work = next_work(running, 1 if running.decoding else room, self._drafting.drafts(running))
            if work.drafts and running.holding.lacking(work.reach, work.last) > self.pages.available:
                work = replace(work, drafts=0)  # nobody loses units for drafts
            if work.decide:
                running.shift = self.judge.shift(running.request.quality_tolerance)
            if work.count and self._reserve(running, work):
                works.append(work)
                room -= 0 if running.decoding else work.count
        return works

    def _works(self, payers: Collection[Account], audit: bool = False) -> list[Work]:
        """The next rows of all that can run of `payers`, and of those that can enter, deepest first, those of an adapter in a
        row; where wanted, an `audit` after them."""
        mine = [running for running in self.running if account(running) in payers]
        decoding = [running for running in mine if running.decoding and not running.paused]
        drafts = self._drafting.start(decoding, self.max_batch_tokens - self.config.page)  # prefill keeps its page
        room = self.max_batch_tokens - len(decoding) - drafts  # rows for prefill
        aside = self.judge.aside(room, self._beside) if audit else 0
        room -= aside
        works = self._rows(mine, room)
        room -= sum(work.count for work in works if not work.running.decoding)
        while room > 0 and (admitted := self._admit(payers)) is not None:
            entered = self._rows([admitted], room)
            room -= sum(work.count for work in entered)
            works += entered
        if audit and (looked := self.judge.work(room + aside, self._beside)) is not None:
            works.append(looked)
        return sorted(works, key=lambda work: (-work.last, work.running.request.adapter))

    def _shallow_only(self) -> list[Running]:
        """The requests of least depth, if a step of them alone pays now; else none, for a full step. What may wait has no part
        in one beside others."""
        ready = [running for running in self.running if not running.paused]
        depths = [running.groups for running in ready if running.groups is not None and running.decoding]
        if len(depths) < len(ready) or len(set(depths)) < 2:
            return []
        mine = [running for running in ready if not may_wait(running)] or ready
        least = min(running.groups or 0 for running in mine)
        shallow = [running for running in mine if running.groups == least]
        return shallow if least < max(depths) and self.pace.alone([least] * len(shallow), depths) else []

    # --- places and units ---------------------------------------------------------------------------------------------

    def _give_place(self) -> None:
        """Preempt the last running requests of a priority for a waiting one of the same priority that ranks clearly before them
        and lacks a place or units; those that may wait, for any other."""
        first = next((running for running in self.waiting if not running.paused), None)
        while first is not None:
            last = next((r for r in reversed(self.running) if r.order[0] == first.order[0] or may_wait(r)), None)
            if last is None or not clearly_before(first, last):
                return
            if len(self.running) < self.max_batch and self._needed(first) <= self.pages.available:
                return
            if not self._unaudited(first):
                self._preempt(last)

    def _reserve(self, running: Running, work: Work) -> bool:
        """Give `running` the units that `work` writes. When the pool is short, requests later in the order lose theirs; when
        there are none, `running` itself does, and False is returned."""
        lack = running.holding.lacking(work.reach, work.last)
        while lack > self.pages.available:
            if self.judge.make_room(1):
                continue
            victim = self._paused_victim() or self.running[-1]
            self._preempt(victim)
            if victim is running:
                return False
        if lack:
            running.holding.take(self.pages, work.reach, work.last)
        return True

    def _admit(self, payers: Collection[Account]) -> Running | None:
        """The next waiting request, moved to running with what the prefix cache has of it; None when it must wait, or is of
        none of `payers`.

        It enters only when its whole known length fits beside what the running ones need next, so that it is not
        preempted at once. Requests behind the first never overtake it, so a long one is not starved by short ones.
        """
        running = next((running for running in self.waiting if not running.paused), None)
        if running is None or account(running) not in payers:
            return None
        while len(self.running) >= self.max_batch or self._needed(running) > self.pages.available:
            if self._unaudited(running):
                continue
            victim = self._paused_victim()
            if victim is None:
                return None
            self._preempt(victim)
        self.waiting.remove(running)
        bisect.insort(self.running, running, key=by_order)
        self._door.passed(self.clock(), len(self.waiting))
        self._enter(running)
        return running

    def _needed(self, running: Running) -> int:
        """Units that must be available before `running` may enter: its own, and one page each for those that run."""
        return running.holding.needed(self.pages, running.groups or 1) + self._beside

    @property
    def _beside(self) -> int:
        """Units of one page of all that run."""
        return sum(other.groups or 1 for other in self.running)

    def _unaudited(self, running: Running) -> bool:
        """Take the units of what is audited for `running`, which waits for units alone, if it can then enter."""
        lack = self._needed(running) - self.pages.available
        return len(self.running) < self.max_batch and self.judge.make_room(lack)

    def _paused_victim(self) -> Running | None:
        return next((running for running in reversed(self.running) if running.paused), None)

    # --- in and out ---------------------------------------------------------------------------------------------------

    def _enter(self, running: Running) -> None:
        """Start `running` with what the prefix cache has of it."""
        if running.scoring:
            running.prompt_logprobs = [None]
        running.holding.enter(self.pages, running.groups, running.scoring)
        if running.admitted_at is None:
            running.admitted_at = self.clock()
            self.metrics.prompt_tokens += running.prompt_len
            if running.groups is not None:
                self._entered(running)

    def _entered(self, running: Running) -> None:
        """Count a request whose depth is known and whose cache hits are final."""
        found = min(running.holding.found[: running.groups])
        running.cached_tokens = 0 if running.scoring else min(running.prompt_len - 1, found)
        self.metrics.routed(running.layers, running.prompt_len, running.cached_tokens)

    def _preempt(self, running: Running) -> None:
        self.metrics.preemptions += 1
        self.running.remove(running)
        running.holding.release(self.pages)
        self._queue(running)

    def _queue(self, running: Running) -> None:
        if not self.waiting:
            self.pace.waits(self.clock())
        bisect.insort(self.waiting, running, key=by_order)


def by_order(running: Running) -> tuple[int, int, int]:
    """What lists of requests are sorted by."""
    return running.order
