"""A request from its submission to its end: continuous batching over a bounded number of rows and of KV units. Pure Python, no
tensors.

    plan = scheduler.plan();  outcome = runner.run(plan);  events = scheduler.commit(plan, outcome)

A request's life:

    submit ─> waiting ─admit─> running: [group 1 over the prompt ─> depth decided ─>] its groups over the prompt ─> decode
                 ^                │             ^                                                                  │
                 └── preempted ───┘             └── after so many tokens of the answer, where the router looks again ─┘
    ... and from anywhere to exactly one `Finished`. A preempted one's units are released; its tokens are computed again later
    (prefix cache permitting). One whose depth is decided anew keeps its units, and runs what a deeper depth lacks.

What a step runs is planned in `planning`; here is who comes, what becomes of a step, and how each ends. A request that could
never fit is refused at submission, and so is one whose deadline the measured pace of the queue puts out of reach.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from shoal.config import GROUPS, ModelConfig
from shoal.engine.drafting import Drafting
from shoal.engine.events import Event, Finished, FinishReason, Token
from shoal.engine.pages import Pages
from shoal.engine.plan import Decision, Outcome, Plan, Sampled, Work
from shoal.engine.planning import Planning, by_order
from shoal.engine.running import Running
from shoal.engine.shares import Shares, may_wait
from shoal.errors import DeadlineError, RequestError, again


class Scheduler(Planning):
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
        cheap = config.exits[0] / config.layers
        drafting = Drafting(speculative, speculative_max_batch, able=len(config.exits) > 1, cheap=cheap)
        super().__init__(
            config, pages, max_batch_tokens=max_batch_tokens, max_batch=max_batch, drafting=drafting, clock=clock
        )
        self.max_queue, self._audits = max_queue, audits
        self._began = 0.0  # when the step was planned
        self._live: dict[str, Running] = {}
        self._shares = Shares()
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
        before = bisect.bisect(self.waiting, running.order, key=by_order) + places
        self._door.must_be_in_time(running, max(0, before - self.max_batch), self.max_batch_tokens)
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
        return self._next()

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
            self._append(work.running, sampled, now, drafted=bool(sampled.after))
            if work.drafts:
                self._take_drafts(work, sampled, now)
            self._look(work.running)
        self.judge.took(plan, outcome, cost[1])
        return self.take_events()

    def _find(self, request: str | Running) -> Running | None:
        """A live request, given by its id or as itself."""
        live = self._live.get(request if isinstance(request, str) else request.id)
        return live if isinstance(request, str) or live is request else None

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

    def _append(self, running: Running, sampled: Sampled, now: float, drafted: bool = False) -> None:
        """Take in the next token of `running`, or that there is none; `drafted`: it is a draft that stood."""
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
        running.heard.drafts_accepted += drafted
        sampling, answered = running.sampling, running.answered
        text, stopped = running.text.push(token, may_stop=answered >= sampling.min_tokens)
        if told is None:
            self.metrics.generation_tokens += 1
            self.metrics.measured += running.tolerance is not None
            spent = None if running.tolerance is None else running.spent
            self._events.append(Token(running.id, token, text, sampled.logprob, running.layers, spent, running.ran))
        if stopped:
            self._finish(running, "stop")
        elif answered >= sampling.max_tokens:
            self._finish(running, "length")

    def _take_drafts(self, work: Work, sampled: Sampled, now: float) -> None:
        """Append what follows from right drafts, whose rows stand in every group, and give back the units that wrong ones
        were written to."""
        running = work.running
        self.metrics.drafts += sampled.drafted
        self.metrics.drafts_accepted += len(sampled.after)
        for place, following in enumerate(sampled.after, 1):
            if self._live.get(running.id) is not running:
                return
            running.holding.advance(self.pages, len(running.tokens), 0, work.last)
            self._append(running, following, now, drafted=place < len(sampled.after))
        running.holding.trim(self.pages, work.last)

    def _finish(self, running: Running, reason: FinishReason, error: RequestError | None = None) -> None:
        end = running.finished(reason, self.clock(), error)
        first = None if running.first_token_at is None else end.first_token_seconds
        units = sum(running.holding.owned)
        here = running.answered - max(0, len(running.request.answer) - 1)  # from the one on that `first` is the time of
        self.metrics.ended(reason, units, end.queue_seconds, first, end.total_seconds, here)
        del self._live[running.id]
        self._paused -= running.paused
        place = self.running if running in self.running else self.waiting
        del place[bisect.bisect_left(place, running.order, key=by_order)]
        running.holding.release(self.pages)
        self._shares.left(running)
        if running.audited and reason in ("stop", "length"):
            self.judge.told(running)
        self._events.append(end)

    def _settle(self) -> None:
        """Put those that run and those that wait in order, now that some have come or ended."""
        if self._shares.settle():
            self.running.sort(key=by_order)
            self.waiting.sort(key=by_order)
