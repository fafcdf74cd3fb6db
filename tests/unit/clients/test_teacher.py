"""A teacher is asked as it was meant, waited for, and named in what it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from shoal.clients import teacher
from shoal.clients.teacher import TEACHER, Ask
from shoal.errors import DataError, ResourceError, UsageError
from tests.clocks import tells

QUESTION: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
ASK = Ask("http://127.0.0.1:1/v1", "m", temperature=0.5, max_tokens=8, seed=3, depth="full")


def http(*answers: httpx.Response) -> tuple[httpx.Client, list[dict[str, Any]]]:
    """A client that gets `answers` in turn, and the bodies that it sent."""
    waiting, bodies = list(answers), list[dict[str, Any]]()

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/chat/completions"
        bodies.append(json.loads(request.content))
        return waiting.pop(0)

    return httpx.Client(transport=httpx.MockTransport(answer)), bodies


def good(text: str = "a") -> httpx.Response:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return httpx.Response(
        200, json={"id": "1", "model": "m-v2", "choices": [choice], "usage": {"completion_tokens": 1, "depth": "full"}}
    )


def test_the_row_says_who_answered_and_how_it_was_asked() -> None:
    client, bodies = http(good())
    row = teacher.answered(client, QUESTION, ASK)
    assert row["messages"] == [*QUESTION, {"role": "assistant", "content": "a"}]
    told = row[TEACHER]
    assert (told["model"], told["answered_by"], told["seed"], told["depth"]) == ("m", "m-v2", 3, "full")
    assert told["question"] == teacher.identity(QUESTION, ASK) and told["finish_reason"] == "stop"
    assert bodies == [
        {"model": "m", "messages": QUESTION, "temperature": 0.5, "max_tokens": 8, "seed": 3, "depth": "full"}
    ]


def test_a_full_server_is_waited_for_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    tells(monkeypatch, "shoal.clients.teacher", sleep=slept.append)
    client, bodies = http(httpx.Response(429, headers={"Retry-After": "3"}), httpx.Response(503), good())
    teacher.answered(client, QUESTION, ASK)
    assert slept == [3.0, 2.0] and len(bodies) == 3
    client, _ = http(httpx.Response(400, text="too long"))
    with pytest.raises(DataError, match="refused a question: got '400: too long'"):
        teacher.answered(client, QUESTION, ASK)
    client, _ = http(*[httpx.Response(429)] * teacher.TRIES)
    with pytest.raises(ResourceError, match="stayed full"):
        teacher.answered(client, QUESTION, ASK)


def test_what_follows_the_last_question_is_left_out() -> None:
    row = {"messages": [*QUESTION, {"role": "assistant", "content": "old"}]}
    assert teacher.questions(json.dumps(row)) == QUESTION
    for line in ("{", "[]", '{"messages": []}', '{"messages": [{"role": "assistant", "content": ""}]}'):
        with pytest.raises(DataError, match="without a question"):
            teacher.questions(line)


def test_what_http_cannot_carry_is_no_question() -> None:
    for content in ('"\\ud800"', "NaN"):
        with pytest.raises(DataError, match="without a question"):
            teacher.questions(f'{{"messages": [{{"role": "user", "content": {content}}}]}}')


@pytest.mark.parametrize(
    ("text", "ended", "kind"),
    [
        ("half an", "length", "cut_off"),
        ("half", "content_filter", "cut_off"),
        ("", "length", "cut_off"),
        ("", "stop", "empty"),
        (" \n", "stop", "empty"),
        (None, "tool_calls", "empty"),
    ],
)
def test_an_answer_that_would_teach_to_end_there_is_no_target(text: str | None, ended: str, kind: str) -> None:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": ended}
    client, _ = http(httpx.Response(200, json={"choices": [choice]}))
    with pytest.raises(teacher.NoTarget) as caught:
        teacher.answered(client, QUESTION, ASK)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"7",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {}}]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"finish_reason": "stop", "message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"finish_reason": "stop", "message": {"content": [1]}}]}',
    ],
)
def test_an_answer_that_is_none_of_the_protocol_costs_one_question(body: bytes) -> None:
    client, _ = http(httpx.Response(200, content=body))
    with pytest.raises(DataError, match="none of the protocol"):
        teacher.answered(client, QUESTION, ASK)


def test_other_settings_are_another_question() -> None:
    assert teacher.identity(QUESTION, ASK) != teacher.identity(QUESTION, Ask(ASK.url, "m"))
    for wrong in ({"temperature": -1}, {"max_tokens": 0}):
        with pytest.raises(UsageError):
            Ask("u", "m", **wrong)
