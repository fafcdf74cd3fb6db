"""Who has which rows and units in a step, and what is counted of it, by hand: small scenes over the fake model of
`test_scheduler`, whose pages have four slots and whose groups one layer each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shoal.engine.events import LATER, Finished, Request, Sampling, Token
from shoal.engine.plan import Outcome, Plan, Sampled, Work
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from tests.unit.engine.test_scheduler import CONFIG, PAGE, TOKENIZER, Harness, end, next_token, said

AT = [0.25]  # nats that each row of an audited answer is said to lose


def long(tokens: int = 40, **more: Any) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True, **more)


def live(h: Harness, request: str) -> Running:
    return h.scheduler._live[request]


def rows(works: list[Work]) -> dict[str, tuple[int, int]]:
    """Rows of each request in a step, and its drafts."""
    return {work.running.id: (work.count, work.drafts) for work in works}


def told(h: Harness, count: int, layers: int = 1) -> Running:
    """An answer of one layer, of `count` tokens with its prompt of two, that is to be looked at."""
    request = Request([50, 51], long(count), id="told", quality_tolerance=0.05)
    one = Running(
        request, list(range(50, 50 + count)), prompt_len=2, page=PAGE, text=TextStream(TOKENIZER, ()), seed=0,
        order=(0, 0, 0), arrival=0.0, layers=layers, drawn=count - 2,
    )  # fmt: skip
    h.scheduler.judge.told(one)
    return one


def end_of(h: Harness, request: str) -> Finished:
    """Where all there is has ended."""
    return end(h.run(), request)


def commit(h: Harness, plan: Plan) -> None:
    """Run `plan`, and let each row that full depth looks at lose as much."""
    outcome = h.runner.run(plan)
    looked = sum(last - first for work in plan.works for _, first, last in work.spans)
    h.scheduler.commit(plan, dataclasses.replace(outcome, lost=AT * looked))


# --- rows and units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "drafted"), [(4, 4), (5, 5), (6, 0)])
def test_drafts_take_units_that_nobody_has_and_no_others(asked: int, drafted: int) -> None:
    """A page a group is left: drafts that reach over two are left out, all of them, and nobody gives way for them."""
    h = Harness(units=1 + 20, max_batch_tokens=40)
    first = h.submit([60, 61], sampling=long(12, speculative=asked))
    other = h.submit(list(range(50, 61)), sampling=long(3, speculative=0))
    h.step()
    assert h.pages.available == 4 and [h.scheduler._live[each].todo for each in (first, other)] == [1, 1]
    plan = h.scheduler.plan()
    assert rows(plan.works) == {first: (1, drafted), other: (1, 0)} and h.scheduler.metrics.preemptions == 0
    h.scheduler.commit(plan, h.runner.run(plan))
    h.scheduler.check_integrity()


def test_the_first_of_all_has_its_row_in_the_step_that_takes_units_from_another() -> None:
    h = Harness(units=1 + 4 * 4)
    first, last = (h.submit([60 + i] * 4, sampling=long(9)) for i in range(2))
    before, seen = 0, list[bool]()
    while first in h.scheduler._live:
        plan = h.scheduler.plan()
        assert rows(plan.works)[first][0] >= 1
        seen.append(h.scheduler.metrics.preemptions > before)
        if seen[-1]:
            assert last not in rows(plan.works) and h.scheduler.waiting[0].id == last
        before = h.scheduler.metrics.preemptions
        h.scheduler.commit(plan, h.runner.run(plan))
    assert any(seen) and end(h.run(), last).reason == "length"


def test_who_decodes_and_its_drafts_have_their_rows_and_prompts_all_that_are_left() -> None:
    h = Harness(units=400, max_batch_tokens=24)
    drafting = h.submit([60], sampling=long(speculative=3))
    plain = h.submit([61], sampling=long())
    h.step()
    prompts = [h.submit(list(range(10 * i, 10 * i + 16)), sampling=long(2)) for i in range(1, 4)]
    plan = h.scheduler.plan()
    assert rows(plan.works) == {drafting: (1, 3), plain: (1, 0), prompts[0]: (16, 0), prompts[1]: (3, 0)}
    h.scheduler.commit(plan, h.runner.run(plan))
    assert [running.id for running in h.scheduler.waiting] == prompts[2:], "no rows were left for it"
    assert (h.scheduler.metrics.steps, h.scheduler.metrics.rows) == (2, 2 + 21)
    observed = h.scheduler.metrics.iteration_tokens_total
    assert (observed.count, observed.sum) == (2, 23)


def test_drafts_leave_a_prompt_a_page_of_rows() -> None:
    """A page of the model's, of eight: of twenty rows twelve are for who decodes and for drafts."""
    for asked, drafted in ((11, 11), (12, 0)):
        h = Harness(units=400, max_batch_tokens=CONFIG.page + 12)
        one = h.submit([60], sampling=long(speculative=asked))
        h.step()
        assert rows(h.scheduler.plan().works) == {one: (1, drafted)}


