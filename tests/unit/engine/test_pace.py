"""The measured pace: what steps cost, when shallow-only steps pay and what they may take, and what the queue is told."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shoal.engine.door import Door
from shoal.engine.events import Sampling
from shoal.engine.holding import Holding
from shoal.engine.metrics import Metrics
from shoal.engine.pace import WARM_UP, Pace
from shoal.engine.pages import Pages
from shoal.errors import DeadlineError, QueueFullError
from tests.unit.engine.test_scheduler import Harness, answer, end, said


def learned(fixed: float, each: float) -> Pace:
    pace, rng = Pace(), random.Random(0)
    for _ in range(100):
        groups, rows = rng.randint(1, 4), rng.randint(1, 60)
        pace.step(groups, rows, fixed * groups + each * rows)
    return pace


def costly(**limits: int) -> Harness:
    return Harness(units=400, cost=(1.0, 0.01), **({"max_batch": 8, "max_batch_tokens": 40} | limits))


def long(tokens: int = 60) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True)


def test_nothing_is_said_before_enough_was_measured() -> None:
    pace = Pace()
    for _ in range(WARM_UP - 1):
        pace.step(4, 8, 1.0)
    assert pace.seconds(4, 8) is None and pace.wait(3) is None
    pace.step(4, 8, 1.0)
    assert pace.seconds(4, 8) == pytest.approx(1.0)


def test_shallow_only_steps_are_worth_it_for_enough_requests_that_are_shallow_enough() -> None:
    pace = learned(1.0, 0.0)
    assert pace.alone([1, 1], [1, 1, 4, 4])
    assert not pace.alone([1], [1, 4, 4, 4, 4])
    assert not pace.alone([2, 2], [2, 2, 4, 4])
    assert pace.alone([2] * 5, [2] * 5 + [4])
    # a step is as deep as the deepest of it: (4 + 2) (3 - 2 / 2) is no less than 4 * 3, while (4 + 1) (3 - 2 / 2) would be
    assert pace.alone([1, 1], [1, 1, 4]) and not pace.alone([1, 2], [1, 2, 4])


def test_a_long_prefill_lets_no_deep_request_wait_for_more_than_one_step() -> None:
    h = costly(max_batch_tokens=300)
    h.submit([70], 4, sampling=long(80))
    for i in range(4):
        h.submit([50 + i], 1, sampling=long(400))
    for _ in range(30):
        h.step()
    h.submit(list(range(300)), 4, sampling=long(1), priority=-1)  # a step of 16 seconds
    for _ in range(12):
        h.step()
    spent = h.runner.spent[next(i for i, (_, seconds) in enumerate(h.runner.spent) if seconds > 12) + 1 :]
    run = 0.0
    for only, seconds in spent:
        run = run + seconds if only else 0.0
        assert run <= max(seconds for only, seconds in spent if not only)
    assert any(only for only, _ in spent)


def test_a_shallow_only_step_without_units_is_a_full_step() -> None:
    """The one shallow request is last in the order, so a lack of units preempts it; the deep ones go on in the same step."""
    h = costly(max_batch_tokens=12)
    h.pages.allocate(h.pages.available - 4 * 4)
    deep = h.submit(list(range(50, 54)), 4, sampling=long(4))
    h.step()
    h.submit([60], 1, sampling=long(40), priority=1)
    h.scheduler.pace.alone = lambda *_: True  # type: ignore[method-assign]
    events = []
    while not h.scheduler.idle:
        plan = h.scheduler.plan()
        assert plan.works, "a step was given away"
        events += h.scheduler.commit(plan, h.runner.run(plan))
    assert len(said(events, deep)) == 3  # and the first before


def test_answers_are_the_same_with_shallow_only_steps() -> None:
    h = costly(max_queue=20)
    asked = {h.submit([50 + i], (1, 2, 4, 4)[i % 4], sampling=Sampling(max_tokens=30)): [50 + i] for i in range(16)}
    events = h.run()
    for request, prompt in asked.items():
        assert said(events, request) == answer(prompt, 30)
    assert any(only for only, _ in h.runner.spent)


def test_a_refused_request_is_told_when_there_should_be_room() -> None:
    h = costly(max_batch=1, max_queue=2)
    for i in range(2 * WARM_UP):
        while h.scheduler.full:
            h.step()
        h.submit([50 + i], sampling=long(5))
    while not h.scheduler.full:
        h.submit([99], sampling=long(5))
    told = []
    for _ in range(3):
        with pytest.raises(QueueFullError) as caught:
            h.submit([98])
        told.append(caught.value.retry_after)
    one = 5 * (4 + 4 * 0.01)  # a request's five steps
    assert told == pytest.approx([one, 2 * one, 3 * one], rel=0.3)  # the n-th for the n-th place
    assert h.scheduler.metrics.refused == 3


def test_who_was_turned_away_comes_back_for_the_places_that_are_free_by_then() -> None:
    pace, metrics = Pace(), Metrics()
    pace.wait = float  # type: ignore[assignment, method-assign]  # a second a place
    door = Door(Pages(2), pace, metrics)
    assert [door.full(5).retry_after for _ in range(3)] == [1, 2, 3]
    door.passed(0.0, 1)
    assert door.full(5).retry_after == 3
    for _ in range(9):
        door.passed(0.0, 0)
    assert door.full(5).retry_after == 1 and metrics.refused == 5


def test_a_deadline_that_the_queue_puts_out_of_reach_is_refused_at_once() -> None:
    h = costly(max_batch=1, max_queue=8)
    for i in range(2 * WARM_UP):
        while h.scheduler.full:
            h.step()
        h.submit([50 + i], sampling=long(5))
    while h.scheduler.full:
        h.step()
    ahead = len(h.scheduler.waiting)
    assert ahead > 3
    with pytest.raises(DeadlineError, match="out of reach"):
        h.submit([99], deadline=ahead * 5.0)
    urgent = h.submit([99], deadline=ahead * 5.0, priority=-1)  # ahead of them all, so within reach
    events = h.run()
    assert end(events, urgent).reason in ("stop", "length")


def test_an_idle_engine_refuses_no_deadline_that_a_prompt_can_meet() -> None:
    h = costly()
    for i in range(WARM_UP + 1):
        h.submit([50 + i], sampling=Sampling(max_tokens=3))
        h.run()
    prompt = list(range(50, 130))  # two steps of 40 rows, 4 groups each: over 8 seconds
    with pytest.raises(DeadlineError, match="out of reach"):
        h.submit(prompt, deadline=4.0)
    request = h.submit(prompt, deadline=20.0, sampling=long(1))
    assert end(h.run(), request).reason == "length"


def test_where_steps_get_fewer_rows_a_deadline_counts_the_steps_that_a_prompt_takes_then() -> None:
    """As once a GPU's kernels are given up (`Engine._fit_rows`): what came too late was let in, computed, and ended late."""
    h = costly()
    for i in range(WARM_UP + 1):
        h.submit([50 + i], sampling=Sampling(max_tokens=3))
        h.run()
    request = h.submit(list(range(50, 130)), deadline=15.0, sampling=long(1))  # two steps, 11 seconds
    assert end(h.run(), request).reason == "length"
    h.scheduler.max_batch_tokens = 16
    with pytest.raises(DeadlineError, match=r"allowed: 2\d\.\d+ s or more"):  # five steps
        h.submit(list(range(150, 230)), deadline=15.0, sampling=long(1))


