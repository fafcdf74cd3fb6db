"""What requests need before an engine: so much at once, in turns by payer, and nothing for who has left."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from typing import Any

import pytest
from starlette.requests import Request

from shoal.api.access import Access
from shoal.api.bodies import TokenizeRequest
from shoal.api.client import ClientGone
from shoal.api.entry import Entry
from shoal.api.limits import Limits
from shoal.api.middleware import Present
from shoal.api.served import ServedModel
from shoal.api.service import SHORT_BODY, Hosted, Service
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio


class Client:
    """Of one request, whose body was read."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def test_payers_take_turns_and_who_leaves_costs_nothing() -> None:
    entry, go_on, order = Entry(1), threading.Event(), list[str]()
    clients: dict[str, Client] = {}

    def start(name: str, payer: str, wait: bool = False) -> asyncio.Task[str]:
        def work() -> str:
            assert not wait or go_on.wait(60)
            order.append(name)
            return name

        clients[name] = Client()
        return asyncio.create_task(entry.run(payer, "", clients[name].receive, work))

    first = start("first", "a", wait=True)
    many = [start(f"a{i}", "a") for i in range(4)]
    other = start("b0", "b")
    await asyncio.sleep(0.05)
    clients["a1"].left.set()
    with pytest.raises(ClientGone):
        await many[1]
    many[2].cancel()
    go_on.set()
    assert [await first, await many[0], await other, await many[3]] == ["first", "a0", "b0", "a3"]
    assert order == ["first", "a0", "b0", "a3"]
    assert await start("last", "a") == "last"


async def through(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an app behind `Present` hears of a connection that brings `messages`, and then nothing."""
    coming, heard = asyncio.Queue[dict[str, Any]](), list[dict[str, Any]]()
    for message in messages:
        coming.put_nowait(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            try:
                heard.append(await asyncio.wait_for(receive(), 0.05))
            except TimeoutError:
                return

    async def send(message: Any) -> None:
        raise AssertionError("nothing is answered")

    await Present(app)({"type": "http"}, coming.get, send)
    return heard


async def test_a_request_whose_client_has_left_does_not_pass_and_every_other_does_as_it_came() -> None:
    whole = {"type": "http.request", "body": b"{}", "more_body": False}
    left = {"type": "http.disconnect"}
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {**whole, "body": b"}"}]
    assert await through([whole]) == [whole]
    assert await through(parts) == parts
    assert await through([*parts, left]) == [*parts, left]  # it has been sent for a while: who knows when it left
    assert await through([whole, left]) == []
    assert await through([left]) == []


async def test_long_bodies_hold_up_no_short_ones(served: ServedModel, engine: Scripted) -> None:
    """Two that take long are being encoded, and two wait behind them."""
    service, go_on = Service([Hosted(served, engine)], Limits()), threading.Event()

    async def asked(body: bytes, work: Any) -> Any:
        coming, client = asyncio.Queue[dict[str, Any]](), Client()
        coming.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def receive() -> Any:
            return await (coming.get() if not coming.empty() else client.receive())

        scope = {"type": "http", "method": "POST", "path": "/", "client": None, "state": {"access": Access("", "", "")}}
        request = Request({**scope, "headers": [(b"content-type", b"application/json")]}, receive)
        await service.read_body(request, TokenizeRequest)
        return await service.prepared(request, work)

    long = json.dumps({"prompt": "x" * SHORT_BODY}).encode()
    waiting = [asyncio.create_task(asked(long, partial(go_on.wait, 60))) for _ in range(4)]
    await asyncio.sleep(0.1)
    assert await asyncio.wait_for(asked(b'{"prompt": "x"}', lambda: 7), 60) == 7
    assert not any(task.done() for task in waiting)
    go_on.set()
    assert await asyncio.gather(*waiting) == [True] * 4


async def test_a_request_whose_body_does_not_come_passes_and_is_told_so_behind() -> None:
    """What bounds the wait for a body is behind the proxy: a client that says nothing more would be waited for without end."""
    said, heard = asyncio.Event(), list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        await said.wait()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.05)
        said.set()
        heard.append(await receive())

    await asyncio.wait_for(Present(app, seconds=0.05)({"type": "http"}, receive, None), 60)  # type: ignore[arg-type]
    assert heard == [{"type": "http.request", "body": b"{}", "more_body": False}]