def test_the_deepest_go_first_and_of_one_depth_those_of_an_adapter_together() -> None:
    h = Harness(units=400, max_batch_tokens=40, max_batch=8)
    for depth, adapter in ((1, ""), (4, "b"), (2, "b"), (4, ""), (2, "a"), (4, "b"), (2, "b")):
        h.submit([60], depth, sampling=long(2), adapter=adapter)
    works = h.scheduler.plan().works
    assert [(work.last, work.running.request.adapter) for work in works] == [
        (4, ""), (4, "b"), (4, "b"), (2, "a"), (2, "b"), (2, "b"), (1, ""),
    ]  # fmt: skip


def test_who_waits_enters_beside_a_page_for_each_of_those_that_run_and_nobody_overtakes() -> None:
    """Four groups and two run, and six units are kept for their next pages: of the fourteen that are available a prompt of two
    pages in four groups has eight, and one of three none."""
    for length, enters in ((8, True), (9, False)):
        h = Harness(units=1 + 6 + 14, max_batch=4, max_batch_tokens=40)
        going = [h.submit([60], 4, sampling=long(6)), h.submit([61], 2, sampling=long(6))]
        h.step()
        assert h.pages.available == 14 and h.scheduler._beside == 6
        long_one = h.submit(list(range(10, 10 + length)), 4, sampling=long(1))
        short = h.submit([70], 1, sampling=long(1))
        plan = h.scheduler.plan()
        assert set(rows(plan.works)) == {*going, *[long_one] * enters}
        assert [running.id for running in h.scheduler.waiting] == [short] if enters else [long_one, short]


def test_a_row_that_is_left_is_for_who_waits() -> None:
    h = Harness(units=400, max_batch_tokens=24)
    going = h.submit([60], sampling=long())
    h.step()
    asked = [h.submit(list(range(10 * i, 10 * i + count)), sampling=long(2)) for i, count in ((1, 16), (4, 6), (7, 9))]
    assert rows(h.scheduler.plan().works) == {going: (1, 0), asked[0]: (16, 0), asked[1]: (6, 0), asked[2]: (1, 0)}
    assert h.scheduler.waiting == []


def test_what_may_wait_gives_its_place_or_units_only_where_these_are_lacking() -> None:
    """Its own page in four groups, and a prompt of two beside a page of who runs: twelve units."""
    for available, places, gives in ((12, 2, False), (11, 2, True), (12, 1, True), (99, 1, True)):
        h = Harness(units=400, max_batch=places, max_batch_tokens=40)
        waits = h.submit([60], sampling=long(3), priority=LATER)
        h.step()
        h.pages.allocate(h.pages.available - available)
        comes = h.submit(list(range(10, 18)), sampling=long(1))
        works = h.scheduler.plan().works
        assert comes in rows(works) and (waits in rows(works)) is not gives, (available, places)
        assert h.scheduler.metrics.preemptions == gives


def test_a_place_that_is_taken_is_waited_for_however_many_units_there_are() -> None:
    h = Harness(units=400, max_batch=1, max_batch_tokens=40)
    one, other = (h.submit([60 + i], sampling=long(3)) for i in range(2))
    for _ in range(3):
        plan = h.scheduler.plan()
        assert list(rows(plan.works)) == [one]
        h.scheduler.commit(plan, h.runner.run(plan))
    assert list(rows(h.scheduler.plan().works)) == [other]


def test_a_prompt_is_counted_once_however_often_it_begins() -> None:
    h = Harness(units=400)
    one = h.submit(list(range(50, 60)), sampling=long(4))
    h.now = 2.0
    h.step()
    for _ in range(2):
        h.now += 1.0
        h.scheduler._preempt(h.scheduler._live[one])
        h.step()
    finished = end(h.run(), one)
    metrics = h.scheduler.metrics
    assert (metrics.prompt_tokens, metrics.prefix_queries, metrics.prefix_hits) == (10, 10, 0)
    assert (finished.queue_seconds, finished.cached_tokens, metrics.preemptions) == (2.0, 0, 2)
    assert metrics.depths == {4: 1} and finished.prompt_logprobs == (), "nobody asked for them"


def test_what_was_cached_of_a_prompt_is_what_all_groups_of_its_depth_found() -> None:
    h = Harness(units=400)
    prompt, cached = list(range(50, 60)), list[int]()
    for depth in (1, 2, 1, 2, 4):
        cached.append(end_of(h, h.submit(prompt, depth, sampling=long(1))).cached_tokens)
    assert cached == [0, 0, 8, 8, 0]
    metrics = h.scheduler.metrics
    assert (metrics.prefix_queries, metrics.prefix_hits, metrics.depths) == (50, 16, {1: 2, 2: 2, 4: 1})


