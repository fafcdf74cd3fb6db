"""A tolerance over HTTP: every answer says what it lost, or that nobody looked. A real engine, and a scripted one that measures
nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shoal import Engine
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.front import AsyncEngine
from tests.unit.engine.lively import lively
from tests.unit.engine.test_second_look import model as looked_at_again
from tests.unit.engine.test_second_look import to

pytestmark = pytest.mark.anyio

ASKED = {"model": "fish", "max_tokens": 12, "temperature": 0, "seed": 1, "quality_tolerance": 2.0}
SAID = [{"role": "user", "content": "What swims?"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "What swims?"},
    "/v1/messages": {"messages": SAID},
    "/v1/responses": {"input": "What swims?", "max_output_tokens": 12},
}


@pytest.fixture
async def measured() -> AsyncIterator[httpx.AsyncClient]:
    model = lively()
    engine = AsyncEngine(Engine(model, units=400, speculative_max_batch=8))
    app = build_app([Hosted(ServedModel("fish", model.config, model.tokenizer), engine)])
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield client
    finally:
        await engine.close()


def body(route: str, **more: Any) -> dict[str, Any]:
    asked = {name: value for name, value in ASKED.items() if name != "max_tokens" or "responses" not in route}
    asked = {
        name: value for name, value in asked.items() if name != "seed" or route not in ("/v1/messages", "/v1/responses")
    }
    return {**asked, **ROUTES[route], **more}


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    """What a stream sent, but for its `[DONE]`."""
    assert reply.status_code == 200, reply.text
    return [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("depth", ["auto", "full", "middle"])
async def test_every_route_says_what_an_answer_lost(measured: httpx.AsyncClient, route: str, depth: str) -> None:
    reply = await measured.post(route, json=body(route, depth=depth))
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    assert usage["depth"] == ("full" if depth == "auto" else depth)
    assert usage["quality"]["allowed"] == 2.0 and 0 <= usage["quality"]["spent"] <= 2.0
    assert 0 < usage["mean_depth"] <= (2 if depth == "middle" else 4)
    plain = (await measured.post(route, json=body(route, depth=depth, quality_tolerance=None))).json()["usage"]
    assert "quality" not in plain and "mean_depth" not in plain


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("depth", ["auto", "full", "middle"])
async def test_every_stream_says_at_its_end_what_the_whole_answer_says(
    measured: httpx.AsyncClient, route: str, depth: str
) -> None:
    options = {"stream_options": {"include_usage": True}} if "completions" in route else {}
    whole = (await measured.post(route, json=body(route, depth=depth))).json()["usage"]
    sent = events(await measured.post(route, json=body(route, depth=depth, stream=True, **options)))
    ends = {"/v1/messages": "message_delta", "/v1/responses": "response.incomplete"}
    (end,) = [event for event in sent if event.get("type") == ends[route]] if route in ends else sent[-1:]
    usage = end["response"]["usage"] if route == "/v1/responses" else end["usage"]
    assert 0 < usage["quality"]["spent"] <= usage["quality"]["allowed"] == 2.0 and usage["mean_depth"] > 0
    told = ("quality", "mean_depth", "depth")
    assert {name: usage[name] for name in told} == {name: whole[name] for name in told}


# where the router decides and drafts nothing: the layers that it gives an answer, those after three tokens, and what is known
DECIDED: list[tuple[int, int, str, float | None]] = [
    (4, 4, "full", 0.0),
    (2, 2, "middle", None),
    (1, 4, "full", None),  # its first tokens were another exit's
]


@pytest.mark.parametrize(("first", "later", "depth", "spent"), DECIDED)
@pytest.mark.parametrize("n", [1, 2])
async def test_what_the_router_gives_full_depth_lost_nothing_and_of_earlier_exits_nobody_knows(
    first: int, later: int, depth: str, spent: float | None, n: int
) -> None:
    model = looked_at_again(to(first), to(later), 3)
    engine = AsyncEngine(Engine(model, units=400))
    app = build_app([Hosted(ServedModel("fish", model.config, model.tokenizer), engine)])
    options = {"include_usage": True, "continuous_usage_stats": True}
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            asked = body("/v1/completions", ignore_eos=True, speculative=0, n=n, temperature=float(n > 1))
            usage = (await client.post("/v1/completions", json=asked)).json()["usage"]
            streamed = events(
                await client.post("/v1/completions", json={**asked, "stream": True, "stream_options": options})
            )
    finally:
        await engine.close()
    assert (usage["depth"], usage["quality"]) == (depth, {"spent": spent, "allowed": 2.0})
    assert streamed[-1]["usage"]["quality"] == usage["quality"]
    assert {event["usage"]["quality"]["spent"] for event in streamed} <= {spent, None}