@pytest.mark.parametrize(("groups", "cached", "soonest"), [(2, 0, 13.7), (None, 0, 9.85), (2, 1, 11.54), (2, 10, 8.1)])
def test_an_answer_can_begin_after_those_before_it_and_the_steps_of_its_prompt(
    groups: int | None, cached: int, soonest: float
) -> None:
    """Three wait before it, two seconds each. 85 tokens are three steps of 40 rows, 85 less `cached` pages of 8 in as many as
    they fill; while its depth is not known they run one group. A second costs a group, a hundredth a row."""
    pace, metrics, pages = Pace(), Metrics(), Pages(50)
    door = Door(pages, pace, metrics)
    holding = Holding.nothing([*range(50, 135)], None, 8, 100)
    holding.extend_keys(pages)
    for key in holding.keys[:cached]:
        (unit,) = pages.allocate(1)
        pages.register(0, key, unit)

    def asked(deadline: float | None) -> Any:
        request = SimpleNamespace(deadline=deadline)
        return SimpleNamespace(request=request, holding=holding, tokens=holding.tokens, groups=groups)

    door.must_be_in_time(asked(1e-9), 3, 40)  # nothing was measured yet
    pace.wait = lambda ahead: 2.0 * ahead  # type: ignore[method-assign]
    pace.seconds = lambda groups, rows: groups + 0.01 * rows  # type: ignore[method-assign]
    door.must_be_in_time(asked(None), 3, 40)
    door.must_be_in_time(asked(soonest + 1e-9), 3, 40)
    assert metrics.refused == 0
    for refused in (1, 2):
        with pytest.raises(DeadlineError, match=f"{soonest:.2f} s or more"):
            door.must_be_in_time(asked(soonest - 1e-9), 3, 40)
        assert metrics.refused == refused


