"""Who runs next: continuous batching over a bounded number of rows and of KV units. Pure Python, no tensors.

    plan = scheduler.plan();  outcome = runner.run(plan);  events = scheduler.commit(plan, outcome)

A request's life:

    submit ─> waiting ─admit─> running: [group 1 over the prompt ─> depth decided ─>] its groups over the prompt ─> decode
                 ^                │             ^                                                                  │
                 └── preempted ───┘             └── after so many tokens of the answer, where the router looks again ─┘
    ... and from anywhere to exactly one `Finished`. A preempted one's units are released; its tokens are computed again later
    (prefix cache permitting). One whose depth is decided anew keeps its units, and runs what a deeper depth lacks.

Rules that hold in every step: requests go in the order (priority, rank, arrival), where the rank is whose turn it is
(`shares`); with one client it is that of arrival. Every decoding request gets its row; what is left of the row budget goes to
prefills in chunks, and at least one page's worth always is left, so neither starves the other. Units are taken from requests
later in the order, and from requests whose reader is behind, never from earlier ones: the first request always advances, so
all end. A place and the units to enter are taken from those that rank clearly later. A request that could never fit is
refused at submission, and so is one whose deadline the measured pace of the queue puts out of reach.

What may wait (priority `events.LATER` and above) gives its place and its units to whatever else comes, and is computed on
later.

An answer that was told may be looked at by full depth (`audits`), in rows and units that the live ones leave.

Two exceptions. A payer that has had less of the engine's time than others has steps of its own until it has had as much
(`shares.Seconds`): a request in a step of thirty others' takes as long as they do. And while all requests decode, a step may
run the shallow ones alone, as otherwise they would wait in every step for the groups that others run through
(docs/decisions/0005). Such steps take at most `pace.SHALLOW_SHARE` of the time that full steps take, so no deep request is
slowed down by more than that.
"""

# long: one policy over one set of books, whose steps are read against each other
from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import replace

from shoal.config import GROUPS, ModelConfig
from shoal.engine.audits import Audits
from shoal.engine.door import Door
from shoal.engine.drafting import Drafting
from shoal.engine.events import Event, Finished, FinishReason, Token
from shoal.engine.metrics import Metrics
from shoal.engine.pace import Pace
from shoal.engine.pages import Pages
from shoal.engine.plan import Decision, Outcome, Plan, Sampled, Work, next_work
from shoal.engine.running import Running
from shoal.engine.shares import Account, Seconds, Shares, account, clearly_before, may_wait
from shoal.errors import DeadlineError, RequestError, again


