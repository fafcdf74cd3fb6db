"""An answer that one engine began and another goes on with is the answer that one engine would have given. In float64.

The cut is made where a lost replica would make it: between two events. What was sent before it and what the other engine
sends after it must together be the uncut stream: tokens, text, logprobs, and the end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import Engine, Request, Sampling
from shoal.engine.events import Event, Finished, Guide, Token
from shoal.errors import RequestError
from shoal.model.model import Model
from shoal.model.router import Router
from tests import oracle
from tests.unit.engine.lively import lively
from tests.unit.engine.test_oracle import LETTERS, MODEL, REQUESTS, near


def events(engine: Engine, request: Request) -> list[Event]:
    """All events of `request`, alone."""
    engine.submit(request)
    found: list[Event] = []
    while not engine.idle:
        found += engine.step()
    return found + engine.step()


def resumed(request: Request, sent: list[Token]) -> Request:
    """`request` as it goes on after the events `sent`."""
    if not sent:
        return request
    answer = tuple(token.token for token in sent)
    return dataclasses.replace(request, answer=answer, depth=sent[-1].depth, quality_tolerance=None)


@settings(max_examples=25)
@given(REQUESTS, st.sampled_from([0, 2]), st.data())
def test_any_cut_gives_the_uncut_stream(request: Request, drafts: int, data: st.DataObject) -> None:
    first = events(Engine(MODEL, units=400), request)
    tokens = [found for found in first if isinstance(found, Token)]
    whole = oracle.answer(MODEL, request, [token.token for token in tokens])
    cut = data.draw(st.integers(0, len(tokens)))
    limits: dict[str, Any] = data.draw(st.sampled_from([{}, {"max_batch": 2, "max_batch_tokens": 10}]))
    other = Engine(MODEL, units=400, speculative=drafts, speculative_max_batch=8, **limits)
    if data.draw(st.booleans()):  # its prefix cache knows the request already
        events(other, dataclasses.replace(request, id="before"))
    after = events(other, resumed(request, tokens[:cut]))
    event(f"{'complete' if cut == len(tokens) else 'begun' if cut else 'fresh'}, ends by {whole.finish_reason}")

    *rest, end = after
    assert isinstance(end, Finished)
    stream = [*tokens[:cut], *[found for found in rest if isinstance(found, Token)]]
    assert [token.token for token in stream] == whole.tokens
    assert "".join(token.text for token in stream) + end.text == whole.text
    assert [token.text for token in stream] == [token.text for token in tokens]  # nor is text told later or earlier
    near([token.logprob for token in stream if token.logprob], whole.logprobs)
    assert whole.finished is not None
    assert (end.reason, end.completion_tokens) == (whole.finish_reason, len(whole.tokens))
    assert (end.prompt_tokens, end.depth) == (whole.finished.prompt_tokens, whole.finished.depth)
    near(end.prompt_logprobs, whole.finished.prompt_logprobs)
    assert other.stats()["kv_cache_usage_perc"] == 0
    other.scheduler.check_integrity()


class Always(Router):
    """Sends every prompt to one exit."""

    layers = 0

    def choose(self, x: Tensor, *given: object) -> int:
        return self.layers


def always(layers: int) -> Model:
    model = lively()
    router = Always(model.config)
    router.layers = layers
    return Model(model.config, model.net, model.tokenizer, router=router)


def test_the_depth_that_the_router_chose_is_kept() -> None:
    """The second engine's router would choose another."""
    shallow, full = always(1), always(4)
    request = Request("abc", Sampling(temperature=1, seed=4, max_tokens=12, ignore_eos=True))
    *tokens, end = events(Engine(shallow, units=400), request)
    assert isinstance(end, Finished) and end.depth == 1
    sent = [token for token in tokens if isinstance(token, Token)]
    assert {token.depth for token in sent} == {1}
    *rest, last = events(Engine(full, units=400), resumed(request, sent[:5]))
    assert isinstance(last, Finished) and last.depth == 1
    assert [token.token for token in rest if isinstance(token, Token)] == [token.token for token in sent[5:]]
    with pytest.raises(RequestError, match="depth that the answer began with"):
        Engine(full, units=400).submit(dataclasses.replace(request, answer=(LETTERS[0],)))


@pytest.mark.parametrize(
    ("sampling", "answer", "says"),
    [
        (Sampling(max_tokens=2), LETTERS[:3], "at most max_tokens"),
        (Sampling(max_tokens=9), [99_999], "token ids 0 to"),
        (Sampling(max_tokens=9, stop_token_ids=[LETTERS[1]]), LETTERS[:3], "do not end an answer"),
        (Sampling(max_tokens=9, stop=["ab"]), LETTERS[:3], "follow a stop string"),
    ],
)
def test_what_cannot_be_a_beginning_is_refused(sampling: Sampling, answer: list[int], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        Engine(MODEL, units=400).submit(Request("x", sampling, depth="full", answer=answer))
    assert caught.value.param == "answer"


def test_a_beginning_that_its_grammar_forbids_ends_in_an_error() -> None:
    request = Request("x", Sampling(max_tokens=9, guided=Guide("choice", ("yes",))), depth="full", answer=LETTERS[:2])
    (end,) = events(Engine(MODEL, units=400), request)
    assert isinstance(end, Finished) and end.reason == "error"


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_answer_that_is_cancelled_where_it_goes_on_has_the_tokens_that_it_came_with(steps: int) -> None:
    """Also before the last of them is taken in."""
    request = Request("abc", Sampling(temperature=0, max_tokens=12, ignore_eos=True), depth="full", answer=LETTERS[:5])
    engine, told = Engine(MODEL, units=400), list[Event]()
    name = engine.submit(request)
    for _ in range(steps):
        told += engine.step()
    engine.cancel(name)
    *rest, end = told + engine.step()
    assert isinstance(end, Finished) and end.reason == "cancelled"
    assert end.completion_tokens == 5 + len(rest) and len(rest) == max(0, steps - 1)


@pytest.mark.parametrize("begun", [0, 1, 5])
def test_a_token_of_an_answer_that_goes_on_takes_what_those_took_that_were_made_here(begun: int) -> None:
    """Each step takes a second; what another engine gave took none of them."""
    now = 0.0
    engine = Engine(MODEL, units=400, clock=lambda: now)
    answer = LETTERS[:begun]
    sampling = Sampling(temperature=0, max_tokens=begun + 4, ignore_eos=True)
    engine.submit(Request("abc", sampling, depth="full", answer=answer))
    while not engine.idle:
        engine.step()
        now += 1.0
    each = engine.scheduler.metrics.request_time_per_output_token_seconds
    assert (each.count, each.sum) == (1, 1.0)
