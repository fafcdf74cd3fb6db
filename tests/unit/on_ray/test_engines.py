"""What lies between Serve and an engine, without a cluster: batching of events, and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from shoal.engine.events import Event, Finished, Token
from shoal.errors import EngineDeadError, QueueFullError, RequestError
from shoal.on_ray.clients import as_shoal_error
from shoal.on_ray.engines import batches


class Source:
    """Events on demand; remembers that it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.closed = count, error, False

    async def events(self) -> AsyncGenerator[Event, None]:
        try:
            for index in range(self.count):
                yield Token("r", index, "x")
            if self.error:
                raise self.error
            yield Finished("r", "stop")
            await asyncio.sleep(0)
        finally:
            self.closed = True


def test_events_that_wait_go_together_in_order() -> None:
    async def read() -> list[list[Event]]:
        lists = []
        async for ready in batches(Source(9).events()):
            lists.append(ready)
            await asyncio.sleep(0)
        return lists

    lists = asyncio.run(read())
    events = [event for ready in lists for event in ready]
    assert [event.token for event in events if isinstance(event, Token)] == list(range(9))
    assert isinstance(events[-1], Finished)
    assert len(lists) < len(events)


def test_an_error_comes_after_what_was_said_before_it() -> None:
    async def read() -> int:
        said = 0
        with pytest.raises(RequestError, match="no"):
            async for ready in batches(Source(3, RequestError("no")).events()):
                said += len(ready)
        return said

    assert asyncio.run(read()) == 3


def test_closing_early_closes_the_source() -> None:
    async def read() -> bool:
        source = Source(1000)
        lists = batches(source.events())
        await anext(lists)
        await lists.aclose()
        return source.closed

    assert asyncio.run(read())


def test_errors_of_ray_have_their_http_status() -> None:
    wrong = RequestError("depth", param="depth")
    assert as_shoal_error(RayTaskError("generate", "trace", wrong)) is wrong
    assert isinstance(as_shoal_error(BackPressureError(num_queued_requests=9, max_queued_requests=9)), QueueFullError)
    assert isinstance(as_shoal_error(ActorDiedError()), EngineDeadError)
    assert isinstance(as_shoal_error(RayTaskError("generate", "trace", KeyError("bug"))), EngineDeadError)
    other = ValueError("ours")
    assert as_shoal_error(other) is other
