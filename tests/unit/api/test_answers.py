"""What has been received of a choice, event by event; and what of one call its requests share."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from shoal.api.answers import Choice
from shoal.api.calls import Plain
from shoal.engine.events import Finished, Token, TokenLogprob
from shoal.inputs.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes_only()
BODY = {"model": "fish", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("silent", [False, True])
def test_a_choice_counts_what_came_and_has_no_reason_before_its_end(silent: bool) -> None:
    """A silent one shows nothing of the token that its prompt needed to be run."""
    choice = Choice(Plain(), silent, TOKENIZER.stream())
    assert (choice.count, choice.depth, choice.reason, choice.text) == (0, None, None, "")
    told: list[Any] = []
    for number, token in enumerate(TOKENIZER.encode("aé"), 1):
        told += choice.take(Token("x", token, "a" if number == 1 else "", TokenLogprob(token, -0.5), depth=2))
        assert (choice.count, choice.depth, choice.reason) == (number, 2, None)
    told += choice.take(Finished("x", "stop", "é!", depth=2, completion_tokens=3))
    text, tokens = ("", []) if silent else ("aé!", TOKENIZER.encode("aé"))
    assert "".join(delta["content"] for delta in told) == choice.content == choice.text == text
    assert (choice.tokens, choice.count, choice.reason) == (tokens, 3, "length" if silent else "stop")
    assert [(entry.token, at) for entry, at in choice.logprobs] == list(zip(tokens, (0, 1, 1), strict=False))


@pytest.mark.parametrize(
    ("told", "spent"),
    [
        ([(4, None), (4, None)], [0.0, 0.0]),
        ([(2, None), (4, None)], [None, None]),  # of the first nobody knows
        ([(4, 0.25), (4, None)], [0.25, 0.25]),  # another engine goes on, which measures nothing
        ([(4, None), (4, 0.5)], [0.0, 0.5]),
        ([(0, None)], [None]),  # it never ran
    ],
)
def test_what_was_lost_is_known_at_a_depth_that_loses_nothing(
    told: list[tuple[int, float | None]], spent: list[float | None]
) -> None:
    for end in (False, True):
        choice = Choice(Plain(), False, TOKENIZER.stream(), exact=4)
        for number, ((depth, nats), known) in enumerate(zip(told, spent, strict=True), 1):
            last = end and number == len(told)
            choice.take(
                Finished("x", "stop", depth=depth, spent=nats) if last else Token("x", 70, "", None, depth, nats)
            )
            assert choice.spent == known


@pytest.mark.anyio
async def test_the_requests_of_one_call_name_it_so_that_their_answers_stay_with_the_same_weights(
    http: httpx.AsyncClient, engine: Any
) -> None:
    names = set()
    for url, body, count in (
        ("/v1/chat/completions", {**BODY, "n": 2}, 2),
        ("/v1/chat/completions", {**BODY, "n": 3}, 3),
        ("/v1/completions", {"model": "fish", "prompt": ["a", "b"]}, 2),
    ):
        engine.requests.clear()
        assert (await http.post(url, json=body)).status_code == 200
        assert len(engine.requests) == count and len({request.beside for request in engine.requests}) == 1
        names.add(engine.requests[0].beside)
    assert len(names) == 3 and "" not in names
    engine.requests.clear()
    await http.post("/v1/chat/completions", json=BODY)
    assert [request.beside for request in engine.requests] == [""], "one alone has nobody to stay with"