def test_costs_are_least_squares_in_which_a_step_weighs_two_hundredths_less_than_the_next() -> None:
    """Of steps that scatter, so that no line goes through all of them."""
    pace, draws, steps = Pace(), random.Random(3), []
    for _ in range(80):
        groups, rows = draws.randint(1, 4), draws.randint(1, 60)
        steps.append((groups, rows, (0.4 * groups + 0.03 * rows) * draws.uniform(0.8, 1.2)))
        pace.step(*steps[-1])
    weights = np.sqrt(0.98 ** np.arange(79, -1, -1))
    table = np.array(steps)
    (fixed, each), *_ = np.linalg.lstsq(table[:, :2] * weights[:, None], table[:, 2] * weights)
    assert pace.seconds(1, 0) == pytest.approx(fixed) and pace.seconds(0, 1) == pytest.approx(each)


def test_a_shallow_only_step_must_lower_the_mean_time_of_a_token() -> None:
    """A full step takes 4, one of the shallow 1: two in five gain as much as all lose, in four they gain more."""
    assert learned(1.0, 0.0).alone([1, 1], [1, 1, 4, 4])
    assert not learned(1.0, 0.0).alone([1, 1], [1, 1, 4, 4, 4])


def test_shallow_only_steps_take_a_quarter_of_what_full_ones_took_and_one_full_step_at_most() -> None:
    """A full step takes 5 and one of the shallow 1.2: four of them, then one for each full step."""
    pace, shallow, everybody = learned(1.0, 0.1), [1, 1], [1, 1, 4, 4]
    for _ in range(4):
        assert pace.alone(shallow, everybody)
        pace.step(1, 2, 1.2, shallow=True)
    for _ in range(3):
        assert not pace.alone(shallow, everybody)
        pace.step(4, 10, 5.0)
        assert pace.alone(shallow, everybody)
        pace.step(1, 2, 1.2, shallow=True)


def test_a_place_in_the_queue_costs_the_mean_time_between_admissions_while_somebody_waits() -> None:
    pace, now = Pace(), 0.0
    pace.enters(50.0, 0)  # nobody waited
    for number in range(WARM_UP):
        assert pace.wait(3) is None
        if number % 4 == 0:
            now += 1000.0  # nobody waits
            pace.waits(now)
        now += 1 + number % 3
        pace.enters(now, 0 if number % 4 == 3 else 1)
    gaps = [1 + number % 3 for number in range(WARM_UP)]
    assert pace.wait(3) == pytest.approx(3 * sum(gaps) / WARM_UP) and pace.wait(0) == 0
