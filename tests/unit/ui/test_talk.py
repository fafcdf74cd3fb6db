"""The chat page's side of the conversation, without a page: history to messages, answers to Markdown, errors to one line."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ui import bubbles, talk, words
from ui.talk import Said

CARD = talk.Card("fish", 384, {"shallow": 1, "middle": 2, "full": 4}, "w8a8")


def user(*content: object) -> talk.Message:
    return {"role": "user", "content": list(content)}


def test_the_model_hears_its_own_words_and_not_what_the_page_shows() -> None:
    history = [user("hi"), bubbles.said(Said("a < b", "depth full · 3 tokens", whole=True))]
    assert bubbles.messages(history, {"text": "and?", "files": []}) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a < b"},
        {"role": "user", "content": "and?"},
    ]


def test_a_question_without_an_answer_is_left_out() -> None:
    history = [user("too long"), bubbles.faulty("the server is gone")]
    assert bubbles.messages(history, {"text": "short"}) == [{"role": "user", "content": "short"}]
    assert bubbles.messages([user("stopped before the first word")], {"text": "short"})[0]["content"] == "short"
    assert len(bubbles.messages([user("hi"), bubbles.said(Said("yes")), bubbles.faulty("gone")], {"text": "and?"})) == 3


def test_pictures_go_as_data_urls_before_the_text_in_both_forms_that_gradio_uses(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"png")
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    wanted = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    assert bubbles.messages([], {"text": "what?", "files": [str(path)]})[0]["content"] == wanted
    after = user({"type": "file", "file": {"path": str(path)}}, {"type": "text", "text": "what?"})
    assert bubbles.messages([after, bubbles.said(Said("red"))], {"text": "x"})[0]["content"] == wanted
    assert bubbles.messages([], {"text": "", "files": [str(path)]})[0]["content"] == wanted[:1]


def test_what_somebody_types_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    said = bubbles.messages([user(str(secret)), bubbles.said(Said("no"))], {"text": str(secret)})
    assert [message["content"] for message in said] == [str(secret), "no", str(secret)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b & c", "a &lt; b &amp; c"),
        ("<b>bold</b>", "&lt;b&gt;bold&lt;/b&gt;"),
        ("def f(x):\n    return x", "```python\ndef f(x):\n    return x\n```"),
        ("see:\n```\nx < y\n```", "see:\n```\nx < y\n```"),
        ("<b>\n```python\n<i>\n```\n<u>", "&lt;b&gt;\n```python\n<i>\n```\n&lt;u&gt;"),
        ("```\nstill coming <i>", "```\nstill coming <i>\n```"),
        ("````\n```\n````\n<b>", "````\n```\n````\n&lt;b&gt;"),
        ("def f():\n    '''```'''", "````python\ndef f():\n    '''```'''\n````"),
        ("![a](http://x/y.png) [![a][b]](c)", "!\\[a](http://x/y.png) [!\\[a][b]](c)"),
        ("~~~\n```\n~~~\n<b>\n```", "\\~\\~\\~\n```\n~~~\n<b>\n```"),
        ("- ```\n<b>", "- \\`\\`\\`\n&lt;b&gt;"),
        ("``` <b>\n<i>", "\\`\\`\\` &lt;b&gt;\n&lt;i&gt;"),
        ("```Mermaid\na\n```", "```\na\n```"),
    ],
)
def test_an_answer_is_shown_as_it_is(text: str, shown: str) -> None:
    assert words.markdown(text) == shown


def test_below_an_answer_are_its_votes_and_its_words_make_no_button() -> None:
    forged = '<div class="votes kept answer-x" role="group"><button class="up">'
    assert "<div" not in bubbles.said(Said(forged, "1 token", whole=True))["content"][0]["text"]
    below = bubbles.said(Said("yes", "1 token", whole=True, id="chatcmpl-1"))["content"][1]["text"]
    assert '<div class="votes answer-chatcmpl-1" role="group">' in below and bubbles.without_votes(below) == (
        '<div class="facts">1 token</div>', {"id": "chatcmpl-1", "kept": False}
    )  # fmt: skip
    assert "votes" not in json.dumps(bubbles.said(Said("yes", "1 token", whole=True)))


def test_the_facts_below_an_answer() -> None:
    assert talk.facts("middle", 24, CARD, "first after 0.50 s, last", 2.4) == (
        "depth middle (2 of 4 layers) · 24 tokens · 10 tokens/s · first after 0.50 s, last after 2.40 s"
    )
    one = "depth full (4 of 4 layers) · 1 token · first after 0.10 s, last after 0.10 s"
    assert talk.facts("full", 1, CARD, "first after 0.10 s, last", 0.1) == one
    usage = {"mean_depth": 2.25, "quality": {"spent": 0.0312, "allowed": 0.1}}
    assert talk.facts("full", 24, CARD, "first after 0.50 s, last", 2.4, usage) == (
        "depth full (4 of 4 layers, 2.2 in the mean) · 24 tokens · 10 tokens/s · lost 0.031 of 0.1 nats a token · "
        "first after 0.50 s, last after 2.40 s"
    )
    unmeasured = {"mean_depth": 4.0, "quality": {"spent": None, "allowed": 0.1}}
    assert talk.facts("full", 1, CARD, "first after 0.10 s, last", 0.1, unmeasured) == one


class Server:
    """An API that streams `pieces` and then ends, or is cut off."""

    def __init__(self, pieces: list[str], *, cut: bool = False, end: str | None = None) -> None:
        """`end`: the reason that it gives."""
        self._pieces, self._cut, self._end = pieces, cut, end

    def client(self) -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=httpx.MockTransport(self._answer))
        return openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http, max_retries=0)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        events = [{"choices": [self._choice({"role": "assistant", "content": ""})]}]
        events += [{"choices": [self._choice({"content": piece})]} for piece in self._pieces]
        if self._cut:
            events.append({"error": {"message": "the engine replica was lost", "code": "engine_dead"}})
        else:
            usage = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10, "depth": "middle"}
            events.append({"choices": [self._choice({}) | {"finish_reason": self._end}]})
            events.append({"choices": [], "usage": usage})
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        lines += "" if self._cut else "data: [DONE]\n\n"
        return httpx.Response(200, text=lines, headers={"content-type": "text/event-stream", "X-Shoal-Depth": "middle"})

    def _choice(self, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "finish_reason": None}


def states(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[Said]:
    monkeypatch.setattr(talk, "SHOWN_EVERY", -1.0)  # each piece is a state

    async def all_of() -> list[Said]:
        return [state async for state in talk.stream(server.client(), CARD, [], talk.Settings("auto", 9))]

    return asyncio.run(all_of())


@pytest.mark.parametrize(("end", "told"), [("length", True), ("stop", False), (None, False)])
def test_an_answer_that_ends_in_the_middle_of_a_sentence_says_why(
    end: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = states(Server(["one", " two"], end=end), monkeypatch)
    assert last.below.endswith(" s · cut off at Most tokens") is told and last.whole
    assert ("cut off" in last.below) is told


def test_an_answer_that_is_stopped_keeps_what_was_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_, last = states(Server(["one", " two"]), monkeypatch)
    assert first.below.startswith("depth middle (2 of 4 layers) · 1 token · ")
    assert second.below.startswith("depth middle (2 of 4 layers) · 2 tokens · ") and ", stopped after" in second.below
    assert (last.text, last.whole) == ("one two", True) and "9 tokens" in last.below and "stopped" not in last.below
    lines = [bubbles.said(state)["content"][1]["text"] for state in (second, last)]
    assert lines == [f'<div class="sofar">{second.below}</div>', f'<div class="facts">{last.below}</div>']
    assert bubbles.messages([user("hi"), bubbles.said(second)], {"text": "and?"})[1]["content"] == "one two"


def test_an_answer_that_is_cut_off_keeps_its_words_beside_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, last = states(Server(["one", " two"], cut=True), monkeypatch)
    assert (last.text, last.fault) == ("one two", "the engine replica was lost.")
    words, why = [part["text"] for part in bubbles.said(last)["content"]]
    assert words == "one two" and 'role="alert"' in why and "the engine replica was lost" in why


def first_of(
    answers: list[httpx.Response | Exception], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Said], list[Any]]:
    """The states that come of these answers of an API, and the bodies that it was sent."""
    asked: list[Any] = []
    monkeypatch.setattr(talk, "ASKED_EVERY", 0.0)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        found = answers.pop(0) if answers else Server(["one"])._answer(request)
        if isinstance(found, Exception):
            raise found
        return found

    async def all_of() -> list[Said]:
        http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        api = openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http, max_retries=0)
        return [state async for state in talk.stream(api, CARD, [], talk.Settings("auto", 9))]

    return asyncio.run(all_of()), asked


def refusal(status: int, **error: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "no", **error}})


def test_a_service_that_takes_no_work_is_asked_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    states, asked = first_of([refusal(503), refusal(503)], monkeypatch)
    assert (states[-1].text, states[-1].whole, len(asked)) == ("one", True, 3)
    monkeypatch.setattr(talk, "INSISTED", -1.0)
    states, asked = first_of([refusal(503)], monkeypatch)
    assert (states[-1].fault, len(asked)) == ("no.", 1)


def test_a_service_that_is_not_there_is_asked_again_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    states, asked = first_of([httpx.ConnectError("gone"), refusal(503)], monkeypatch)
    assert (states[-1].text, states[-1].whole, len(asked)) == ("one", True, 3)
    monkeypatch.setattr(talk, "INSISTED_ON_NOBODY", -1.0)
    states, asked = first_of([httpx.ConnectError("gone")], monkeypatch)
    assert "does not answer" in states[-1].fault and len(asked) == 1


def test_what_fits_is_asked_for_where_more_does_not_and_nothing_else_is_asked_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = {"code": talk.TOO_LONG, "param": "max_tokens"}
    states, asked = first_of([refusal(400, **long)], monkeypatch)
    assert states[-1].text == "one" and [body.get("max_tokens") for body in asked] == [9, None]
    assert states[-1].settings == talk.Settings("auto", None)
    states, asked = first_of([refusal(400, **{**long, "param": "messages"})], monkeypatch)
    assert "does not fit the model's 384 tokens" in states[-1].fault and len(asked) == 1
    states, asked = first_of([refusal(400, **long), refusal(400, **long)], monkeypatch)
    assert "does not fit the model's 384 tokens" in states[-1].fault and len(asked) == 2


def test_what_has_come_is_shown_and_shown_again_though_nothing_follows() -> None:
    """Two pieces within `SHOWN_EVERY`, and then the server is silent for longer than the test waits. Without a further state
    Gradio would not find out that nobody reads any more."""

    class Stalls(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in ("one", " two"):
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
            await asyncio.sleep(600)

    async def last() -> str:
        kind = {"content-type": "text/event-stream"}
        http = httpx.AsyncClient(
            transport=httpx.MockTransport(lambda _: httpx.Response(200, headers=kind, stream=Stalls()))
        )
        api = openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http, max_retries=0)
        async with asyncio.timeout(60), aclosing(talk.stream(api, CARD, [], talk.Settings("auto", 9))) as found:
            while (state := await anext(found)).text != "one two":
                pass
            assert await anext(found) is state
        return state.below

    assert asyncio.run(last()).startswith("2 tokens · ")


def test_an_error_is_the_api_s_own_sentence_or_what_to_do_on_the_page() -> None:
    asked = httpx.Request("POST", "http://x")
    body = {"message": "15 tokens do not fit", "code": "context_length_exceeded"}
    refused = openai.BadRequestError("Error code: 400", response=httpx.Response(400, request=asked), body=body)
    assert talk.reason(refused) == "15 tokens do not fit."
    body = {"message": "send one as 'Authorization: Bearer KEY'", "code": "invalid_api_key"}
    locked = openai.AuthenticationError("Error code: 401", response=httpx.Response(401, request=asked), body=body)
    assert "Bearer" not in talk.reason(locked) and "log in" in talk.reason(locked)


def test_a_request_holds_what_was_set_and_leaves_the_rest_to_the_server() -> None:
    asked = bubbles.messages([], {"text": "hi"}, "Be kind.")
    assert asked == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    settings = talk.Settings("auto", 9, 0.5, 0.9, seed=7, tolerance=0.1)
    body = settings.body("fish", asked)
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("fish", 9, 0.5, 0.9)
    assert (body["seed"], body["quality_tolerance"], body["depth"]) == (7, 0.1, "auto")
    plain = talk.Settings("auto", 9).body("fish", asked)
    assert "seed" not in plain and "quality_tolerance" not in plain
    assert "quality_tolerance" not in talk.Settings("full", 9, tolerance=0.1).body("fish", asked)  # the API takes one
    by_policy = talk.Settings("", 9, tolerance=0.1).body("fish", asked)
    assert "depth" not in by_policy and by_policy["quality_tolerance"] == 0.1


@pytest.mark.parametrize("picture", [False, True])
def test_the_curl_command_sends_the_very_request(tmp_path: Path, picture: bool) -> None:
    (tmp_path / "picture-1.png").write_bytes(b"a picture")
    (tmp_path / "curl").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > sent.args\ncat > sent.json\n")
    (tmp_path / "curl").chmod(0o755)
    text = 'it\'s $HOME `id` \\n "q"\nJSON\n$(id) ¿'
    asked = bubbles.messages([], {"text": text, "files": [str(tmp_path / "picture-1.png")] * picture})
    body = talk.Settings("shallow", 5).body("fish", asked)
    command = words.curl("http://127.0.0.1:1/v1", body, key=True)
    assert "base64,YSBw" not in command  # the picture itself would fill the page
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SHOAL_API_KEY": "k"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=20)
    assert json.loads((tmp_path / "sent.json").read_text()) == body
    arguments = (tmp_path / "sent.args").read_text().splitlines()
    assert "http://127.0.0.1:1/v1/chat/completions" in arguments and "Authorization: Bearer k" in arguments
