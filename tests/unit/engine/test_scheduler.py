"""The scheduler over a fake model whose memory remembers what every slot holds.

The fake runner writes, for each row and group, the whole prefix that the K/V stand for, and checks before each row that
every earlier slot reads back its own prefix. So a wrong table, a page shared wrongly, a write into a shared page, or a
stale page fails here, whatever the order of submissions, cancellations, pauses, failures and preemptions.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal import presets
from shoal.engine.events import Event, Finished, Request, Sampling, Token, TokenLogprob
from shoal.engine.pace import WARM_UP
from shoal.engine.pages import Pages
from shoal.engine.plan import Decision, Outcome, Plan, Sampled, Work
from shoal.engine.running import Running
from shoal.engine.scheduler import Scheduler
from shoal.engine.speculative import accept
from shoal.engine.text import TextStream
from shoal.errors import DeadlineError, GenerationError, QueueFullError, RequestError
from shoal.inputs.tokenizer import END_ID, Tokenizer

CONFIG = presets.get("test").model  # 4 layers in 4 groups, exits 1, 2, 4
PAGE = 4  # small pages, so that few tokens cross many borders
TOKENIZER = Tokenizer.bytes_only()


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`: often a low id, so that answers of different requests meet."""
    value = zlib.crc32(bytes(token % 256 for token in tokens))
    return END_ID if value % 29 == 0 else 100 + value % 3


def guess(tokens: list[int]) -> int:
    """What its group 1 drafts after `tokens`: right two times out of three."""
    return next_token(tokens) if zlib.crc32(b"draft" + bytes(token % 256 for token in tokens)) % 3 else 99


def depth_of(tokens: list[int]) -> int:
    return CONFIG.exits[zlib.crc32(b"depth" + bytes(tokens)) % 3]


