"""Clients that leave at once: what comes through the door of theirs, and of others."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from shoal.api.door import LEFT_SECONDS, MANY, MOST, Door

pytestmark = pytest.mark.anyio

WHOLE = {"type": "http.request", "body": b"{}", "more_body": False}
LEFT = {"type": "http.disconnect"}
UNKIND, OTHER = "sk-unkind", "sk-other"
STEP = 0.01  # seconds between two requests


class Service:
    """A door with an app behind it, and the time of both."""

    def __init__(self) -> None:
        self.now, self.inside, self.answered = 0.0, 0, 0
        self.waited: list[float] = []
        self.door = Door(self._app, clock=lambda: self.now, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        assert await receive() == WHOLE
        if scope["stays"] < math.inf:
            if scope["stays"] > LEFT_SECONDS:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            assert await receive() == LEFT
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"text"})
        self.answered += 1
        assert await receive() == LEFT  # as uvicorn says where an answer has ended

    async def ask(self, key: str | None, *, stays: float = math.inf, address: str = "10.0.0.1") -> None:
        """One request, whose client leaves after `stays` seconds; the next comes `STEP` after it came."""
        answered, body, came, leaves = asyncio.Event(), [WHOLE], self.now, self.now + stays

        async def receive() -> Any:
            if body and self.now < leaves:
                return body.pop()
            if stays == math.inf:
                await answered.wait()
            self.now = self.now if stays == math.inf else max(self.now, leaves)
            return LEFT

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                answered.set()

        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        await self.door({"type": "http", "headers": headers, "client": (address, 1), "stays": stays}, receive, send)
        self.now = came + STEP


async def test_who_leaves_at_once_again_and_again_does_not_come_in_and_others_do_not_wait() -> None:
    service = Service()
    for _ in range(500):
        await service.ask(UNKIND, stays=0.001)
    inside = service.inside
    assert MANY <= inside <= 2 * MANY and set(service.waited) == {LEFT_SECONDS} and len(service.waited) == 500 - inside
    await service.ask(OTHER)
    await service.ask(None, address="10.0.0.2")
    assert service.answered == 2 and len(service.waited) == 500 - inside


async def test_who_waits_and_is_still_there_is_answered_and_waits_no_more_when_it_stays() -> None:
    service = Service()
    for _ in range(100):
        await service.ask(UNKIND, stays=0.001)
    assert service.waited
    for _ in range(100):
        await service.ask(UNKIND)
    assert service.answered == 100
    before = len(service.waited)
    await service.ask(UNKIND)
    assert len(service.waited) == before


async def test_who_leaves_part_of_its_requests_or_answers_that_have_begun_never_waits() -> None:
    service = Service()
    for number in range(2000):
        await service.ask(UNKIND, stays=math.inf if number % 10 >= 10 * MOST - 1 else 0.001)
        await service.ask(OTHER, stays=LEFT_SECONDS + 0.001)
    assert service.waited == []
