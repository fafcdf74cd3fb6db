"""Who runs next: continuous batching over a bounded number of rows and of KV units. Pure Python, no tensors.

    plan = scheduler.plan();  outcome = runner.run(plan);  events = scheduler.commit(plan, outcome)

A request's life:

    submit ─> waiting ─admit─> running: [group 1 over the prompt ─> depth decided ─>] its groups over the prompt ─> decode
                 ^                │
                 └── preempted ───┘ units released; its tokens are computed again later (prefix cache permitting)
    ... and from anywhere to exactly one `Finished`.

Rules that hold in every step: requests go in the order (priority, arrival). Every decoding request gets its row; what is
left of the row budget goes to prefills in chunks, and at least one page's worth always is left, so neither starves the
other. Units are taken from requests later in the order, and from requests whose reader is behind, never from earlier
ones: the first request always advances, so all end. A request that could never fit is refused at submission, and so is
one whose deadline the measured pace of the queue puts out of reach.

One exception: while all requests decode, a step may run the shallow ones alone, as otherwise they would wait in every step
for the groups that others run through (docs/decisions/0005). Such steps take at most `pace.SHALLOW_SHARE` of the time that
full steps take, so no deep request is slowed down by more than that.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from shoal.config import GROUPS, ModelConfig
from shoal.engine import holdings
from shoal.engine.events import Event, Finished, FinishReason, Token
from shoal.engine.metrics import Metrics
from shoal.engine.pace import Pace
from shoal.engine.pages import Pages
from shoal.engine.plan import Decision, Outcome, Plan, Sampled, Work
from shoal.engine.sequence import Sequence
from shoal.engine.speculative import Drafting, Switch
from shoal.errors import DeadlineError, QueueFullError, RequestError


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
        switch: Switch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_batch_tokens` rows and `max_batch` requests a step, `max_queue` more may wait; `speculative` tokens are
        drafted ahead by requests that do not say otherwise, where `switch` says that it pays."""
        self.config, self.pages, self.clock = config, pages, clock
        self.max_batch_tokens, self.max_batch, self.max_queue = max_batch_tokens, max_batch, max_queue
        self.running: list[Sequence] = []  # both in order
        self.waiting: list[Sequence] = []
        self.metrics = Metrics()
        self.pace = Pace()
        self._drafting = Drafting(speculative, switch or Switch())
        self._began = 0.0  # when the step was planned
        self._turned_away = 0  # requests refused for a full queue, less those admitted since
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._events: list[Event] = []

    # --- requests come and go -----------------------------------------------------------------------------------------

    def submit(self, seq: Sequence) -> None:
        """Admit `seq` to the queue. Raises QueueFullError; DeadlineError for one that it cannot be meant to meet; RequestError
        for an id in use, or a size that can never fit."""
        if seq.id in self._live:
            raise RequestError("request id is in use", param="id", got=seq.id)
        stored = seq.prompt_len + seq.sampling.max_tokens - 1  # the last token's K/V is never needed
        need = seq.pages_for(stored) * (seq.groups or GROUPS)
        if need > self.pages.total:
            raise RequestError(
                "the request can never fit the KV memory", param="max_tokens",
                got=f"{need} units", allowed=f"at most {self.pages.total}", do="ask for fewer tokens or less depth",
            )  # fmt: skip
        if self.full:
            self._turned_away += 1
            self.metrics.refused += 1
            error = QueueFullError("the queue is full", got=f"{len(self._live)} requests", do="try again later")
            error.retry_after = self.pace.wait(self._turned_away)  # the n-th for the n-th place that becomes free
            raise error
        if seq.request.deadline is not None and (soonest := self._soonest(seq)) > seq.request.deadline:
            self.metrics.refused += 1
            raise DeadlineError(
                "the deadline is out of reach", param="deadline", got=seq.request.deadline,
                allowed=f"{soonest:.2f} s or more at present", do="give it more time, or try again later",
            )  # fmt: skip
        self._live[seq.id] = seq
        self._queue(seq)
        if seq.request.deadline is not None:
            heapq.heappush(self._deadlines, (seq.arrival + seq.request.deadline, seq.order[1], seq.id))

    def cancel(self, request: str) -> bool:
        """End a request with reason "cancelled". False when it is not live."""
        seq = self._live.get(request)
        if seq is not None:
            self._finish(seq, "cancelled")
        return seq is not None

    def pause(self, request: str, paused: bool = True) -> None:
        """Stop (or go on) running a request. It keeps its units until somebody needs them."""
        if request in self._live:
            self._live[request].paused = paused

    def fail(self, works: Iterable[Work], error: RequestError) -> None:
        """End the requests of a step that failed."""
        for work in works:
            if work.seq.id in self._live:
                self._finish(work.seq, "error", error)

    def fail_all(self, error: RequestError) -> None:
        for seq in list(self._live.values()):
            self._finish(seq, "error", error)

    @property
    def idle(self) -> bool:
        return not self._live

    @property
    def full(self) -> bool:
        """Would a request be refused for want of a place? As many may be live as run at once and wait."""
        return len(self._live) >= self.max_batch + self.max_queue

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every unit is accounted for and every request owns what its tokens need."""
        self.pages.check_integrity(units for seq in self._live.values() for units in seq.units())
        for seq in self._live.values():
            need = [seq.pages_for(computed) for computed in seq.computed]
            if seq.owned != need:
                raise RuntimeError(f"request {seq.id} owns {seq.owned} units for pages {need}")

    # --- a step -------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The next step; no works when nothing can run."""
        self._expire()
        self._began = self.clock()
        self._drafting.stop()
        works = self._rows(self._shallow_only(), 0)
        if works:
            return Plan(works, shallow=True)
        decoding = [seq for seq in self.running if seq.decoding and not seq.paused]
        drafts = self._drafting.start(decoding, self.max_batch_tokens - self.config.page)  # prefill keeps its page
        room = self.max_batch_tokens - len(decoding) - drafts  # rows for prefill
        works = self._rows(list(self.running), room)
        room -= sum(work.count for work in works if not work.seq.decoding)
        while room > 0 and (admitted := self._admit()) is not None:
            work = self._work(admitted, room)
            if self._reserve(admitted, work):
                works.append(work)
                room -= work.count
        return Plan(sorted(works, key=lambda work: -work.last))

    def commit(self, plan: Plan, outcome: Outcome) -> list[Event]:
        """Take in what a step gave, and return the events since the last call."""
        now = self.clock()
        self.pace.step(*plan.cost, now - self._began, shallow=plan.shallow)
        self._drafting.learn(plan, outcome, now - self._began)
        rows = sum(work.count for work in plan.works)
        self.metrics.steps += 1
        self.metrics.rows += rows
        self.metrics.iteration_tokens_total.observe(rows)
        page = self.config.page
        for work in plan.works:
            seq, end = work.seq, work.end
            fills = end // page > work.start // page
            for j in range(work.first, work.last):
                if seq.computed[j] < end:
                    seq.computed[j] = end
                if fills:
                    holdings.offer(self.pages, seq, j)
            seq.at = end
        for work, decision in zip(plan.decisions, outcome.decisions, strict=True):
            self._decide(work.seq, decision)
        for work, scores in zip(plan.scores, outcome.scores, strict=True):
            work.seq.prompt_logprobs += scores
        for work, sampled in zip(plan.samples, outcome.samples, strict=True):
            self._append(work.seq, sampled, now)
            if work.drafts:
                self._take_drafts(work.seq, sampled, now)
        return self.take_events()

    # --- planning -----------------------------------------------------------------------------------------------------

    def _soonest(self, seq: Sequence) -> float:
        """Seconds that `seq` must expect to wait for its first token: those before it in the queue, then its prompt through
        the groups that it is known to need. 0 while nothing has been measured."""
        ahead = max(0, bisect.bisect(self.waiting, seq.order, key=_order) + len(self.running) - self.max_batch)
        seq.extend_keys(self.pages)
        rows = max(1, len(seq.tokens) - self.pages.peek(0, seq.keys)[0] * seq.page)
        groups, steps = seq.groups or 1, -(-rows // self.max_batch_tokens)
        return (self.pace.wait(ahead) or 0.0) + (self.pace.seconds(groups * steps, groups * rows) or 0.0)

    def _rows(self, seqs: list[Sequence], room: int) -> list[Work]:
        """The next rows of those of `seqs` that can run: one of each that decodes, and `room` of the others in all."""
        works: list[Work] = []
        for seq in seqs:
            if seq.paused or seq not in self.running:
                continue  # not in running: it was preempted for an earlier one of this loop
            work = self._work(seq, 1 if seq.decoding else room)
            if work.drafts and seq.lacking(work.reach, work.last) > self.pages.available:
                work = replace(work, drafts=0)  # nobody loses units for drafts
            if work.count and self._reserve(seq, work):
                works.append(work)
                room -= 0 if seq.decoding else work.count
        return works

    def _shallow_only(self) -> list[Sequence]:
        """The requests of least depth, if a step of them alone pays now; else none, for a full step."""
        ready = [seq for seq in self.running if not seq.paused]
        depths = [seq.groups for seq in ready if seq.groups is not None and seq.decoding]
        if len(depths) < len(ready) or len(set(depths)) < 2:
            return []
        shallow = [seq for seq in ready if seq.groups == min(depths)]
        return shallow if self.pace.alone([min(depths)] * len(shallow), depths) else []

    def _work(self, seq: Sequence, room: int) -> Work:
        """The next rows of `seq`, at most `room`."""
        total = len(seq.tokens)
        if seq.groups is None:
            count = min(seq.todo, room)
            return Work(seq, seq.at, count, 0, 1, hold=True, decide=seq.at + count == total)
        first, end = 0, total
        if seq.held_from is not None:
            if seq.at >= seq.held_from:
                first = 1
            else:  # deeper groups found less in the prefix cache than group 1 did: its states are made again
                end = seq.held_from
        count = min(end - seq.at, room)
        score = seq.scoring and seq.at < seq.prompt_len - 1
        drafts = self._drafting.drafts(seq) if seq.decoding else 0
        return Work(seq, seq.at, count, first, seq.groups, sample=seq.at + count == total, score=score, drafts=drafts)

    def _reserve(self, seq: Sequence, work: Work) -> bool:
        """Give `seq` the units that `work` writes. When the pool is short, requests later in the order lose theirs; when
        there are none, `seq` itself does, and False is returned."""
        lack = seq.lacking(work.reach, work.last)
        while lack > self.pages.available:
            victim = self._paused_victim(seq) or self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        if lack:
            holdings.take(self.pages, seq, work)
        return True

    def _admit(self) -> Sequence | None:
        """The next waiting request, moved to running with what the prefix cache has of it; None when it must wait.

        It enters only when its whole known length fits beside what the running ones need next, so that it is not
        preempted at once. Requests behind the first never overtake it, so a long one is not starved by short ones.
        """
        seq = next((seq for seq in self.waiting if not seq.paused), None)
        if seq is None:
            return None
        while len(self.running) >= self.max_batch:
            victim = self._paused_victim(seq)
            if victim is None:
                return None
            self._preempt(victim)
        while self._needed(seq) > self.pages.available:
            victim = self._paused_victim(seq)
            if victim is None:
                return None
            self._preempt(victim)
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=_order)
        self.pace.enters(self.clock(), len(self.waiting))
        self._turned_away = max(0, self._turned_away - 1)
        self._enter(seq)
        return seq

    def _needed(self, seq: Sequence) -> int:
        """Units that must be available before `seq` may enter: its own, and one page each for those that run."""
        return holdings.needed(self.pages, seq) + sum(other.groups or 1 for other in self.running)

    def _enter(self, seq: Sequence) -> None:
        """Start `seq` with what the prefix cache has of it."""
        if seq.scoring:
            seq.prompt_logprobs = [None]
        holdings.enter(self.pages, seq)
        if seq.admitted_at is None:
            seq.admitted_at = self.clock()
            self.metrics.prompt_tokens += seq.prompt_len
            if seq.groups is not None:
                self._entered(seq)

    def _entered(self, seq: Sequence) -> None:
        """Count a request whose depth is known and whose cache hits are final."""
        seq.cached_tokens = 0 if seq.scoring else min(seq.prompt_len - 1, *seq.found[: seq.groups])
        self.metrics.prefix_queries += seq.prompt_len
        self.metrics.prefix_hits += seq.cached_tokens
        self.metrics.depths[seq.layers] = self.metrics.depths.get(seq.layers, 0) + 1

    def _paused_victim(self, seq: Sequence) -> Sequence | None:
        return next((other for other in reversed(self.running) if other.paused and other is not seq), None)

    def _preempt(self, seq: Sequence) -> None:
        self.metrics.preemptions += 1
        self.running.remove(seq)
        holdings.release(self.pages, seq)
        self._queue(seq)

    def _queue(self, seq: Sequence) -> None:
        if not self.waiting:
            self.pace.waits(self.clock())
        bisect.insort(self.waiting, seq, key=_order)

    def _expire(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, request = heapq.heappop(self._deadlines)
            seq = self._live.get(request)
            if seq is not None and seq.order[1] == number:
                error = DeadlineError("the request ran out of its time", param="deadline", got=seq.request.deadline)
                self._finish(seq, "deadline", error)

    # --- taking in a step ---------------------------------------------------------------------------------------------

    def _decide(self, seq: Sequence, decision: Decision) -> None:
        """Fix the depth, and look for the prompt in the deeper groups' prefix cache."""
        seq.layers = decision.layers
        seq.groups = decision.layers // self.config.group_layers
        holdings.deepen(self.pages, seq, decision.notes)
        self._entered(seq)

    def _append(self, seq: Sequence, sampled: Sampled, now: float) -> None:
        seq.held, seq.held_from = [], None
        if sampled.error is not None:
            self._finish(seq, "error", sampled.error)
            return
        told, seq.told = seq.told, None
        token = sampled.token if told is None else told
        if seq.ends(token):
            self._finish(seq, "stop")
            return
        if seq.first_token_at is None:
            seq.first_token_at = now
        else:
            self.metrics.inter_token_latency_seconds.observe(now - seq.last_token_at)
        seq.last_token_at = now
        seq.tokens.append(token)
        sampling, answered = seq.sampling, seq.answered
        text, stopped = seq.text.push(token, may_stop=answered >= sampling.min_tokens)
        if told is None:
            self.metrics.generation_tokens += 1
            self._events.append(Token(seq.id, token, text, sampled.logprob, seq.layers))
        if stopped:
            self._finish(seq, "stop")
        elif answered >= sampling.max_tokens:
            self._finish(seq, "length")

    def _take_drafts(self, seq: Sequence, sampled: Sampled, now: float) -> None:
        """Append what follows from right drafts, whose rows stand in every group, and give back the units that wrong ones
        were written to."""
        self.metrics.drafts += sampled.drafted
        self.metrics.drafts_accepted += len(sampled.after)
        for following in sampled.after:
            if self._live.get(seq.id) is not seq:
                return
            seq.at = len(seq.tokens)
            for j in range(seq.groups or 0):
                seq.computed[j] = seq.at
                holdings.offer(self.pages, seq, j)
            self._append(seq, following, now)
        if self._live.get(seq.id) is seq:
            holdings.give_back(self.pages, seq)

    def _finish(self, seq: Sequence, reason: FinishReason, error: RequestError | None = None) -> None:
        total = self.clock() - seq.arrival
        queue = total if seq.admitted_at is None else seq.admitted_at - seq.arrival
        first = None if seq.first_token_at is None else seq.first_token_at - seq.arrival
        self.metrics.ended(reason, sum(seq.owned), queue, first, total, seq.answered)
        del self._live[seq.id]
        (self.running if seq in self.running else self.waiting).remove(seq)
        holdings.release(self.pages, seq)
        self._events.append(
            Finished(
                request=seq.id,
                reason=reason,
                text=seq.text.finish(),
                depth=seq.layers if seq.admitted_at is not None else 0,
                prompt_tokens=seq.prompt_len,
                cached_tokens=seq.cached_tokens,
                completion_tokens=seq.answered,
                queue_seconds=queue,
                first_token_seconds=first or 0.0,
                total_seconds=total,
                error=error,
                prompt_logprobs=() if seq.scoring else tuple(seq.prompt_logprobs),
            )
        )


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
