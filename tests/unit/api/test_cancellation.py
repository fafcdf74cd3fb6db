"""A client that leaves ends its engine requests, whenever it leaves. Raw ASGI, so that every moment can be chosen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from shoal.api.app import build_app
from shoal.api.client import gather, together
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Request
from shoal.inputs.chat import Encoded

pytestmark = pytest.mark.anyio


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
    async with asyncio.timeout(20):
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
    await asyncio.wait_for(caller.task, 20)
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


async def test_closing_gather_closes_every_request(engine: Any) -> None:
    engine.hangs_after = 1
    events = gather(engine, [Request(Encoded([i])) for i in (10, 11)])
    assert {(await anext(events))[0] for _ in range(2)} == {0, 1}
    await events.aclose()
    assert engine.open == 0


async def test_what_is_ready_at_once_goes_together_and_the_rest_is_not_waited_for() -> None:
    go, closed = asyncio.Event(), []

    async def chunks(error: Exception | None = None) -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            yield b"b"
            await go.wait()
            yield b"c"
            if error:
                raise error
        finally:
            closed.append(True)

    pieces = together(chunks())
    assert await asyncio.wait_for(anext(pieces), 5) == b"ab"
    go.set()
    assert [piece async for piece in pieces] == [b"c"]
    failing = together(chunks(ValueError("lost")))
    assert await anext(failing) == b"abc"
    with pytest.raises(ValueError, match="lost"):
        await anext(failing)
    go.clear()
    left = together(chunks())
    await anext(left)
    await left.aclose()
    assert len(closed) == 3
