"""A request that the router looks at again says what two requests would: one of the first depth up to there, and one of the
deeper that goes on after its tokens. In float64.

The routers here decide by the length of what they see, so that what they say follows from the request.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Completion, Event, Finished, Token
from shoal.engine.running import Running
from shoal.errors import RequestError
from shoal.model.router import Router, features, page_sums
from tests.unit.engine.test_oracle import MODEL, PROMPTS, near, samplings

EXITS = MODEL.config.exits


class ByLength(Router):
    """Sends what it sees to an exit by its length, and keeps what it saw."""

    def __init__(self, rule: Callable[[int], int]) -> None:
        super().__init__(MODEL.config)
        self.rule, self.seen = rule, dict[int, Tensor]()

    def covers(self, tolerance: float | None = None) -> bool:
        return True

    def choose(self, x: Tensor, *given: object) -> int:
        length = round(float(x[-2].exp()))
        self.seen[length] = x
        return self.rule(length)


def model(first: Callable[[int], int], second: Callable[[int], int], after: int) -> Model:
    router, later = ByLength(first), ByLength(second)
    later.calibration.after, router.later = after, later
    return Model(MODEL.config, MODEL.net, MODEL.tokenizer, router=router)


def to(layers: int) -> Callable[[int], int]:
    return lambda length: layers


def answers(
    engine: Engine, requests: list[Request], after: Callable[[], None] = lambda: None
) -> dict[str, list[Event]]:
    """The events of each request; `after` each step."""
    found: dict[str, list[Event]] = {engine.submit(request): [] for request in requests}
    while not engine.idle:
        for one in engine.step():
            found[one.request].append(one)
        after()
        engine.scheduler.check_integrity()
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    return found


def alone(request: Request, depth: int, answer: tuple[int, ...] = ()) -> Completion:
    """`request` at a fixed depth after the tokens `answer`."""
    fixed = dataclasses.replace(request, depth=depth, answer=answer, id="alone", quality_tolerance=None)
    (found,) = Engine(MODEL, units=400).generate([fixed])
    return found


def check(request: Request, told: list[Event], layers: tuple[int, int], after: int) -> bool:
    """`told` is what the first depth of `layers` says, from `after` tokens on what the second does. Does it get there?"""
    first, deeper = layers
    wanted = alone(request, first)
    tokens = wanted.tokens[:after]
    there = len(wanted.tokens) > after
    if len(wanted.tokens) == after < request.sampling.max_tokens and wanted.finish_reason == "stop":
        # A stop string ends the answer at its last token; an end token is the one behind it, which the deeper draws anew.
        sampling = request.sampling
        few = dataclasses.replace(sampling, max_tokens=after, min_tokens=min(after, sampling.min_tokens))
        there = alone(dataclasses.replace(request, sampling=few), first).finish_reason == "length"
    rest = alone(request, deeper, tuple(tokens)) if there else None
    *said, end = told
    assert isinstance(end, Finished) and all(isinstance(one, Token) for one in said)
    got = [one for one in said if isinstance(one, Token)]
    assert [one.token for one in got] == (wanted.tokens if rest is None else tokens + rest.tokens)
    assert [one.depth for one in got] == [first if place < after else deeper for place in range(len(got))]
    last = wanted if rest is None else rest
    assert (end.reason, end.completion_tokens) == (last.finish_reason, len(got))
    assert end.depth == (first if rest is None else deeper)
    logprobs = wanted.logprobs if rest is None else wanted.logprobs[:after] + rest.logprobs
    near([one.logprob for one in got if one.logprob], logprobs)
    assert wanted.finished is not None
    near(end.prompt_logprobs, wanted.finished.prompt_logprobs)
    return rest is not None


@settings(max_examples=15)
@given(
    st.lists(st.builds(Request, PROMPTS, samplings()), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
    st.data(),
)
def test_what_is_said_is_what_both_depths_say(
    requests: list[Request], after: int, drafts: int, data: st.DataObject
) -> None:
    routed = model(lambda length: EXITS[length % 2], lambda length: EXITS[(length // 2) % 3], after)
    limits: dict[str, Any] = data.draw(st.sampled_from([{}, {"max_batch": 2, "max_batch_tokens": 10}, {"units": 40}]))
    engine = Engine(routed, **{"units": 400, "speculative": drafts, "speculative_max_batch": 8, **limits})
    if data.draw(st.booleans()):  # their pages are in the prefix cache, of some depth
        depth = data.draw(st.sampled_from(EXITS))
        answers(engine, [dataclasses.replace(r, depth=depth, id=f"{i}") for i, r in enumerate(requests)])
    draws, every = random.Random(data.draw(st.integers(0, 99))), data.draw(st.sampled_from([0, 0, 2, 3]))
    steps = 0

    def preempt() -> None:
        nonlocal steps
        steps += 1
        if every and steps < 60 and steps % every == 0 and engine.scheduler.running:
            running = draws.choice(engine.scheduler.running)
            event(f"preempted {'in a look' if running.looking else 'before or after'}")
            engine.scheduler._preempt(running)

    looks = 0
    for request, told in zip(requests, answers(engine, requests, preempt).values(), strict=True):
        prompt = len(MODEL.encode(request.prompt).ids)
        first, second = EXITS[prompt % 2], EXITS[((prompt + after) // 2) % 3]
        looks += check(request, told, (first, max(first, second)), after)
    event(f"{looks} looks")
    assert looks >= engine.stats()["second_looks_total"] >= 0


def ask(prompt: str | list[int], tokens: int = 12, **more: Any) -> Request:
    return Request(prompt, Sampling(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2), **more)


LONG = [20 + (7 * i) % 200 for i in range(37)]


@pytest.mark.parametrize("rows", [400, 17])
def test_the_second_look_sees_prompt_and_answer_as_the_whole_model_does(rows: int) -> None:
    """From pages that have sums of the prompt, that have some of the answer, and that have none; in chunks."""
    routed = model(to(EXITS[0]), to(EXITS[0]), 20)
    engine = Engine(routed, units=400, max_batch=1, max_batch_tokens=rows)
    router = routed.router
    assert isinstance(router, ByLength) and isinstance(router.later, ByLength)
    for _ in range(2):
        (told,) = answers(engine, [ask(LONG, 24)]).values()
        tokens = [*LONG, *[one.token for one in told if isinstance(one, Token)]]
        for kept, length in ((router.seen, len(LONG)), (router.later.seen, len(LONG) + 20)):
            ids = torch.tensor(tokens[:length])
            state = MODEL.net(ids[None], exits=EXITS[:1])[EXITS[0]][0]
            torch.testing.assert_close(kept.pop(length), features(page_sums(MODEL.net, state, ids), state[-1], length))
    assert engine.stats()["prefix_cache_hits_total"] > 0


@pytest.mark.parametrize(("first", "deeper"), [(0, 1), (0, 2), (1, 2)])
def test_pages_of_group_1_stay_and_what_ran_is_counted(first: int, deeper: int) -> None:
    engine = Engine(model(to(EXITS[first]), to(EXITS[deeper]), 5), units=400)
    engine.submit(request := ask(LONG))
    (running,) = engine.scheduler.live
    while not running.looking:
        engine.step()
    before, owned = running.holding.tables[0].copy(), running.holding.owned[0]
    stored = engine.runner.cache.kv[:, before[: owned - 1]].clone()
    told: list[Event] = []
    while not engine.idle:
        told += engine.step()
        if running.looking:
            assert (running.holding.tables[0, :owned] == before[:owned]).all()
            assert torch.equal(engine.runner.cache.kv[:, before[: owned - 1]], stored)
    end = told[-1]
    assert isinstance(end, Finished) and end.depth == EXITS[deeper]
    # the steps of the answer; and group 1 by itself, rows that it has sums of to the end, and the others from group 1 on
    looks = EXITS[0] + EXITS[deeper] + (EXITS[deeper] - EXITS[0])
    assert end.mean_depth == pytest.approx((5 * EXITS[first] + looks + 6 * EXITS[deeper]) / 12)
    stats = engine.stats()
    assert (stats["second_looks_total"], stats["second_looks_deeper_total"]) == (1, 1)
    assert stats[f"requests_depth_{EXITS[first]}_total"] == 1 and stats[f"requests_depth_{EXITS[deeper]}_total"] == 0
    assert request.depth == "auto"


def test_a_look_that_changes_nothing_costs_no_layer() -> None:
    engine = Engine(model(to(EXITS[1]), to(EXITS[0]), 5), units=400)  # it may only go deeper
    (answer,) = engine.generate([ask("abc")])
    assert answer.finished is not None and (answer.finished.mean_depth, answer.depth) == (EXITS[1], EXITS[1])
    stats = engine.stats()
    assert (stats["second_looks_total"], stats["second_looks_deeper_total"]) == (1, 0)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ask("abc", 5), "no longer than that"),
        (ask("abc", 4), "shorter"),
        (ask("abc", depth="shallow"), "fixed"),
        (ask("abc", quality_tolerance=0.0), "full depth already"),
    ],
)
def test_who_is_not_looked_at_again(request_: Request, why: str) -> None:
    first = EXITS[-1] if request_.quality_tolerance == 0 else EXITS[0]
    engine = Engine(model(to(first), to(EXITS[-1]), 5), units=400)
    (answer,) = engine.generate([request_])
    assert answer.depth == first and engine.stats()["second_looks_total"] == 0, why


def test_an_answer_that_ends_with_the_token_before_the_look_is_not_looked_at() -> None:
    engine = Engine(model(to(EXITS[0]), to(EXITS[-1]), 5), units=400)
    whole = alone(ask("abc"), EXITS[0])
    stop = dataclasses.replace(ask("abc").sampling, stop=(whole.text[4],))
    request = Request("abc", stop)
    (told,) = answers(engine, [request]).values()
    check(request, told, (EXITS[0], EXITS[-1]), 5)
    assert isinstance(told[-1], Finished) and told[-1].reason == "stop" and told[-1].completion_tokens <= 5
    assert engine.stats()["second_looks_total"] == 0


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 9])
@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_an_answer_goes_on_elsewhere_with_the_look_that_it_still_has(cut: int, tolerance: float | None) -> None:
    routed = model(to(EXITS[0]), to(EXITS[-1]), 5)
    request = dataclasses.replace(ask(LONG), quality_tolerance=tolerance)
    request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, speculative=0))
    (whole,) = answers(Engine(routed, units=400), [request]).values()
    sent = [one for one in whole if isinstance(one, Token)][:cut]
    rest = request.after([one.token for one in sent], sent[-1]) if sent else request
    other = Engine(routed, units=400)
    (after,) = answers(other, [rest]).values()
    got = [*sent, *[one for one in after if isinstance(one, Token)]]
    wanted = [one for one in whole if isinstance(one, Token)]
    assert [(one.token, one.depth, one.text) for one in got] == [(one.token, one.depth, one.text) for one in wanted]
    near([one.logprob for one in got], [one.logprob for one in wanted])
    assert other.stats()["second_looks_total"] == (cut <= 5)
    end, uncut = after[-1], whole[-1]
    assert isinstance(end, Finished) and isinstance(uncut, Finished)
    if cut == 0 or cut > 5:  # a look that is made anew has no sums of pages to begin with
        assert end.mean_depth == uncut.mean_depth, "of all of the answer, the look among it"


def test_choices_of_one_prompt_are_looked_at_each_by_itself() -> None:
    engine = Engine(model(to(EXITS[0]), lambda length: EXITS[2], 3), units=400, max_batch=4)
    requests = [Request(LONG, Sampling(seed=seed, max_tokens=8, ignore_eos=True, logprobs=0)) for seed in range(4)]
    for request, told in zip(requests, answers(engine, requests).values(), strict=True):
        assert check(request, told, (EXITS[0], EXITS[2]), 3)
    assert engine.stats()["second_looks_total"] == 4


def test_what_may_go_deeper_must_fit_at_full_depth() -> None:
    routed, page = model(to(EXITS[0]), to(EXITS[-1]), 5), MODEL.config.page
    engine = Engine(routed, units=1 + 3 * -(-len(LONG) // page))
    begun = ask(LONG).after([60, 61], Token("", 61, "", depth=EXITS[0]))
    with pytest.raises(RequestError, match="never fit"):
        engine.submit(begun)
    engine.submit(dataclasses.replace(begun, routed=False))


def test_no_draft_steps_over_the_look() -> None:
    engine = Engine(model(to(EXITS[1]), to(EXITS[-1]), 6), units=400, speculative=4, speculative_max_batch=8)
    at: list[int] = []
    engine.submit(ask("abc", 20))
    (running,) = engine.scheduler.live
    assert isinstance(running, Running)
    while not engine.idle:
        engine.step()
        at += [running.answered] if running.looking and running.groups is None else []
    assert set(at) == {6} and engine.stats()["spec_decode_num_draft_tokens_total"] > 0