class FakeRunner:
    """`cost`: seconds that a step takes for each layer group, and for each row of a group."""

    def __init__(self, pages: Pages, elapse: Callable[[float], None], cost: tuple[float, float]) -> None:
        self.pages, self.elapse, self.cost = pages, elapse, cost
        self.memory: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self.works: list[Work] = []
        self.spent: list[tuple[bool, float]] = []  # of each step: shallow-only?, seconds

    def run(self, plan: Plan) -> Outcome:
        self.works = plan.works
        self.spent.append((plan.shallow, sum(x * y for x, y in zip(self.cost, plan.cost, strict=True))))
        self.elapse(self.spent[-1][1])
        assert [w.last for w in plan.works] == sorted((w.last for w in plan.works), reverse=True)
        assert len({w.running.id for w in plan.works}) == len(plan.works)
        drafts = {work: self._drafts(work) for work in plan.works}
        for work in plan.works:
            self._work(work, [*work.running.tokens, *drafts[work]])
        samples = [self._sample(work, drafts[work]) for work in plan.samples]
        return Outcome(samples, [self._decision(w) for w in plan.decisions], [self._scores(w) for w in plan.scores])

    def _drafts(self, work: Work) -> list[int]:
        tokens = list(work.running.tokens)
        assert not work.drafts or (work.count == 1 and work.sample and work.first == 0 and work.last > 1)
        while len(tokens) < work.reach and not work.running.ends(draft := guess(tokens)):
            tokens.append(draft)
        return tokens[len(work.running.tokens) :] if work.drafts else []

    def _sample(self, work: Work, drafts: list[int]) -> Sampled:
        tokens = work.running.tokens
        return accept(drafts, [Sampled(next_token([*tokens, *drafts[:i]])) for i in range(len(drafts) + 1)])

    def _work(self, work: Work, tokens: list[int]) -> None:
        """Write the rows of `work`, where `tokens` are its request's and the drafts after them."""
        running, end = work.running, work.end + len(tokens) - len(work.running.tokens)
        assert work.count > 0 and work.end <= len(running.tokens)
        if work.first == 1:
            assert running.holding.states_from is not None
            assert list(range(work.start, work.end)) == [
                p for p in running.holding.states if work.start <= p < work.end
            ]
        for j in range(work.first, work.last):
            for p in range(work.start, end):
                unit = int(running.holding.tables[j, p // PAGE])
                assert unit != 0
                if p >= running.holding.computed[j]:
                    assert self.pages._refs[unit] == 1 and unit not in self.pages._key, "a shared page is written"
                    self.memory[unit, p % PAGE] = (j, tuple(tokens[: p + 1]))
            for p in range(end):
                unit = int(running.holding.tables[j, p // PAGE])
                assert self.memory.get((unit, p % PAGE)) == (j, tuple(tokens[: p + 1])), "a slot of another prefix"
        if work.hold:
            running.holding.states += range(work.start, work.end)

    def _scores(self, work: Work) -> list[TokenLogprob]:
        assert work.scored > 0
        return [TokenLogprob(work.running.tokens[p + 1], -p) for p in range(work.start, work.start + work.scored)]

    def _decision(self, work: Work) -> Decision:
        """Every page has its sums, from the cache or from the states that were held."""
        running = work.running
        known = len(running.holding.notes)
        for index, note in enumerate(running.holding.notes):
            assert note == tuple(running.tokens[: (index + 1) * PAGE])
        rest = range(known * PAGE, len(running.tokens))
        assert [p for p in running.holding.states if p in rest] == list(rest)
        assert running.holding.states[-1] == len(running.tokens) - 1
        ends = range((known + 1) * PAGE, len(running.tokens) + PAGE, PAGE)
        return Decision(depth_of(running.tokens), [tuple(running.tokens[:end]) for end in ends])


class Harness:
    def __init__(self, units: int = 40, cost: tuple[float, float] = (0, 0), **limits: Any) -> None:
        self.now = 0.0
        self.pages = Pages(units)
        limits = {"max_batch_tokens": 12, "max_batch": 4, "max_queue": 8, "speculative_max_batch": 8} | limits
        self.scheduler = Scheduler(CONFIG, self.pages, clock=lambda: self.now, **limits)
        self.runner = FakeRunner(self.pages, self.elapse, cost)
        self.number = 0

    def elapse(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, prompt: list[int], depth: int | None = 4, *, sampling: Sampling | None = None, **more: Any) -> str:
        self.number += 1
        request = Request(prompt, sampling or Sampling(max_tokens=6), id=str(self.number), **more)
        running = Running(
            request=request,
            tokens=list(prompt),
            prompt_len=len(prompt),
            page=PAGE,
            text=TextStream(TOKENIZER, request.sampling.stop),
            seed=0,
            order=(request.priority, 0, self.number),
            arrival=self.now,
            groups=depth,  # one layer a group in this preset
            layers=depth or 0,
        )
        if request.answer:
            running.resume(request.answer)
        self.scheduler.submit(running)
        return request.id

    def step(self) -> list[Event]:
        plan = self.scheduler.plan()
        assert sum(work.count + work.drafts for work in plan.works) <= self.scheduler.max_batch_tokens
        if not plan.works:
            return self.scheduler.take_events()
        return self.scheduler.commit(plan, self.runner.run(plan))

    def run(self, steps: int = 1000) -> list[Event]:
        events: list[Event] = []
        for _ in range(steps):
            events += self.step()
            self.scheduler.check_integrity()
            if self.scheduler.idle:
                return events
        raise AssertionError("requests did not end")


def answer(prompt: list[int], limit: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < limit and (token := next_token(tokens)) != END_ID:
        tokens.append(token)
    return tokens[len(prompt) :]


def said(events: list[Event], request: str) -> list[int]:
    return [e.token for e in events if isinstance(e, Token) and e.request == request]


def end(events: list[Event], request: str) -> Finished:
    (found,) = [e for e in events if isinstance(e, Finished) and e.request == request]
    return found


def test_long_prefill_and_decodes_advance_in_every_step() -> None:
    h = Harness(units=200)
    short = [h.submit([60 + i], sampling=Sampling(max_tokens=30, ignore_eos=True)) for i in range(2)]
    h.step()
    long = h.submit(list(range(10, 70)))
    before = {r: len(h.scheduler._live[r].tokens) for r in short}
    for step in range(1, 6):
        h.step()
        assert [len(h.scheduler._live[r].tokens) - before[r] for r in short] == [step, step]
        assert h.scheduler._live[long].holding.at == 10 * step  # all that two decodes leave of 12 rows
        assert sum(w.count for w in h.runner.works) <= 12


def test_priorities_then_arrival() -> None:
    h = Harness(max_batch=1)
    first, late, urgent = h.submit([50]), h.submit([51]), h.submit([52], priority=-1)
    events = h.run()
    assert [e.request for e in events if isinstance(e, Finished)] == [urgent, first, late]


def test_the_queue_is_bounded() -> None:
    h = Harness(max_batch=1, max_queue=2)
    for i in range(3):
        h.submit([50 + i])
    with pytest.raises(QueueFullError) as caught:
        h.submit([53])
    assert caught.value.status == 429
    assert len([e for e in h.run() if isinstance(e, Finished)]) == 3


def test_what_can_never_fit_is_refused_and_what_just_fits_runs() -> None:
    h = Harness(units=1 + 4 * 4)
    with pytest.raises(RequestError, match="never fit") as caught:
        h.submit(list(range(50, 62)), sampling=Sampling(max_tokens=6))  # 17 tokens stored: 5 pages
    assert caught.value.param == "max_tokens"
    request = h.submit(list(range(50, 62)), sampling=Sampling(max_tokens=5, ignore_eos=True))
    assert len(said(h.run(), request)) == 5


def test_an_id_in_use_is_refused() -> None:
    h = Harness()
    h.submit([50])
    h.number = 0
    with pytest.raises(RequestError, match="in use"):
        h.submit([51])


def test_a_short_pool_preempts_the_last_and_its_answer_is_the_same() -> None:
    h = Harness(units=1 + 4 * 7)
    prompts = [list(range(50 + i, 58 + i)) for i in range(3)]
    ids = [h.submit(p, sampling=Sampling(max_tokens=16, ignore_eos=True)) for p in prompts]
    events = h.run()
    assert h.scheduler.metrics.preemptions > 0
    for prompt, request in zip(prompts, ids, strict=True):
        tokens = list(prompt)
        for _ in range(16):
            tokens.append(next_token(tokens))
        assert said(events, request) == tokens[8:]
    firsts = [e.request for e in events if isinstance(e, Finished)]
    assert firsts[0] == ids[0]  # the first is never the victim


def test_a_shared_prefix_is_computed_once_and_counted() -> None:
    h = Harness(units=100)
    prompt = list(range(50, 62))
    h.submit(prompt, 4)
    h.run()
    rows = h.scheduler.metrics.rows
    again = h.submit([*prompt, 99], 4, sampling=Sampling(max_tokens=1))
    finished = end(h.run(), again)
    assert finished.cached_tokens == 12
    assert h.scheduler.metrics.rows - rows == 1
    whole = h.submit(prompt, 4, sampling=Sampling(max_tokens=1))
    assert end(h.run(), whole).cached_tokens == 11  # the last row always runs: it gives the next token
    assert (h.scheduler.metrics.prefix_queries, h.scheduler.metrics.prefix_hits) == (37, 23)


def test_cancel_waiting_running_and_finished() -> None:
    h = Harness(max_batch=1)
    running, waiting = h.submit(list(range(50, 70))), h.submit([51])
    h.step()
    assert h.scheduler.cancel(waiting) and h.scheduler.cancel(running) and not h.scheduler.cancel(running)
    events = h.step()
    assert {e.request: (e.reason, e.depth) for e in events if isinstance(e, Finished)} == {
        waiting: ("cancelled", 0),
        running: ("cancelled", 4),
    }
    h.scheduler.check_integrity()
    assert h.pages.available == h.pages.total


def test_deadlines_end_waiting_and_running_requests() -> None:
    h = Harness(max_batch=1)
    slow = h.submit([50], sampling=Sampling(max_tokens=30, ignore_eos=True), deadline=5)
    queued = h.submit([51], deadline=3)
    h.step()
    h.now = 3.0
    events = h.step()
    assert end(events, queued).reason == "deadline" and isinstance(end(events, queued).error, DeadlineError)
    h.now = 5.0
    events = h.step()
    assert end(events, slow).reason == "deadline" and end(events, slow).completion_tokens == 2
    assert h.scheduler.idle and h.pages.available == h.pages.total


def test_a_deadline_of_an_earlier_request_does_not_end_a_later_one_of_the_same_id() -> None:
    h = Harness()
    h.submit([50], deadline=5, sampling=Sampling(max_tokens=1))
    h.run()
    h.number = 0
    again = h.submit([50], sampling=Sampling(max_tokens=3, ignore_eos=True))
    h.scheduler._live[again].order = (0, 0, 7)
    h.step()
    h.now = 6.0
    assert end(h.run(), again).reason == "length"


def test_a_failed_step_ends_its_requests_only() -> None:
    h = Harness(max_batch=1)
    first, second = h.submit([50]), h.submit([51])
    plan = h.scheduler.plan()
    h.scheduler.fail(plan.works, GenerationError("boom"))
    assert end(h.scheduler.take_events(), first).reason == "error"
    h.scheduler.check_integrity()
    assert end(h.run(), second).reason in ("stop", "length")


def test_a_paused_request_waits_and_gives_way() -> None:
    h = Harness(units=1 + 4 * 6)
    slow = h.submit(list(range(50, 58)), sampling=Sampling(max_tokens=10, ignore_eos=True))
    h.step()
    h.scheduler.pause(slow)
    h.step()
    assert h.scheduler._live[slow].answered == 1
    others = [h.submit(list(range(60 + i, 76 + i)), sampling=Sampling(max_tokens=6)) for i in range(2)]
    events: list[Event] = []
    while len(h.scheduler._live) > 1:
        events += h.step()
        h.scheduler.check_integrity()
    assert all(end(events, r).reason in ("stop", "length") for r in others)
    assert h.scheduler.metrics.preemptions >= 1  # the paused one lost its units
    assert not h.scheduler.plan().works
    h.scheduler.pause(slow, False)
    assert len(said(events + h.run(), slow)) == 9  # the tenth came in the first step
    assert h.pages.available == h.pages.total


def test_a_batch_full_of_paused_requests_lets_others_in() -> None:
    h = Harness(units=200, max_batch=2)
    held = [h.submit([50 + i], sampling=Sampling(max_tokens=20, ignore_eos=True)) for i in range(2)]
    h.step()
    for request in held:
        h.scheduler.pause(request)
    other = h.submit([60])
    events: list[Event] = []
    for _ in range(10):
        events += h.step()
    assert end(events, other).reason in ("stop", "length")


def test_a_stop_string_ends_within_its_token_and_is_not_said() -> None:
    h = Harness()
    token = TOKENIZER.encode("x")[0]
    h.runner._work = lambda work, tokens: None  # type: ignore[method-assign]
    request = h.submit([50], sampling=Sampling(max_tokens=9, stop=["xx"]))
    events: list[Event] = []
    while not h.scheduler.idle:
        plan = h.scheduler.plan()
        events += h.scheduler.commit(plan, Outcome([Sampled(token)]))
    assert end(events, request).reason == "stop"
    assert "".join(e.text for e in events if isinstance(e, Token)) + end(events, request).text == ""
    assert end(events, request).completion_tokens == 2


def test_a_stop_string_counts_from_the_last_token_that_must_come() -> None:
    """`min_tokens` of the answer are said whatever they spell; a stop string that the last of them completes ends it."""
    for least, said_before in ((0, 1), (1, 1), (2, 2), (3, 3)):
        h = Harness()
        h.runner._work = lambda work, tokens: None  # type: ignore[method-assign]
        request = h.submit([50], sampling=Sampling(max_tokens=9, min_tokens=least, stop=["x"]))
        events: list[Event] = []
        while not h.scheduler.idle:
            plan = h.scheduler.plan()
            events += h.scheduler.commit(plan, Outcome([Sampled(TOKENIZER.encode("x")[0])]))
        assert (end(events, request).reason, end(events, request).completion_tokens) == ("stop", said_before)


def test_no_step_is_of_the_shallow_alone_while_a_prompt_is_on_its_way() -> None:
    """It would wait in them. There are such steps before it comes, and after it."""
    h = Harness(units=400, cost=(0.1, 0.001))
    for _ in range(WARM_UP):
        h.scheduler.pace.step(4, 8, 0.408)
    going = Sampling(max_tokens=200, ignore_eos=True)
    for token, depth in ((60, 1), (61, 1), (62, 4)):
        h.submit([token], depth, sampling=going)
    h.step()

    def shallow(steps: int) -> bool:
        for _ in range(steps):
            h.step()
        return any(alone for alone, _ in h.runner.spent[-steps:])

    assert shallow(10)
    long = h.scheduler._live[h.submit(list(range(10, 160)), sampling=going)]
    while long.admitted_at is None:
        h.step()
    assert long.todo > 100
    while long.todo > 1:
        assert not shallow(1)
    assert shallow(10)


@pytest.mark.parametrize("depth", [None, 1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 21])
def test_logprobs_of_a_prompt_are_of_all_its_tokens_whatever_is_cached(depth: int | None, length: int) -> None:
    h = Harness(units=200)
    prompt = list(range(50, 50 + length))
    for d in (None, 4):
        h.submit(prompt, d)
    h.run()
    rows = h.scheduler.metrics.rows
    request = h.submit(prompt, depth, sampling=Sampling(max_tokens=2, prompt_logprobs=0))
    finished = end(h.run(), request)
    assert h.scheduler.metrics.rows - rows >= length
    assert finished.cached_tokens == 0 or length == 1
    assert finished.prompt_logprobs == (None, *[TokenLogprob(prompt[p + 1], -p) for p in range(length - 1)])


@pytest.mark.parametrize("units", [17, 18])
@pytest.mark.parametrize("priority", [-1, 0])
@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("length", [4, 8, 12])
def test_a_newcomer_whose_prompt_is_cached_takes_no_units_for_drafts(
    units: int, priority: int, drafts: int, length: int
) -> None:
    """It enters a pool with room for its prompt and no more: with drafts it would preempt itself, and enter, without end; or,
    earlier in the order, a request that has its rows in the same step."""
    h = Harness(units, max_batch_tokens=40)
    prompt, drafted = list(range(50, 50 + length)), Sampling(max_tokens=8, ignore_eos=True, speculative=drafts)
    h.submit(prompt, sampling=Sampling(max_tokens=1))
    h.run()
    running = h.submit([60, 61, 62], 2, sampling=drafted)
    h.step()
    newcomer = h.submit(prompt, sampling=dataclasses.replace(drafted, max_tokens=4), priority=priority)
    preempt = h.scheduler._preempt

    def once(running: Running) -> None:
        preempt(running)
        assert h.scheduler.metrics.preemptions < 50, "preempted without end"

    h.scheduler._preempt = once  # type: ignore[method-assign]
    events = h.run()
    for request, asked in ((running, [60, 61, 62]), (newcomer, prompt)):
        tokens = list(asked)
        while len(tokens) < len(asked) + (8 if request == running else 4):
            tokens.append(next_token(tokens))
        assert said(events, request) == tokens[len(asked) :][-len(said(events, request)) :]
        assert end(events, request).completion_tokens == len(tokens) - len(asked)


def test_a_step_never_runs_more_rows_than_it_may_drafts_of_newcomers_included() -> None:
    h = Harness(units=200, max_batch_tokens=12, max_batch=8)
    prompt = list(range(50, 58))
    h.submit(prompt, sampling=Sampling(max_tokens=1))
    h.run()
    h.submit([70], sampling=Sampling(max_tokens=12, ignore_eos=True, speculative=1))
    h.step()
    for _ in range(7):
        h.submit(prompt, sampling=Sampling(max_tokens=12, ignore_eos=True, speculative=8))
    while not h.scheduler.idle:
        h.step()
        assert sum(work.count + work.drafts for work in h.runner.works) <= 12


class SchedulerMachine(RuleBasedStateMachine):
    """Anything in any order over a small pool. Integrity after every step; every request ends once, with the answer that
    it would have had alone."""

    @initialize(
        units=st.one_of(st.integers(17, 20), st.integers(17, 60)),
        rows=st.integers(8, 40),
        batch=st.integers(1, 4),
        cost=st.sampled_from([(0, 0), (0.1, 0.001), (0, 0.01)]),
        drafts=st.sampled_from([0, 1, 3]),
    )
    def build(self, units: int, rows: int, batch: int, cost: tuple[float, float], drafts: int) -> None:
        rows = max(rows, batch + PAGE)
        self.h = Harness(units, cost, max_batch_tokens=rows, max_batch=batch, max_queue=2, speculative=drafts)
        for _ in range(WARM_UP if cost[0] else 0):
            self.h.scheduler.pace.step(4, 8, 4 * cost[0] + 8 * cost[1])  # so that shallow-only steps come soon
        self.wanted: dict[str, tuple[list[int], int]] = {}
        self.told: dict[str, int] = {}  # tokens of its answer that another engine gave
        self.scored: set[str] = set()
        self.ended: dict[str, str] = {}
        self.got: dict[str, list[int]] = {}

    @rule(
        start=st.sampled_from([[2], [1] * 4, [1] * 8]),
        rest=st.one_of(st.just([]), st.lists(st.integers(1, 2), max_size=9)),  # nothing: whole pages, cached next time
        depth=st.sampled_from([None, 1, 2, 4]),
        limit=st.integers(1, 7),
        priority=st.integers(-1, 1),
        deadline=st.sampled_from([None, None, 1.0, 5.0]),
        scored=st.booleans(),
        drafts=st.sampled_from([None, 0, 2, 8]),
        told=st.sampled_from([0, 0, 1, 3, 7]),
        payer=st.sampled_from(["a", "a", "a", "b"]),
    )
    def submit(
        self,
        start: list[int],
        rest: list[int],
        depth: int | None,
        limit: int,
        priority: int,
        deadline: float | None,
        scored: bool,
        drafts: int | None,
        told: int,
        payer: str,
    ) -> None:
        """`told`: tokens that it comes with from a replica that was lost, if its depth is known."""
        prompt = start + rest
        sampling = Sampling(max_tokens=limit, prompt_logprobs=0 if scored else None, speculative=drafts)
        given = answer(prompt, limit)[:told] if depth else []
        try:
            more = {"priority": priority, "deadline": deadline, "answer": tuple(given), "payer": payer}
            request = self.h.submit(prompt, depth, sampling=sampling, **more)
        except RequestError:
            return
        self.wanted[request], self.got[request], self.told[request] = (prompt, limit), list(given), len(given)
        self.scored |= {request} if scored else set()

    @rule(pick=st.integers(0, 7), depth=st.sampled_from([2, 4]), priority=st.integers(-1, 1))
    def again(self, pick: int, depth: int, priority: int) -> None:
        """A prompt that was asked before, and may be cached as a whole, by a request that drafts as far as it may."""
        if self.wanted:
            prompt, _ = self.wanted[sorted(self.wanted)[pick % len(self.wanted)]]
            self.submit(prompt, [], depth, 12, priority, None, False, 8, 0, "b")

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.h.now += 0.1
            self.take(self.h.step())

    @rule(pick=st.integers(0, 7))
    def cancel(self, pick: int) -> None:
        self.on_one(pick, self.h.scheduler.cancel)

    @rule(pick=st.integers(0, 7), paused=st.booleans())
    def pause(self, pick: int, paused: bool) -> None:
        self.on_one(pick, lambda request: self.h.scheduler.pause(request, paused))

    @rule(pick=st.integers(0, 7))
    def preempt(self, pick: int) -> None:
        running = self.h.scheduler.running
        if running:
            self.h.scheduler._preempt(running[pick % len(running)])

    @rule(written=st.booleans())
    def fail(self, written: bool) -> None:
        plan = self.h.scheduler.plan()
        if written and plan.works:
            self.h.runner.run(plan)
        self.h.scheduler.fail(plan.works, GenerationError("boom"))
        self.take(self.h.scheduler.take_events())

    def on_one(self, pick: int, act: Callable[[str], object]) -> None:
        live = sorted(self.h.scheduler._live)
        if live:
            act(live[pick % len(live)])

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request not in self.ended, "an event after the end"
            if isinstance(event, Finished):
                self.ended[event.request] = event.reason
                if event.request in self.scored and event.reason in ("stop", "length"):
                    tokens = [entry and entry.token for entry in event.prompt_logprobs]
                    assert tokens == [None, *self.wanted[event.request][0][1:]]
            else:
                self.got[event.request].append(event.token)

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "h"):
            self.h.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "h"):
            return
        for request in self.h.scheduler._live:
            self.h.scheduler.pause(request, False)
        self.take(self.h.run())
        assert self.ended.keys() == self.wanted.keys()
        for request, (prompt, limit) in self.wanted.items():
            whole = answer(prompt, limit)
            assert self.got[request] == whole[: len(self.got[request])]
            if self.ended[request] in ("stop", "length"):
                assert self.got[request] == whole
        assert self.h.pages.available == self.h.pages.total


TestScheduler = SchedulerMachine.TestCase  # hypothesis: short sequences, made shorter where one fails
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