class Scheduler:
    def __init__(
        self,
        config: ModelConfig,
        pages: Pages,
        *,
        max_batch_tokens: int,
        max_batch: int,
        max_queue: int,
        speculative: int = 0,
        speculative_max_batch: int | None = None,
        audits: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_batch_tokens` rows and `max_batch` requests a step, `max_queue` more may wait; `speculative` tokens are
        drafted ahead by requests that do not say otherwise, where that is measured to pay, or with `speculative_max_batch` in
        steps of so many requests. Where the router is to decide and a request has a tolerance, it runs at full depth with
        drafts instead, if `audits` and that pays."""
        self.config, self.pages, self.clock = config, pages, clock
        self.max_batch_tokens, self.max_batch, self.max_queue = max_batch_tokens, max_batch, max_queue
        self.running: list[Running] = []  # both in order
        self.waiting: list[Running] = []
        self.metrics = Metrics()
        self.pace = Pace()
        self._door = Door(pages, self.pace, self.metrics, max_batch_tokens)
        self._drafting = Drafting(
            speculative, speculative_max_batch, able=len(config.exits) > 1, cheap=config.exits[0] / config.layers
        )
        self._audits = audits
        self.judge = Audits(config, pages)
        self._began = 0.0  # when the step was planned
        self._live: dict[str, Running] = {}
        self._shares, self._seconds = Shares(), Seconds()
        self._paused = 0  # of the live ones
        self._events: list[Event] = []

    # --- requests come and go -----------------------------------------------------------------------------------------

    def submit(self, running: Running) -> None:
        """Admit `running` to the queue. Raises RequestError for an id in use and for a size that can never fit, QueueFullError,
        and DeadlineError where the answer could not begin before the deadline."""
        if running.id in self._live:
            raise RequestError("request id is in use", param="id", got=running.id)
        self._door.must_fit(running)
        if self.full or self._shares.ended:
            self._settle()
        self._shares.joins(running)
        full = self.full and not running.request.answer  # one that has begun elsewhere is let in all the same
        last = self._door.gives_place(running, self.running, self.waiting, len(self._live)) if full else None
        places = sum(may_wait(running) or not may_wait(other) for other in self.running)  # that it cannot have at once
        before = bisect.bisect(self.waiting, running.order, key=_order) + places
        self._door.must_be_in_time(running, max(0, before - self.max_batch))
        if last is not None:
            self._finish(last, "error", self._door.full(len(self._live)))
        self._live[running.id] = running  # from here on nothing can raise: a request is queued as a whole or not at all
        self._shares.joined(running)
        self._queue(running)
        self._door.came_in(running)

    def cancel(self, request: str | Running) -> bool:
        """End a request with reason "cancelled". False when it is not live. A request that is given as itself, and not by its
        id, is never mistaken for a later one of the same id."""
        running = self._find(request)
        if running is not None:
            self._finish(running, "cancelled")
        return running is not None

    def pause(self, request: str | Running, paused: bool = True) -> None:
        """Stop (or go on) running a request. It keeps its units until somebody needs them."""
        running = self._find(request)
        if running is not None:
            self._paused += paused - running.paused
            running.paused = paused

    def fail(self, works: Iterable[Work], error: RequestError) -> None:
        """End the requests of a step that failed. Where it looked at an answer too, which may be why, these begin anew, and
        what was looked at is dropped."""
        works = list(works)
        audited = any(work.audit for work in works)
        if audited:
            self.judge.failed()
        for work in works:
            if audited and work.running in self.running:
                self._preempt(work.running)
            elif not audited and work.running.id in self._live:
                self._finish(work.running, "error", again(error))

    def fail_all(self, error: RequestError) -> None:
        """End every request, for good, also one that cannot be taken out of the books, which may be broken."""
        for running in list(self._live.values()):
            try:
                self._finish(running, "error", again(error))
            except Exception:
                self._live.pop(running.id, None)
                self._events.append(Finished(running.id, "error", error=again(error)))
        self.running, self.waiting = [], []
        while not self.judge.idle:
            with suppress(Exception):
                self.judge.drop()

    @property
    def live(self) -> Collection[Running]:
        """The requests that have not ended."""
        return self._live.values()

    @property
    def idle(self) -> bool:
        """Is nothing live, and no answer still to be looked at?"""
        return not self._live and self.judge.idle

    @property
    def full(self) -> bool:
        """Are all places taken? As many requests may be live as run at once and wait; those whose reader is behind do neither,
        and have as many places of their own."""
        places = self.max_batch + self.max_queue
        return len(self._live) - min(self._paused, places) >= places

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every unit is accounted for and every request owns what its tokens need."""
        held = [*self.live, *self.judge.holder]
        self.pages.check_integrity(units for running in held for units in running.holding.units())
        for running in held:
            running.holding.check(running.id)

    # --- a step -------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step; no works when nothing can run."""
        self._expire()
        self._settle()
        self._began = self.clock()
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

    def commit(self, plan: Plan, outcome: Outcome) -> list[Event]:
        """Take in what a step gave, and return the events since the last call."""
        now = self.clock()
        cost, shallowest = plan.cost, self.config.exits[0]
        self.pace.step(*cost, now - self._began, shallow=plan.shallow)
        live = [work for work in plan.works if not work.audit]
        if live:
            self._seconds.took(live, self.pace.seconds(*cost) or 0.0)
        self._drafting.learn(plan, outcome, now - self._began)
        rows = sum(work.count for work in plan.works)
        self.metrics.steps += 1
        self.metrics.rows += rows
        self.metrics.iteration_tokens_total.observe(rows)
        for work in plan.works:
            work.running.holding.advance(self.pages, work.end, work.first, work.last)
            if work.running.looking:
                ends = (0, *self.config.ends)
                work.running.ran += ends[work.last] - ends[work.first]
        for work, decision in zip(plan.decisions, outcome.decisions, strict=True):
            self._decide(work.running, decision)
        for work, scores in zip(plan.scores, outcome.scores, strict=True):
            work.running.prompt_logprobs += scores
        for work, sampled in zip(plan.samples, outcome.samples, strict=True):
            if work.running.told is None and not work.running.looking:
                work.running.ran += work.running.layers + sampled.drafted * shallowest
            work.running.looking = False
            self._append(work.running, sampled, now)
            if work.drafts:
                self._take_drafts(work.running, sampled, now)
            self._look(work.running)
        self.judge.took(plan, outcome, cost[1])
        return self.take_events()

    # --- planning -----------------------------------------------------------------------------------------------------

    def _find(self, request: str | Running) -> Running | None:
        """A live request, given by its id or as itself."""
        live = self._live.get(request if isinstance(request, str) else request.id)
        return live if isinstance(request, str) or live is request else None

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

    def _reserve(self, running: Running, work: Work) -> bool:
        """Give `running` the units that `work` writes. When the pool is short, requests later in the order lose theirs; when
        there are none, `running` itself does, and False is returned."""
        lack = running.holding.lacking(work.reach, work.last)
        while lack > self.pages.available:
            if self.judge.give_back(1):
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
        bisect.insort(self.running, running, key=_order)
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
        return len(self.running) < self.max_batch and self.judge.give_back(lack)

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

    def _paused_victim(self) -> Running | None:
        return next((running for running in reversed(self.running) if running.paused), None)

    def _preempt(self, running: Running) -> None:
        self.metrics.preemptions += 1
        self.running.remove(running)
        running.holding.release(self.pages)
        self._queue(running)

    def _queue(self, running: Running) -> None:
        if not self.waiting:
            self.pace.waits(self.clock())
        bisect.insort(self.waiting, running, key=_order)

    def _expire(self) -> None:
        for number, request in self._door.late(self.clock()):
            running = self._live.get(request)
            if running is not None and running.number == number:
                error = DeadlineError("the request ran out of its time", param="deadline", got=running.request.deadline)
                self._finish(running, "deadline", error)

    # --- taking in a step ---------------------------------------------------------------------------------------------

    def _decide(self, running: Running, decision: Decision) -> None:
        """Fix the depth, and look for the tokens in the deeper groups' prefix cache."""
        anew, tolerance = running.least > 0, running.request.quality_tolerance
        running.layers = max(running.least, decision.layers)
        if anew:
            self.metrics.looked(deeper=running.layers > running.least)
        else:
            running.heard.decided = decision.signals
            if tolerance is not None and self._audits and self._drafting.audits(running, len(self.running), GROUPS):
                running.layers, running.tolerance = self.config.layers, tolerance
            else:
                self.judge.decided(running)
            running.look = None if running.layers == self.config.layers else running.look
        running.groups = self.config.groups(running.layers)
        running.holding.deepen(self.pages, running.groups, running.scoring, decision.notes)
        if not anew:
            self._entered(running)

    def _look(self, running: Running) -> None:
        """Let the router decide anew, where `running` lives and its answer is as long as that needs."""
        if running.look is not None and running.answered >= running.look and self._live.get(running.id) is running:
            running.undecide(self.pages)

    def _append(self, running: Running, sampled: Sampled, now: float) -> None:
        running.holding.states, running.holding.states_from = [], None
        if sampled.error is not None:
            self._finish(running, "error", sampled.error)
            return
        told, running.told = running.told, None
        token = sampled.token if told is None else told
        if told is None:
            running.spent += sampled.spent
            running.drawn += 1
            running.heard.token(sampled.nll)
            running.heard.compared(sampled.gaps)
            self.metrics.measured += running.tolerance is not None
            self.metrics.spent += sampled.spent
        if running.ends(token):
            self._finish(running, "stop")
            return
        if running.first_token_at is None:
            running.first_token_at = now
        else:
            self.metrics.inter_token_latency_seconds.observe(now - running.last_token_at)
        running.last_token_at = now
        running.tokens.append(token)
        sampling, answered = running.sampling, running.answered
        text, stopped = running.text.push(token, may_stop=answered >= sampling.min_tokens)
        if told is None:
            self.metrics.generation_tokens += 1
            spent = None if running.tolerance is None else running.spent
            self._events.append(Token(running.id, token, text, sampled.logprob, running.layers, spent))
        if stopped:
            self._finish(running, "stop")
        elif answered >= sampling.max_tokens:
            self._finish(running, "length")

    def _take_drafts(self, running: Running, sampled: Sampled, now: float) -> None:
        """Append what follows from right drafts, whose rows stand in every group, and give back the units that wrong ones
        were written to."""
        self.metrics.drafts += sampled.drafted
        self.metrics.drafts_accepted += len(sampled.after)
        running.heard.drafts_accepted += len(sampled.after)
        for following in sampled.after:
            if self._live.get(running.id) is not running:
                return
            running.holding.advance(self.pages, len(running.tokens), 0, running.groups or 0)
            self._append(running, following, now)
        if self._live.get(running.id) is running:
            running.holding.give_back(self.pages, running.groups or 0)

    def _finish(self, running: Running, reason: FinishReason, error: RequestError | None = None) -> None:
        end = running.finished(reason, self.clock(), error)
        first = None if running.first_token_at is None else end.first_token_seconds
        units = sum(running.holding.owned)
        self.metrics.ended(reason, units, end.queue_seconds, first, end.total_seconds, running.answered)
        del self._live[running.id]
        self._paused -= running.paused
        place = self.running if running in self.running else self.waiting
        del place[bisect.bisect_left(place, running.order, key=_order)]
        running.holding.release(self.pages)
        self._shares.left(running)
        if running.audited and reason in ("stop", "length"):
            self.judge.told(running)
        self._events.append(end)

    def _settle(self) -> None:
        """Put those that run and those that wait in order, now that some have come or ended."""
        if self._shares.settle():
            self.running.sort(key=_order)
            self.waiting.sort(key=_order)


def _order(running: Running) -> tuple[int, int, int]:
    return running.order
