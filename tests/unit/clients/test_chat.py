"""The terminal client against scripted HTTP answers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
import pytest

from shoal.api.wire import DONE, sse
from shoal.clients.chat import Conversation, chat, data_url, figures
from shoal.errors import ResourceError, ShoalError, UsageError

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "depth": "middle"}


def stream(*pieces: str, usage: bool = True) -> bytes:
    chunks = [sse({"choices": [{"delta": {"content": piece}}], "usage": None}) for piece in pieces]
    return b"".join([*chunks, sse({"choices": [], "usage": USAGE}) if usage else b"", DONE])


class Server:
    """Answers each request with the next of `replies`, and keeps the bodies."""

    def __init__(self, *replies: httpx.Response) -> None:
        self.replies, self.bodies = list(replies), list[dict[str, object]]()
        self.out = io.StringIO()
        http = httpx.Client(transport=httpx.MockTransport(self._handle), base_url="http://t/v1/")
        self.talk = Conversation(http, "fish", out=self.out)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        return self.replies.pop(0)


def test_a_conversation_is_sent_whole_and_its_figures_are_printed() -> None:
    server = Server(httpx.Response(200, content=stream("Hel", "lo")), httpx.Response(200, content=stream("Bye")))
    server.talk.turn("hi")
    server.talk.turn("/depth shallow")
    server.talk.turn("so long")
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert "depth" not in server.bodies[0]
    assert server.bodies[1]["depth"] == "shallow"
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]  # type: ignore[attr-defined]
    printed = server.out.getvalue()
    assert "Hello\n[in 12 · out 3 · " in printed
    assert "depth middle]" in printed


def test_an_image_goes_with_the_next_message_only(tmp_path: Path) -> None:
    file = tmp_path / "a fish.png"
    file.write_bytes(b"abc")
    server = Server(*[httpx.Response(200, content=stream("x")) for _ in range(2)])
    for line in (f"/image {file}", "what?", "and?"):
        server.talk.turn(line)
    first, second = (body["messages"][-1]["content"] for body in server.bodies)  # type: ignore[index]
    assert first == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}},
        {"type": "text", "text": "what?"},
    ]
    assert second == "and?"


def test_a_refused_message_is_forgotten_and_says_why() -> None:
    refusal = httpx.Response(400, json={"error": {"message": "too long"}})
    server = Server(refusal, httpx.Response(200, content=sse({"error": {"message": "died"}})))
    with pytest.raises(UsageError, match="too long"):
        server.talk.turn("hi")
    with pytest.raises(ShoalError, match="died"):
        server.talk.turn("hi")
    assert server.talk.messages == []


def test_commands() -> None:
    server = Server()
    with pytest.raises(UsageError, match="did you mean '/depth'"):
        server.talk.turn("/dept full")
    server.talk.messages.append({"role": "user", "content": "x"})
    server.talk.turn("/new")
    assert server.talk.messages == []
    server.talk.turn("/quit")
    assert server.talk.over


@pytest.mark.parametrize("path", ["missing.png", "notes.txt", ""])
def test_a_bad_image_path(path: str) -> None:
    with pytest.raises(UsageError):
        data_url(path)


def test_figures_of_a_stopped_answer_claim_nothing() -> None:
    assert figures(None, 0.0, None, 1.5) == "[1.50 s]"
    assert figures(None, 0.0, 0.5, 1.5) == "[first 0.50 s]"
    assert figures(USAGE, 0.0, 0.5, 1.5) == "[in 12 · out 3 · 2 tok/s · first 0.50 s · depth middle]"


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="shoal serve"):
        chat("http://127.0.0.1:9/v1")
