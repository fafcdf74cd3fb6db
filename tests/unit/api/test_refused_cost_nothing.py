"""A request that is refused takes nothing of its key's minute; and bodies are in memory up to a sum."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from shoal.api.access import FREE
from shoal.api.auth import ApiKeys
from shoal.api.limits import Limits
from shoal.engine.events import Finished
from shoal.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError

pytestmark = pytest.mark.anyio

Connect = Callable[..., httpx.AsyncClient]

JSON = {"content-type": "application/json"}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi", "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/embeddings": {"input": "hi"},
}
LIMITS = Limits(body_bytes=10_000)
ENGINE = {400: ContextLengthError("long"), 429: QueueFullError("full"), 503: EngineDeadError("dead")}


def left(reply: httpx.Response) -> tuple[int, int]:
    return tuple(int(reply.headers[f"x-ratelimit-remaining-{what}"]) for what in ("requests", "tokens"))  # type: ignore[return-value]


@pytest.mark.parametrize("path", PATHS)
async def test_no_refusal_takes_anything_of_a_minute(connect: Connect, engine: Any, path: str) -> None:
    keys = ApiKeys(["k requests=9 tokens=999"], clock=lambda: 100.0)
    http = connect(api_keys=keys, limits=LIMITS, headers={"Authorization": "Bearer k"})
    whole = {"model": "fish", **PATHS[path]}
    replies = [
        await http.post(path, content=b"{", headers=JSON),
        await http.post(path, json={**whole, "no_such_field": 1}),
        await http.post(path, content=b" " * 20_000, headers=JSON),
        await http.post(path, content=json.dumps(whole), headers={"content-type": "text/plain"}),
    ]
    for error in ENGINE.values():
        engine.raises = error
        replies.append(await http.post(path, json=whole))
    assert {reply.status_code for reply in replies} == set(FREE)
    assert {left(reply) for reply in replies} == {(9, 999)}, "and its headers say so"
    engine.raises = None
    requests, tokens = left(await http.post(path, json=whole))
    assert requests == 8 and tokens < 999


@pytest.mark.parametrize("error", [RequestError("a grammar that cannot be followed"), EngineDeadError("dead")])
async def test_what_was_written_before_a_client_s_own_fault_is_paid(connect: Connect, engine: Any, error: Any) -> None:
    """Else a grammar that is stuck after thousands of tokens would have all of them for nothing."""
    engine.ends = Finished("", "error", completion_tokens=17, error=error)
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        keys = ApiKeys(["k requests=9 tokens=999"], clock=lambda: 100.0)
        http = connect(api_keys=keys, headers={"Authorization": "Bearer k"})
        reply = await http.post(path, json={"model": "fish", **PATHS[path]})
        assert reply.status_code == error.status
        requests, tokens = left(reply)
        assert (requests, tokens < 999) == ((8, True) if error.status == 400 else (9, False))


async def test_who_has_no_key_or_no_minute_left_takes_nothing_of_others(connect: Connect) -> None:
    http = connect(api_keys=ApiKeys(["k requests=1"], clock=lambda: 100.0))
    path, body = "/v1/completions", {"model": "fish", "prompt": "hi"}
    codes = []
    for key in ("wrong", "k", "k", "k"):
        codes.append((await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})).status_code)
    assert codes == [401, 200, 429, 429]


async def test_names_that_are_tried_count(connect: Connect) -> None:
    """Else what exists could be found out by trying."""
    http = connect(api_keys=ApiKeys(["k requests=2"], clock=lambda: 1.0), headers={"Authorization": "Bearer k"})
    assert [(await http.get(f"/v1/models/{name}")).status_code for name in "abc"] == [404, 404, 429]


async def test_bodies_are_in_memory_up_to_a_sum_and_others_come_later(connect: Connect) -> None:
    http = connect(limits=Limits(body_bytes=10_000, bodies_bytes=25_000))
    go, waiting = asyncio.Event(), 0

    async def slow(body: bytes) -> AsyncIterator[bytes]:
        nonlocal waiting
        yield body[:9000]
        waiting += 1
        await go.wait()
        yield body[9000:]

    body = json.dumps({"model": "fish", "prompt": "hi"}).encode().ljust(9500)
    begun = [asyncio.create_task(http.post("/v1/completions", content=slow(body), headers=JSON)) for _ in range(2)]
    while waiting < 2:
        await asyncio.sleep(0.01)
    refused = await http.post("/v1/completions", content=body, headers=JSON)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    short = await http.post("/v1/completions", json={"model": "fish", "prompt": "hi"})
    assert short.status_code == 200, "who sends little is answered"
    go.set()
    assert [(await reply).status_code for reply in begun] == [200, 200]
    assert (await http.post("/v1/completions", content=body, headers=JSON)).status_code == 200
