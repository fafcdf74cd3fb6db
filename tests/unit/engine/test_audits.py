"""Sampled audits in an engine: what full depth finds is what whole forward passes say, units come back whatever happens, and
nobody else's answer changes. In float64.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal import Engine, Request, Sampling
from shoal.config import GROUPS
from shoal.engine import audits, compared
from shoal.engine.audits import Audits, Evidence, bounded, spans
from shoal.engine.events import Event, Finished, Guide, Token
from shoal.engine.front import AsyncEngine
from shoal.engine.metrics import sample
from shoal.engine.pages import Pages
from shoal.engine.plan import Outcome, Plan, Sampled, Work
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import EngineDeadError
from shoal.inputs import media
from shoal.model.cost import head_flops, layer_flops
from shoal.model.cpu import fused
from shoal.model.router import TOLERANCES
from tests.unit.engine.lively import lively, with_router
from tests.unit.engine.test_oracle import picture
from tests.unit.engine.test_second_look import model, to

LIVELY = lively()
EXITS = LIVELY.config.exits
LONG = [20 + (7 * i) % 200 for i in range(37)]


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is looked at, whatever that costs."""
    monkeypatch.setattr(audits, "SHARE", 2.0)
    monkeypatch.setattr(audits, "COST", 1e9)
    monkeypatch.setattr(audits, "WAITING", 1000)


def ask(prompt: Any, tokens: int = 9, tolerance: float | None = 0.05, depth: str = "auto", **more: Any) -> Request:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "speculative": 0, "ignore_eos": True}
    return Request(prompt, Sampling(**{**given, **more}), depth=depth, quality_tolerance=tolerance)


def run(engine: Engine, requests: list[Request], after: Callable[[], None] = lambda: None) -> list[list[Event]]:
    """The events of each request, which are all events; `after` each step. Nothing is held at the end."""
    found: dict[str, list[Event]] = {engine.submit(request): [] for request in requests}
    while not engine.idle:
        for event in engine.step():
            found[event.request].append(event)
        engine.scheduler.check_integrity()
        after()
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    return list(found.values())