# --- audits ----------------------------------------------------------------------------------------------------------------


def test_full_depth_looks_at_an_answer_that_was_told_in_steps_of_all_alone() -> None:
    """Not in one of a payer that is behind the others."""
    h = Harness(units=400, max_batch_tokens=24)
    assert h.scheduler.idle
    one = told(h, 20)
    assert not h.scheduler.idle, "a look is still to come"
    assert h.scheduler._works({"": None}) == []
    plan = h.scheduler.plan()
    assert plan.audit is plan.works[0] and rows(plan.works) == {one.id: (19, 0)}
    assert plan.audit.spans == [(1, 1, 19)] and h.pages.total - h.pages.available == 5 * 4
    commit(h, plan)
    h.scheduler.check_integrity()
    assert h.scheduler.idle and h.pages.available == h.pages.total and h.pages.cached == 0, "for nobody else"
    evidence = h.scheduler.judge.evidence[0.05]
    assert (evidence.answers, evidence.lost) == (1, pytest.approx(0.25))
    assert h.scheduler.take_events() == [], "nobody hears of it"


def test_a_look_has_the_rows_that_are_left_and_a_page_of_them_beside_prompts() -> None:
    h = Harness(units=400, max_batch_tokens=24)
    going = h.submit([60], sampling=long())
    h.step()
    one = told(h, 50)
    prompt = h.submit(list(range(10, 31)), sampling=long(2))
    found = []
    for _ in range(3):
        plan = h.scheduler.plan()
        found.append(rows(plan.works))
        commit(h, plan)
    assert found == [
        {going: (1, 0), prompt: (15, 0), one.id: (8, 0)},
        {going: (1, 0), prompt: (6, 0), one.id: (17, 0)},
        {going: (1, 0), prompt: (1, 0), one.id: (22, 0)},
    ]


def test_a_look_gives_its_units_to_who_waits_for_units_and_not_to_who_waits_for_a_place() -> None:
    for most, enters in ((1, False), (2, True)):
        h = Harness(units=1 + 4 * 6, max_batch_tokens=9, max_batch=most)
        going = h.submit([60], sampling=long(8))
        h.step()
        told(h, 14)
        commit(h, h.scheduler.plan())
        held = 4 * 2
        assert h.pages.available == 4 * 5 - held
        waits = h.submit(list(range(10, 22)), sampling=long(1))  # three pages in each group, and one for who runs
        plan = h.scheduler.plan()
        assert (waits in rows(plan.works)) is enters and going in rows(plan.works)
        assert bool(h.scheduler.judge.holder) is not enters


def test_a_look_gives_its_units_to_who_goes_deeper_before_anybody_is_preempted() -> None:
    h = Harness(units=1 + 20, max_batch_tokens=24)
    request = h.submit(list(range(10, 26)), None, sampling=long(4))
    told(h, 12)
    plan = h.scheduler.plan()
    assert plan.audit is not None and rows(plan.works) == {request: (16, 0), "told": (8, 0)}
    decide = h.runner._decision
    h.runner._decision = lambda work: dataclasses.replace(decide(work), layers=4)  # type: ignore[method-assign]
    commit(h, plan)
    assert h.pages.available == 20 - 4 - 8
    plan = h.scheduler.plan()
    assert rows(plan.works) == {request: (16, 0)} and not h.scheduler.judge.holder
    assert h.scheduler.metrics.preemptions == 0 and not h.scheduler.judge.idle, "it begins anew later"


# --- what a step gave ------------------------------------------------------------------------------------------------------


def test_what_is_drafted_and_said_is_counted_and_what_is_measured_of_it() -> None:
    h = Harness(units=400, max_batch_tokens=40)
    measured, other = (h.submit([60 + i], sampling=long(20 - 8 * i, speculative=3)) for i in range(2))
    h.scheduler._live[measured].tolerance = 0.1
    drafted = stood = 0
    events = []
    while h.scheduler._live:
        plan = h.scheduler.plan()
        outcome = h.runner.run(plan)
        spends = [dataclasses.replace(one, spent=0.5) if work.running.id == measured else one
                  for work, one in zip(plan.samples, outcome.samples, strict=True)]  # fmt: skip
        drafted += sum(one.drafted for one in spends)
        stood += sum(len(one.after) for one in spends)
        events += h.scheduler.commit(plan, dataclasses.replace(outcome, samples=spends))
    metrics = h.scheduler.metrics
    assert (metrics.drafts, metrics.drafts_accepted) == (drafted, stood) and drafted > stood > 0
    assert (metrics.generation_tokens, metrics.measured) == (32, 20)
    mine = [event for event in events if isinstance(event, Token) and event.request == measured]
    assert metrics.spent == end(events, measured).spent == mine[-1].spent and metrics.spent > 0.5
    assert {event.spent for event in events if isinstance(event, Token) and event.request == other} == {None}
    assert end(events, other).spent is None
    # drafts of the first exit's one layer, of an answer of four; an end has its tokens' mean
    assert mine[0].ran == 4 and (mine[-1].ran - 20 * end(events, measured).mean_depth) == pytest.approx(0)


