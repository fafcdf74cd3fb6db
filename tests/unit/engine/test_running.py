"""What a request knows of itself, in numbers."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.engine.events import Request, Sampling, TokenLogprob
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import RequestError
from shoal.inputs.tokenizer import END_ID, Tokenizer


def made(answered: int = 0, *, answer: tuple[int, ...] = (), **sampling: Any) -> Running:
    """Three tokens of a prompt, and some of an answer; it came at second 10."""
    return Running(
        Request([50, 51, 52], Sampling(**sampling), id="x", answer=answer), [50, 51, 52, *[60] * answered], prompt_len=3,
        page=4, text=TextStream(Tokenizer.bytes_only(), ()), seed=0, order=(0, 0, 0), arrival=10.0,
    )  # fmt: skip


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


def test_its_signals_are_told_where_they_are_asked_for() -> None:
    one = made(answered=2)
    one.heard.token(1.5)
    assert one.finished("stop", 20.0, None).signals is None
    one.watched = True
    assert one.finished("stop", 20.0, None).signals == one.heard.all()


@pytest.mark.parametrize(("ran", "drawn", "mean"), [(0, 0, 0.0), (6, 4, 1.5)])
def test_its_mean_depth_is_of_the_tokens_that_were_counted(ran: int, drawn: int, mean: float) -> None:
    one = made(answered=5)
    one.ran, one.drawn = ran, drawn
    assert one.finished("stop", 20.0, None).mean_depth == mean
