"""What becomes of a step's outcome, and of who comes and goes, by hand: outcomes here are written, and no model runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shoal.engine.drafting import AHEAD
from shoal.engine.events import Event, Finished, Sampling, Signals, Token
from shoal.engine.plan import Decision, Outcome, Sampled
from shoal.engine.running import Running
from shoal.errors import GenerationError, QueueFullError
from tests.unit.engine.test_planning import live, long, told
from tests.unit.engine.test_scheduler import CONFIG, Harness, end, said

A, B, C, LAST = range(100, 104)


def step(h: Harness, *samples: Sampled, **more: Any) -> list[Event]:
    """The next step gives `samples`."""
    return h.scheduler.commit(h.scheduler.plan(), Outcome(samples, **more))


# --- tokens ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "holds"),
    [((LAST, C), [A]), ((B, LAST), [A, B])],
    ids=["a draft ends it", "what follows the drafts ends it"],
)
def test_tokens_tell_what_was_heard_of_them_and_drafts_that_stood_are_those_that_the_answer_holds(
    last: tuple[int, ...], holds: list[int]
) -> None:
    """In six layers, two of which draft."""
    h = Harness(units=400, max_batch_tokens=40)
    h.scheduler.config = dataclasses.replace(CONFIG, layers=6)
    request = h.submit([60], None, sampling=long(20, speculative=3, stop_token_ids=[LAST]))
    running = live(h, request)
    running.watched = True
    seen = Signals(prompt_nll=2.5, predicted_gaps=(0.1, 0.2), router_bound=0.0)
    assert step(h, decisions=[Decision(6, [], seen)]) == []
    assert (running.layers, running.groups, running.look) == (6, 4, None)
    events = step(h, Sampled(A, nll=1.5, gaps=(1.0, 0.5)))
    # three drafts, two of which stood: the token before them is one of these
    events += step(h, Sampled(A, after=(Sampled(B, gaps=(3.0, 0.0)), Sampled(C, nll=0.5)), drafted=3))
    assert said(events, request) == [A, A, B, C] and running.heard.drafts_accepted == 2
    events += step(h, Sampled(A, after=tuple(map(Sampled, last)), drafted=3))
    finished = end(events, request)
    assert (finished.reason, said(events, request)[4:]) == ("stop", holds)
    assert finished.signals == dataclasses.replace(
        seen, answer_nll=1.0, answer_nll_max=1.5, drafts_accepted=2 + len(holds), gaps=(2.0, 0.25)
    )
    metrics = h.scheduler.metrics
    assert (metrics.drafts, metrics.drafts_accepted) == (6, 4), "as verification says"
    assert metrics.generation_tokens == finished.completion_tokens == 4 + len(holds)
    # three steps of all layers, and in two of them three drafts
    assert (running.ran, running.drawn) == (3 * 6 + 6 * 2, 5 + len(holds))
    assert finished.mean_depth == pytest.approx(30 / running.drawn)
    assert h.scheduler.idle and h.pages.available == h.pages.total


def test_a_request_ends_by_what_comes_first_and_says_nothing_after_it() -> None:
    for sampled, sampling, reason, count in (
        (Sampled(A, after=(Sampled(B), Sampled(C)), drafted=2), {"stop_token_ids": [B]}, "stop", 2),
        (Sampled(A, after=(Sampled(B), Sampled(C)), drafted=2), {"max_tokens": 3}, "length", 3),
        (Sampled(A, after=(Sampled(B, error=GenerationError("boom")), Sampled(C)), drafted=2), {}, "error", 2),
        (Sampled(A, error=GenerationError("boom")), {}, "error", 1),
    ):
        h = Harness(units=400, max_batch_tokens=40)
        asked: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "speculative": 2, **sampling}
        request = h.submit([60], sampling=Sampling(**asked))
        events = step(h, Sampled(A)) + step(h, sampled)
        assert (end(events, request).reason, len(said(events, request))) == (reason, count)
        assert isinstance(events[-1], Finished) and h.scheduler.idle and h.pages.available == h.pages.total
        assert h.scheduler.metrics.finished == {reason: 1}


# --- depths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "limits", "layers", "measured"),
    [
        (0.1, {}, 4, 0.1),  # the router would say two
        (0.0, {}, 4, 0.0),
        (None, {}, 2, None),
        (0.1, {"audits": False}, 2, None),
        (0.1, {"speculative_max_batch": 0}, 2, None),
    ],
)
def test_an_answer_with_a_tolerance_runs_at_full_depth_with_drafts_where_these_pay(
    tolerance: float | None, limits: dict[str, Any], layers: int, measured: float | None
) -> None:
    h, asked = Harness(units=400, max_batch_tokens=40, **limits), list[Running]()
    h.scheduler.judge.decided = asked.append  # type: ignore[method-assign, assignment]
    request = h.submit([60], None, sampling=long(20), quality_tolerance=tolerance)
    running = live(h, request)
    running.look = 9
    step(h, decisions=[Decision(2)])
    assert (running.layers, running.groups, running.tolerance) == (layers, layers, measured)
    assert asked == ([] if measured is not None else [running]), "the judge looks at what the router decides alone"
    assert running.look == (None if layers == 4 else 9)
    assert h.scheduler.metrics.depths == {layers: 1}
    (token,) = step(h, Sampled(A, spent=0.0))
    assert isinstance(token, Token) and (token.depth, token.spent) == (layers, None if measured is None else 0.0)
    (work,) = h.scheduler.plan().works
    assert work.drafts == (0 if measured is None else AHEAD)


def test_what_the_router_is_taken_to_be_wrong_by_is_the_judge_s_at_that_tolerance() -> None:
    h = Harness(units=400)
    h.scheduler.judge.evidence[0.05].shift = 0.75
    shifts = []
    for tolerance in (0.07, 0.0, None):
        request = h.submit([60], None, sampling=long(2), quality_tolerance=tolerance)
        h.scheduler.plan()
        shifts.append(live(h, request).shift)
        h.scheduler.cancel(request)
    assert shifts == [0.75, 0.0, 0.0]


def test_an_answer_that_ends_where_the_router_would_look_again_is_left_as_it_is() -> None:
    h = Harness(units=400)
    for tokens, looks in ((3, False), (4, True)):
        request = h.submit([60], None, sampling=long(tokens))
        running = live(h, request)
        running.look = 3
        step(h, decisions=[Decision(2)])
        for _ in range(3):
            assert running.look == 3
            step(h, Sampled(A))
        assert (running.looking, running.groups) == (looks, None if looks else 2)


# --- who comes and goes ----------------------------------------------------------------------------------------------------


def test_who_is_given_as_itself_is_never_a_later_one_of_the_same_id() -> None:
    h = Harness()
    first = live(h, h.submit([50]))
    assert h.scheduler.cancel(first) and not h.scheduler.cancel(first)
    h.number = 0
    second = live(h, h.submit([50]))
    assert second.id == first.id and not h.scheduler.cancel(first)
    h.scheduler.pause(first)
    assert not second.paused and h.scheduler._paused == 0
    h.scheduler.pause(second)
    assert second.paused and h.scheduler.cancel(second.id) and h.scheduler._paused == 0
    assert not h.scheduler.cancel("nobody")
    h.scheduler.pause("nobody")
    assert [event.reason for event in h.scheduler.take_events() if isinstance(event, Finished)] == ["cancelled"] * 2
    assert h.scheduler.take_events() == [], "each is told once"


def test_those_whose_reader_is_behind_have_as_many_places_of_their_own() -> None:
    h = Harness(units=400, max_batch=1, max_queue=1)
    ids = [h.submit([50 + i]) for i in range(2)]
    assert h.scheduler.full
    for _ in range(2):
        h.scheduler.pause(ids[0])  # twice is once
    assert not h.scheduler.full
    ids.append(h.submit([60]))
    assert h.scheduler.full
    h.scheduler.pause(ids[1])
    ids.append(h.submit([61]))
    for request in ids[2:]:
        h.scheduler.pause(request)
    assert h.scheduler.full, "four, of which two take the places of those who do not read"
    with pytest.raises(QueueFullError):
        h.submit([62])
    h.scheduler.cancel(ids[0])
    assert not h.scheduler.full
    for request in ids[1:3]:
        h.scheduler.pause(request, False)
    assert h.scheduler._paused == 1 and h.scheduler.full is (3 - 1 >= 2)
    h.scheduler.cancel(ids[3])
    assert h.scheduler._paused == 0 and len(h.scheduler.live) == 2 and h.scheduler.full


def test_what_was_begun_elsewhere_comes_in_whatever_is_full() -> None:
    h = Harness(units=400, max_batch=1, max_queue=0)
    h.submit([50])
    with pytest.raises(QueueFullError):
        h.submit([51])
    h.submit([51], answer=(A,), sampling=long(3))
    assert len(h.scheduler.live) == 2 and h.scheduler.metrics.refused == 1


def test_a_step_that_looked_at_an_answer_too_begins_anew_and_the_look_is_dropped() -> None:
    """It may be why the step failed; so nobody's request ends for it."""
    h = Harness(units=400, max_batch_tokens=24)
    going, gone = h.submit([60], sampling=long(3)), h.submit([61], sampling=long(3))
    told(h, 12)
    plan = h.scheduler.plan()
    assert plan.audit is not None and len(plan.works) == 3
    h.scheduler.cancel(gone)
    h.scheduler.fail(iter(plan.works), GenerationError("boom"))
    assert h.scheduler.judge.idle and h.scheduler.judge.dropped == 1 and h.scheduler.judge._failed == 1
    assert [running.id for running in h.scheduler.waiting] == [going] and not h.scheduler.running
    assert [event.request for event in h.scheduler.take_events()] == [gone]
    h.scheduler.check_integrity()
    assert end(h.run(), going).reason == "length"


def test_who_left_during_a_step_that_failed_has_ended_already() -> None:
    h = Harness(units=400)
    stays, leaves = h.submit([60]), h.submit([61])
    plan = h.scheduler.plan()
    h.scheduler.cancel(leaves)
    h.scheduler.fail(plan.works, GenerationError("boom"))
    ends = {event.request: event.reason for event in h.scheduler.take_events() if isinstance(event, Finished)}
    assert ends == {leaves: "cancelled", stays: "error"} and h.scheduler.idle
