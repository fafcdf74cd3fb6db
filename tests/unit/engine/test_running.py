"""What a request knows of itself, in numbers."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.engine.events import Request, Sampling, TokenLogprob
from shoal.engine.pages import Pages
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import RequestError
from shoal.inputs.tokenizer import END_ID, Tokenizer

TOKENIZER = Tokenizer.bytes_only()


def made(answered: int = 0, *, answer: tuple[int, ...] = (), stop: tuple[str, ...] = (), **sampling: Any) -> Running:
    """Three tokens of a prompt, and some of an answer; it came at second 10."""
    return Running(
        Request([50, 51, 52], Sampling(**sampling), id="x", answer=answer, adapter="l"),
        [50, 51, 52, *[60] * answered], prompt_len=3, page=4, text=TextStream(TOKENIZER, stop), seed=0, order=(0, 0, 0),
        arrival=10.0,
    )  # fmt: skip


def test_what_it_holds_has_room_for_all_that_it_may_say() -> None:
    one = made(max_tokens=6)
    assert one.holding.tokens is one.tokens and (one.holding.page, one.holding.adapter) == (4, "l")
    assert one.holding.tables.shape[1] == 3, "nine tokens"


def test_it_goes_on_after_tokens_of_another_engine_of_which_the_last_is_still_to_be_taken_in() -> None:
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    one = made()
    one.resume([a, b, c])
    assert (one.tokens, one.told) == ([50, 51, 52, a, b], c)
    assert one.finished("cancelled", 20.0, None).completion_tokens == 3, "the answer's, taken in or not"
    ended = made(stop=("ab",))
    with pytest.raises(RequestError, match="nothing can follow a stop string") as caught:
        ended.resume([a, b, c])
    assert caught.value.param == "answer"
    # the second token is the first that may end it
    made(stop=("a",), min_tokens=2).resume([a, b])
    with pytest.raises(RequestError):
        made(stop=("a",), min_tokens=1).resume([a, b])


def test_where_the_router_is_to_decide_anew_it_begins_without_what_is_known_of_its_depth() -> None:
    one, pages = made(answered=5), Pages(9)
    one.groups, one.layers, one.look = 2, 2, 5
    one.holding.take(pages, 8, 2)
    one.holding.advance(pages, 7, 0, 2)
    one.undecide(pages)
    assert (one.look, one.least, one.looking, one.looked) == (None, 2, True, 5)
    assert (one.groups, one.acceptance, one.layers) == (None, None, 2)
    assert (one.holding.at, one.holding.states_from) == (0, 0), "of no page are sums kept"


@pytest.mark.parametrize(
    ("token", "sampling", "ends"),
    [
        (END_ID, {}, True),
        (END_ID, {"ignore_eos": True}, False),
        (70, {}, False),
        (70, {"stop_token_ids": [70]}, True),
        (70, {"stop_token_ids": [70], "ignore_eos": True}, True),
        (END_ID, {"stop_token_ids": [END_ID], "ignore_eos": True}, True),
    ],
)
def test_which_token_ends_an_answer(token: int, sampling: dict[str, Any], ends: bool) -> None:
    assert made(**sampling).ends(token) is ends


@pytest.mark.parametrize(
    ("groups", "at", "todo", "decoding"), [(4, 4, 1, True), (4, 3, 2, False), (4, 0, 5, False), (None, 4, 1, False)]
)
def test_it_decodes_where_its_depth_is_known_and_one_row_is_left(
    groups: int | None, at: int, todo: int, decoding: bool
) -> None:
    one = made(answered=2)
    one.groups, one.holding.at = groups, at
    assert (one.answered, one.todo, one.decoding) == (2, todo, decoding)


def test_it_is_fresh_until_something_was_done_for_it_here_or_elsewhere() -> None:
    one = made()
    assert one.fresh and not made(answer=(60,)).fresh
    one.admitted_at = 11.0
    assert not one.fresh


def test_its_prompt_is_scored_until_all_of_it_has_logprobs() -> None:
    one = made(prompt_logprobs=0)
    for known in range(4):
        one.prompt_logprobs = [None, *[TokenLogprob(51, -1.0)] * 2][:known]
        assert one.scoring is (known < 3)
        scored = one.finished("stop", 20.0, None).prompt_logprobs
        assert scored == (() if known < 3 else tuple(one.prompt_logprobs)), "all of them, or none"
    assert not made().scoring


@pytest.mark.parametrize(
    ("admitted", "first", "depth", "queue", "waited"),
    [(None, None, 0, 10.0, 0.0), (12.0, None, 2, 2.0, 0.0), (12.0, 17.0, 2, 2.0, 7.0)],
)
def test_its_end_tells_how_long_each_part_took_since_it_came(
    admitted: float | None, first: float | None, depth: int, queue: float, waited: float
) -> None:
    one, error = made(answered=2), RequestError("boom")
    one.admitted_at, one.first_token_at, one.layers, one.cached_tokens = admitted, first, 2, 1
    end = one.finished("error", 20.0, error)
    assert (end.request, end.reason, end.text, end.error, end.depth) == ("x", "error", "", error, depth)
    assert (end.prompt_tokens, end.cached_tokens, end.completion_tokens) == (3, 1, 2)
    assert (end.queue_seconds, end.first_token_seconds, end.total_seconds) == (queue, waited, 10.0)
    assert (end.first_depth, end.spent) == (depth, None)
    one.least, one.tolerance, one.spent = 1, 0.1, 0.25
    end = one.finished("error", 20.0, error)
    assert (end.depth, end.first_depth, end.spent) == (depth, min(depth, 1), 0.25)
