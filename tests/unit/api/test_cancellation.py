"""A client that leaves ends its engine requests, whenever it leaves. Raw ASGI, so that every moment can be chosen."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Finished
from shoal.errors import GenerationError

pytestmark = pytest.mark.anyio
NEW = re.compile(rb'"id":"chatcmpl-[0-9a-f]+"|"created":\d+')  # of each answer anew


class Caller:
    """One POST to the app by a client that leaves when `gone` is set."""

    def __init__(self, app: Any, body: dict[str, Any]) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._body: bytes | None = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": headers, "scheme": "http", "server": ("t", 80), "client": ("c", 1), "root_path": "",
            "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.4"},
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 3])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_cancels(served: ServedModel, engine: Any, stream: bool, tokens_before: int, n: int) -> None:
    engine.hangs_after = tokens_before
    body = {"model": "fish", "messages": [{"role": "user", "content": "x"}], "stream": stream, "n": n}
    caller = Caller(build_app([Hosted(served, engine)]), body)
    await until(lambda: engine.open == n and (len(caller.sent) > 1 or not stream or not tokens_before))
    caller.gone.set()
    await asyncio.wait_for(caller.task, 60)
    assert engine.open == 0
    if not stream or not tokens_before:
        assert all(message.get("status", 499) == 499 for message in caller.sent)


async def test_a_server_that_stops_cancels_too(served: ServedModel, engine: Any) -> None:
    engine.hangs_after = 2
    body = {"model": "fish", "messages": [{"role": "user", "content": "x"}], "stream": True}
    caller = Caller(build_app([Hosted(served, engine)]), body)
    await until(lambda: engine.open == 1 and b"".join(m.get("body", b"") for m in caller.sent).count(b"data: ") >= 3)
    caller.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller.task
    assert engine.open == 0


@pytest.mark.parametrize(("error", "last"), [(None, [3, 1]), (GenerationError("the model made NaN"), [2, 1])])
async def test_what_is_ready_at_once_is_sent_at_once_in_the_same_chunks(
    served: ServedModel, engine: Any, error: Exception | None, last: list[int]
) -> None:
    """18 tokens, of which one is half a character, in lists of eight; the third has the end, or the error: then what came
    before it is sent before it."""
    body = {"model": "fish", "messages": [{"role": "user", "content": "x"}], "stream": True}
    if error is not None:
        engine.ends = Finished("x", "error", error=error)

    async def sent() -> list[bytes]:
        caller = Caller(build_app([Hosted(served, engine)]), body)
        await asyncio.wait_for(caller.task, 60)
        return [data for message in caller.sent if (data := NEW.sub(b"", message.get("body", b"")))]

    one_by_one, engine.at_once = await sent(), 8
    joined = await sent()
    assert b"".join(joined) == b"".join(one_by_one)
    assert [data.count(b"data: ") for data in joined] == [9, 7, *last]


async def test_who_does_not_read_the_end_of_a_stream_holds_no_place(
    served: ServedModel, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits with each part for what went before to be read, with the last one too."""
    monkeypatch.setattr("shoal.api.sent.SEND_SECONDS", 0.2)

    class Stalled(Caller):
        async def _send(self, message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await asyncio.Event().wait()
            await super()._send(message)

    body = {"model": "fish", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    caller = Stalled(build_app([Hosted(served, engine)]), body)
    await asyncio.wait_for(caller.task, 60)
    assert b"[DONE]" in caller.sent[-1]["body"]