def looked(h: Harness, layers: list[int], look: int | None, **more: Any) -> str:
    """A request whose depths are chosen by hand, the second after `look` tokens."""
    request, chosen = h.submit(list(range(50, 55)), None, sampling=long(**more)), iter(layers)
    h.scheduler._live[request].look = look
    decide = h.runner._decision
    h.runner._decision = lambda work: dataclasses.replace(decide(work), layers=next(chosen))  # type: ignore[method-assign]
    return request


@pytest.mark.parametrize(
    ("first", "second", "depth"), [(2, 4, 4), (1, 4, 4), (1, 2, 2), (2, 2, 2), (1, 1, 1), (2, 1, 2)]
)
def test_what_a_second_look_runs_is_counted_and_it_goes_no_less_deep(first: int, second: int, depth: int) -> None:
    """Three tokens of the first depth. Then group 1 runs over what has no sums of its pages, the deeper depth over what it
    lacks, and what comes of that is the fourth token; the fifth and sixth take the layers of their depth."""
    h = Harness(units=400, max_batch_tokens=40)
    request = looked(h, [first, second], 3, tokens=6)
    events = h.run()
    tokens = [event for event in events if isinstance(event, Token)]
    assert [event.depth for event in tokens] == [first] * 3 + [depth] * 3
    # a layer of group 1; all groups over the first page, which has sums, and all but it over the rest; or over the last row
    anew = 1 + depth + depth - 1 if depth > first else 1 + depth - 1
    assert [event.ran for event in tokens] == [first * k for k in (1, 2, 3)] + [
        3 * first + anew + depth * k for k in range(3)
    ]
    finished = end(events, request)
    assert (finished.first_depth, finished.depth) == (first, depth)
    assert finished.mean_depth == pytest.approx(tokens[-1].ran / 6)
    metrics = h.scheduler.metrics
    assert (metrics.looks, metrics.deeper, metrics.depths) == (1, int(depth > first), {first: 1})


def test_who_runs_at_full_depth_is_not_looked_at_again() -> None:
    h = Harness(units=400, max_batch_tokens=40)
    request = looked(h, [4, 1], 3, tokens=6)
    finished = end(h.run(), request)
    assert (finished.depth, finished.first_depth, finished.mean_depth) == (4, 4, 4.0)
    assert h.scheduler.metrics.looks == 0


def test_a_token_that_another_engine_gave_is_taken_in_and_neither_told_nor_counted() -> None:
    h = Harness(units=400)
    prompt, whole = [60], [60]
    while len(whole) < 6:
        whole.append(next_token(whole))
    request = h.submit(prompt, sampling=long(5), answer=whole[1:3])
    running = h.scheduler._live[request]
    plan = h.scheduler.plan()
    outcome = Outcome([Sampled(7, spent=3.0, nll=9.0)])  # what would be drawn here is another token
    h.runner.run(plan)
    assert h.scheduler.commit(plan, outcome) == []
    assert (running.tokens, running.told, running.spent, running.drawn, running.ran) == (whole[:3], None, 0.0, 0, 0)
    metrics = h.scheduler.metrics
    assert (metrics.generation_tokens, metrics.spent) == (0, 0.0) and running.first_token_at is not None
    events = h.run()
    assert said(events, request) == whole[3:] and end(events, request).completion_tokens == 5
    assert (metrics.generation_tokens, running.drawn, running.ran) == (3, 3, 12)


def test_times_between_tokens_are_those_of_one_answer() -> None:
    h = Harness(units=400)
    one, other = (h.submit([60 + i], sampling=long(3)) for i in range(2))
    for at in (1.0, 3.0, 7.0):
        plan = h.scheduler.plan()
        outcome = h.runner.run(plan)
        h.now = at
        events = h.scheduler.commit(plan, outcome)
    observed = h.scheduler.metrics.inter_token_latency_seconds
    assert (observed.count, observed.sum) == (4, 2 * (2.0 + 4.0))
    each = h.scheduler.metrics.request_time_per_output_token_seconds
    assert (each.count, each.sum) == (2, 2 * (7.0 - 1.0) / 2), "of three tokens two come after the first"
    assert {event.request for event in events if isinstance(event, Finished)} == {one, other}
    assert all((event.first_token_seconds, event.total_seconds) == (1.0, 7.0)
               for event in events if isinstance(event, Finished))  # fmt: skip