def learned(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each answer that is looked at has lost, as it becomes known."""
    found: list[float] = []
    learn = Evidence.learn

    def hear(self: Evidence, lost: float, allowed: float) -> None:
        found.append(lost)
        learn(self, lost, allowed)

    monkeypatch.setattr(Evidence, "learn", hear)
    return found


def lost(request: Request, events: list[Event]) -> float:
    """What the answer `events` lost, by one pass over its words."""
    said = [one for one in events if isinstance(one, Token)]
    end = events[-1]
    assert isinstance(end, Finished)
    prompt = LIVELY.encode(request.prompt)
    ids = torch.tensor([*prompt.ids, *(one.token for one in said)])
    patches = None if prompt.patches is None else torch.from_numpy(prompt.patches)
    grid = None if patches is None else torch.from_numpy(media.grid(prompt.ids))
    hidden = LIVELY.net(ids[None], patches, grid, exits=EXITS)
    ended = end.reason == "stop"
    depths = [one.depth for one in said] + [end.depth] * ended
    total = 0.0
    for place, depth in enumerate(depths, start=len(prompt.ids) - 1):
        p, q = (LIVELY.net.head(hidden[e][0, place], e).double().log_softmax(-1) for e in (EXITS[-1], depth))
        total += float((p.exp() * (p - q)).sum())
    return total / len(depths)


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("limits", [{}, {"max_batch": 3, "max_batch_tokens": 20}, {"units": 60}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_what_it_finds_is_what_a_whole_pass_says(
    seed: int, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one look and of two, of images, of ends, of one token, with pages in the prefix cache or not, in chunks, preempted."""
    draws, found = random.Random(seed), learned(monkeypatch)
    after = draws.choice([1, 4])
    routed = model(lambda n: EXITS[n % 3], lambda n: EXITS[(n // 2) % 3], after)
    engine = Engine(routed, **{"units": 400, "speculative": 2, "speculative_max_batch": 8, **limits})
    prompts: list[Any] = [LONG[: draws.randint(1, 37)] for _ in range(8)] + [picture(0), picture(200), "a", "ab c"]
    requests = [
        ask(one, draws.choice([1, 2, 9, 12]), 0.05, temperature=draws.choice([0, 1.3]), seed=seed,
            ignore_eos=draws.random() < 0.5, speculative=draws.choice([0, 2]) if draws.random() < 0.3 else 0)
        for one in prompts
    ]  # fmt: skip
    count = 0

    def preempt() -> None:
        nonlocal count
        count += 1
        if seed % 2 and count < 60 and count % 5 == 0 and engine.scheduler.running:
            engine.scheduler._preempt(draws.choice(engine.scheduler.running))

    answers = run(engine, requests, preempt)
    stats = engine.stats()
    wanted = sorted(
        lost(request, events)
        for request, events in zip(requests, answers, strict=True)
        if isinstance(events[-1], Finished) and events[-1].spent is None  # else its drafts are verified
    )
    assert len(found) + stats["audits_dropped_total"] >= len(wanted) and stats["audits_dropped_total"] <= 3
    if not stats["audits_dropped_total"]:
        assert sorted(found) == pytest.approx(wanted, abs=1e-9)
    for one in found:
        assert min(abs(one - other) for other in wanted) < 1e-9
    assert any(one > 0.01 for one in found) and any(one == 0 for one in found)
    assert stats['audited_answers_total{tolerance="0.05"}'] == len(found)


@pytest.mark.usefixtures("every")
def test_int8_keys_and_values_and_pages_of_all_groups_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that full depth has run for somebody else are not run again, but those that gave the answer are."""
    found = learned(monkeypatch)
    monkeypatch.setattr(fused, "usable", lambda x: False)  # else loops are compiled for it alone
    engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=400, kv_cache_dtype="int8")
    run(engine, [ask(LONG, 4, None, "full")])
    before = engine.stats()["audit_rows_total"]
    (events,) = run(engine, [request := ask(LONG, 4)])
    page = engine.config.page
    rows = engine.stats()["audit_rows_total"] - before
    assert rows == len(LONG) + 3 - len(LONG) // page * page < len(LONG)
    assert found == pytest.approx([lost(request, events)], rel=0.2), "int8 is near"


# --- beside others ---------------------------------------------------------------------------------------------------------


def _tokens(answers: list[list[Event]]) -> list[list[tuple[int, int]]]:
    return [[(one.token, one.depth) for one in events if isinstance(one, Token)] for events in answers]


@pytest.mark.usefixtures("every")
def test_who_has_no_tolerance_is_answered_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found, and whatever is looked at beside it."""
    routed = with_router(LIVELY)
    assert routed.router is not None
    routed.router.calibration.thresholds = [(each, 5.0) for each in TOLERANCES]  # the first exit will do
    draws = random.Random(1)
    old = [
        ask([draws.randint(20, 200) for _ in range(draws.randint(1, 30))], 9, None, depth, temperature=temp, seed=3)
        for depth in ("auto", "shallow", "full")
        for temp in (0, 1.0)
        for _ in range(3)
    ]
    wanted = _tokens(run(Engine(routed, units=400), old))
    engine = Engine(routed, units=400)
    engine.scheduler.judge.evidence[0.05].shift = 9.0
    with_some = [ask([draws.randint(20, 200) for _ in range(20)], 5, 0.1) for _ in range(12)]
    mixed = [request for pair in zip(with_some, old, strict=False) for request in pair] + old[12:]
    found = run(engine, mixed)
    of = dict(zip([request.id for request in mixed], _tokens(found), strict=True))
    assert [of[request.id] for request in old] == wanted
    assert engine.stats()["audit_rows_total"] > 0
    depths = {depth for answer in _tokens(run(engine, [ask(LONG[:n], 3) for n in range(1, 30)])) for _, depth in answer}
    assert depths == {EXITS[-1]}, "a correction that is large leaves full depth alone"


@pytest.mark.drill
def test_a_few_are_chosen_and_cost_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a seed; and though all should be chosen, by their cost."""
    rows: list[tuple[float, float]] = []
    took = Audits.took

    def count(self: Audits, plan: Plan, outcome: Outcome, of: int) -> None:
        mine = 0 if plan.audit is None else plan.audit.count * GROUPS
        rows.append((mine, of - mine))
        took(self, plan, outcome, of)

    monkeypatch.setattr(Audits, "took", count)
    requests = [ask([20 + (i * j) % 200 for j in range(1 + i % 30)], 6) for i in range(300)]
    numbers = []
    for share, cost in ((1 / 32, 1e9), (1 / 32, 1e9), (2.0, 0.02)):
        monkeypatch.setattr(audits, "SHARE", share)
        monkeypatch.setattr(audits, "COST", cost)
        rows.clear()
        engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=400, max_batch=8)
        run(engine, requests)
        stats = engine.stats()
        numbers.append((stats['audited_answers_total{tolerance="0.05"}'], stats["audit_rows_total"]))
    assert numbers[0] == numbers[1] and 2 <= numbers[0][0] <= 20
    audited, others = (sum(each) for each in zip(*rows, strict=True))
    longest = (30 + 5) * GROUPS
    assert 0 < audited <= 0.02 * others + 8 * longest, "what it owes when several are chosen at once is one batch's"
    assert numbers[2][0] < 60


@pytest.mark.usefixtures("every")
def test_nobody_loses_units_or_a_place_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pool that is full all the time, and beside prompts that never end."""
    found = []
    for share in (0.0, 2.0):
        monkeypatch.setattr(audits, "SHARE", share)
        engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=41, max_batch=6, max_batch_tokens=20)
        requests = [ask([20 + (i * j) % 200 for j in range(10 + i % 20)], 8) for i in range(40)]
        answers = _tokens(run(engine, requests))
        stats = engine.stats()
        found.append((answers, stats["num_preemptions_total"]))
    assert found[0][0] == found[1][0] and found[0][1] <= found[1][1] <= found[0][1] + 2
    looked = stats['audited_answers_total{tolerance="0.05"}']
    assert looked + stats["audits_dropped_total"] == 40 and looked > 0


@pytest.mark.usefixtures("every")
def test_it_goes_on_beside_prompts_that_never_end() -> None:
    engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=2000, max_batch=64, max_batch_tokens=80)
    engine.submit(ask(LONG, 2))
    for step in range(400):
        if len(engine.scheduler.waiting) < 4:
            engine.submit(ask([20 + (step * j) % 200 for j in range(60)], 1, None, "full"))
        engine.step()
        if engine.stats()['audited_answers_total{tolerance="0.05"}']:
            return
    pytest.fail("never looked at")


@pytest.mark.usefixtures("every")
def test_who_leaves_or_fails_is_not_looked_at_and_a_step_that_fails_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(
        model(to(EXITS[0]), to(EXITS[0]), 99), units=400, max_batch=1, max_batch_tokens=1 + LIVELY.config.page
    )
    name = engine.submit(ask(LONG, 9))
    engine.step()
    engine.cancel(name)
    engine.step()
    assert engine.idle and not engine.stats()["audit_rows_total"]
    one = ask(LONG, 3)
    engine.submit(one)
    for _ in range(50):
        if not engine.scheduler.judge.holder:
            engine.step()
    assert engine.scheduler.judge.holder and not engine.scheduler.live and not engine.idle
    engine.submit(dataclasses.replace(one))  # an id that has ended may come again
    run_step = engine.runner.run

    def fails(plan: Plan) -> Outcome:
        if plan.audit is not None:
            monkeypatch.setattr(engine.runner, "run", run_step)
            raise RuntimeError("no memory")
        return run_step(plan)

    monkeypatch.setattr(engine.runner, "run", fails)
    ends = []
    while not engine.idle:
        ends += [event for event in engine.step() if isinstance(event, Finished)]
        engine.scheduler.check_integrity()
    assert [(end.request, end.reason) for end in ends] == [(one.id, "length")], "it begins anew"
    assert engine.stats()["kv_cache_usage_perc"] == 0 and engine.stats()["audits_dropped_total"] == 1


@pytest.mark.usefixtures("every")
def test_nobody_ends_for_a_look_that_fails_and_after_a_few_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=400, max_batch=4)
    run_step, failures = engine.runner.run, 0

    def fails(plan: Plan) -> Outcome:
        nonlocal failures
        if plan.audit is not None:
            failures += 1
            raise torch.OutOfMemoryError("no memory")
        return run_step(plan)

    wanted = _tokens(run(engine, asked := [ask(LONG[n:], 3 + 4 * n, None, "full") for n in range(8)]))
    engine.forget_prompts()
    monkeypatch.setattr(engine.runner, "run", fails)
    routed = [ask(LONG[:n], 3) for n in range(1, 20)]
    found = run(engine, [*routed, *(again := [dataclasses.replace(one) for one in asked])])
    assert _tokens(found)[len(routed) :] == wanted and len(again) == len(wanted)
    assert {events[-1].reason for events in found if isinstance(events[-1], Finished)} == {"length"}
    assert failures == audits.TRIES and engine.stats()["audits_dropped_total"] >= audits.TRIES
    run(engine, [ask(LONG, 3)])
    assert failures == audits.TRIES


def busy(engine: Engine, steps: int, prompt: Callable[[int], list[int]], tokens: int) -> None:
    """So many steps in which there is always somebody who waits."""
    count = 0
    for _ in range(steps):
        while len(engine.scheduler.waiting) < 2:
            count += 1
            engine.submit(ask(prompt(count), tokens))
        engine.step()


@pytest.mark.usefixtures("every")
@pytest.mark.parametrize("seed", range(-1, 6))
def test_full_depth_is_learned_of_no_sooner_than_what_is_looked_at(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where units lack for all that is to be looked at, those at full depth would say that nothing is lost, whatever steps are
    measured to take."""
    monkeypatch.setattr(audits, "WAITING", 8)
    found, draws, now = learned(monkeypatch), random.Random(seed), 0.0

    def clock() -> float:
        nonlocal now
        now += draws.expovariate(1.0) if seed >= 0 else 0.0
        return now

    routed = model(lambda n: EXITS[0] if n % 2 else EXITS[-1], to(EXITS[0]), 99)
    engine = Engine(routed, units=41, max_batch=6, max_batch_tokens=20, clock=clock)
    busy(engine, 150, lambda i: [20 + (i * j) % 200 for j in range(20 + i % 10)], 8)
    assert engine.stats()["audits_dropped_total"] > 10
    assert sum(one > 0 for one in found) >= len(found) / 4
    before = len(found)
    for running in list(engine.scheduler.live):
        engine.cancel(running)
    while not engine.idle:
        engine.step()
    last = found[before:]
    assert 0.0 in last and max(last) > 0


@pytest.mark.usefixtures("every")
def test_a_long_answer_that_finds_no_units_makes_room_for_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "WAITING", 4)
    engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=81, max_batch=3, max_batch_tokens=40)
    engine.submit(ask([20 + j % 200 for j in range(150)], 8))
    busy(engine, 150, lambda i: [20 + (i * j) % 200 for j in range(20)], 4)
    assert engine.stats()['audited_answers_total{tolerance="0.05"}'] > 3


@pytest.mark.usefixtures("every")
def test_no_number_says_nothing_and_guided_answers_and_full_depth_by_name_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=400)
    guided = ask(LONG, 9, ignore_eos=False, guided=Guide("choice", ("yes", "no")))
    run(engine, [guided, ask(LONG, 3, None), ask(LONG, 3, 0.05, "full"), ask(LONG, 3, 0.005), ask(LONG, 3, 0.0)])
    assert not engine.stats()["audit_rows_total"] and engine.stats()["audits_dropped_total"] == 0
    monkeypatch.setattr(compared, "divergences", lambda full, exits: [() for _ in full])
    run(engine, [ask(LONG, 3)])
    stats = engine.stats()
    assert (stats['audited_answers_total{tolerance="0.05"}'], stats["audits_dropped_total"]) == (0, 1)
    assert stats["audit_rows_total"] > 0


@pytest.mark.usefixtures("every")
def test_a_drain_does_not_wait_for_it_and_who_is_idle_ends_it() -> None:
    async def serve() -> None:
        engine = Engine(model(to(EXITS[0]), to(EXITS[0]), 99), units=400)
        front = AsyncEngine(engine)
        try:
            assert [event async for event in front.generate(ask(LONG, 3))][-1].completion_tokens == 3  # type: ignore[union-attr]
            while not (await front.stats())['audited_answers_total{tolerance="0.05"}']:
                await asyncio.sleep(0.001)
            assert (await front.stats())["kv_cache_usage_perc"] == 0
            [event async for event in front.generate(ask(LONG, 3))]
            assert await front.drain(5.0)
            with pytest.raises(EngineDeadError):
                [event async for event in front.generate(ask(LONG, 3))]
        finally:
            await front.close()

    asyncio.run(serve())


def test_tolerances_and_engines_are_kept_apart() -> None:
    assert [bounded(each) for each in (None, 0.0, 0.009, 0.01, 0.06, 7)] == [None, None, None, 0.01, 0.05, 1.0]
    one, two = (Engine(LIVELY, units=40).scheduler.judge for _ in range(2))
    for _ in range(50):
        one.evidence[0.05].learn(0.5, 0.06)
    assert one.shift(0.06) > 0 and one.shift(0.074) > 0
    assert one.shift(0.075) == one.shift(0.04) == one.shift(None) == one.shift(0.0) == two.shift(0.06) == 0


# --- by hand: no model runs ------------------------------------------------------------------------------------------------

PAGE = LIVELY.config.page


def answer(count: int, layers: int = 1, prompt: int = 5, tolerance: float | None = 0.05, **more: Any) -> Running:
    """An answer of one layer, of `count` tokens with its prompt, that was told."""
    request = Request([50] * prompt, Sampling(max_tokens=count), quality_tolerance=tolerance)
    return Running(
        request, list(range(50, 50 + count)), prompt_len=prompt, page=PAGE, text=TextStream(LIVELY.tokenizer, ()), seed=0,
        order=(0, 0, 0), arrival=0.0, layers=layers, **{"drawn": count - prompt, **more},
    )  # fmt: skip


def judging(units: int = 400, *waiting: Running) -> Audits:
    judge = Audits(LIVELY.config, Pages(1 + units))
    for running in waiting:
        judge.told(running)
    return judge


def took(judge: Audits, work: Work | None, lost: list[float], samples: int = 0, rows: int | None = None) -> None:
    """A step with `work` of an audit, or none, and so many `rows` of groups."""
    works = [] if work is None else [work]
    rows = sum(each.count * GROUPS for each in works) if rows is None else rows
    for each in works:
        each.running.holding.advance(judge._pages, each.end, 0, GROUPS)
    judge.took(Plan(works), Outcome([Sampled(0)] * samples, lost=lost), rows)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"layers": 1}, [(1, 4, 11)]),
        ({"layers": 4}, []),  # full depth from its first token on
        ({"layers": 2, "least": 1, "looked": 3}, [(1, 4, 7), (2, 7, 11)]),
        ({"layers": 4, "least": 1, "looked": 3}, [(1, 4, 7)]),
        ({"layers": 2, "least": 2, "looked": 3}, [(2, 4, 7), (2, 7, 11)]),
        ({"layers": 2, "least": 1, "looked": 7}, [(1, 4, 11)]),  # nothing came after the look
        ({"layers": 1, "drawn": 0}, []),
        ({"layers": 1, "drawn": 8}, [(1, 4, 12)]),  # the token that ended it
    ],
)
def test_rows_that_are_looked_at_are_those_that_an_early_exit_gave(
    told: dict[str, int], found: list[tuple[int, int, int]]
) -> None:
    """The last of the prompt gives the first token: of five row 4."""
    assert spans(answer(12, **told), 4) == found


@pytest.mark.parametrize("room", [6, 3, 99])
def test_a_look_runs_over_prompt_and_answer_in_the_rows_that_it_is_given_and_each_is_seen_once(room: int) -> None:
    """Of twenty tokens the rows from 4 on gave the answer, five of them by the first exit; the last token has no row."""
    one = answer(20, layers=2, least=1, looked=5)
    judge = judging(400, one)
    assert (judge.idle, judge.holder, judge.work(0, 0)) == (False, [], None)
    seen, at = list[tuple[int, int]](), 0
    while (work := judge.work(room, 0)) is not None:
        assert judge.holder == [one] and (work.running, work.first, work.last, work.audit) == (one, 0, GROUPS, True)
        assert (work.start, work.end) == (at, min(at + room, 19)) and one.holding.offered == [audits.NEVER] * GROUPS
        pages = -(-work.end // PAGE)
        assert one.holding.owned == [pages] * GROUPS and judge._pages.available == 400 - pages * GROUPS
        assert all(first < last for _, first, last in work.spans)
        rows = [(layers, row) for layers, first, last in work.spans for row in range(first, last)]
        seen, at = seen + rows, work.end
        took(judge, work, [0.5] * len(rows))
    assert seen == [(1 if row < 9 else 2, row) for row in range(4, 19)] and one.groups == GROUPS
    assert judge.idle and judge.holder == [] and judge.rows == 19 and judge.dropped == 0
    assert (judge._pages.available, judge._pages.cached) == (400, 0), "its pages are for nobody else"
    of = judge.evidence[0.05]
    assert (of.answers, of.allowed) == (1, 0.05) and of.lost == pytest.approx(0.5)


def test_those_that_wait_are_few_and_the_first_makes_room_unless_it_is_looked_at() -> None:
    first, *others, last = (answer(9) for _ in range(9))
    judge = judging(400, first, *others)
    assert (judge.dropped, len(judge._waiting)) == (0, 8)
    judge.told(last)
    assert (judge.dropped, [*judge._waiting]) == (1, [*others, last]) and judge._likewise == 32
    assert judge.work(1, 0) is not None
    judge.told(first)
    assert (judge.dropped, [*judge._waiting]) == (2, [*others, last]), "what is begun is not given up"
    small = judging(3, answer(PAGE))
    assert small.idle and small.dropped == 1, "it would never have its four units"
    assert not judging(4, answer(PAGE)).idle and judging(4, answer(PAGE + 1)).dropped == 1


def test_looks_pay_for_their_rows_and_heads_by_a_hundredth_of_all_others() -> None:
    config, judge = LIVELY.config, judging()
    head = head_flops(config) / (layer_flops(config, config.train_length) / GROUPS)
    took(judge, None, [], samples=3, rows=500)
    assert judge._owed == 0.0, "nothing is saved up"
    judge._owed = 1000.0
    took(judge, None, [], samples=3, rows=500)
    owed = 1000.0 - 0.01 * (500 + 3 * head)
    assert judge._owed == pytest.approx(owed)
    judge.told(answer(20))
    work = judge.work(9, 0)
    assert work is not None and work.count == 9
    took(judge, work, [0.5] * 5, samples=2, rows=9 * GROUPS + 100)
    assert judge._owed == pytest.approx(owed + 9 * GROUPS + 2 * 5 * head - 0.01 * (100 + 2 * head))


def test_answers_of_full_depth_are_learned_of_as_the_look_before_them() -> None:
    """None of them holds up one that is to be looked at."""
    many = judging(400, *(answer(9, layers=4) for _ in range(20)))
    assert (len(many._waiting), many.evidence[0.05].answers, many.dropped) == (1, 19, 0)
    judge, of = judging(), answer(9, layers=4)
    evidence = judge.evidence[0.05]
    judge.told(of)
    assert not judge.idle and judge.work(9, 0) is None and judge.idle
    assert (evidence.answers, evidence.lost, judge.dropped) == (1, 0.0, 0)
    judge._likewise = 2
    for dropped in (1, 2, 2):
        judge.told(of)
        assert judge.aside(99, 0) == 0 and judge.dropped == dropped
    assert (evidence.answers, judge._likewise) == (2, 0)
    judge.told(of)
    judge.told(one := answer(9, tolerance=0.3))
    work = judge.work(99, 0)
    assert work is not None and work.running is one and evidence.answers == 3
    judge._likewise = 5
    took(judge, work, [0.25] * 4)
    assert judge._likewise == 0, "a look came to its end"
    told = judge.samples()
    assert {str(key): value for key, value in told.items()} == {
        "audit_rows_total": 8, "audits_dropped_total": 2,
        'audited_answers_total{tolerance="0.05"}': 3, 'audited_lost_nats_total{tolerance="0.05"}': 0.0,
        'audited_allowed_nats_total{tolerance="0.05"}': pytest.approx(0.15),
        'router_correction_nats{tolerance="0.05"}': 0.0,
        'audited_answers_total{tolerance="0.3"}': 1, 'audited_lost_nats_total{tolerance="0.3"}': 0.25,
        'audited_allowed_nats_total{tolerance="0.3"}': 0.3, 'router_correction_nats{tolerance="0.3"}': 0.0,
    }  # fmt: skip
    evidence.shift = 0.5
    assert judge.samples()[sample("router_correction_nats", tolerance=0.05)] == 0.5
