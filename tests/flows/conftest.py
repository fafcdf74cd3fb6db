"""A running service for the flows over HTTP: the real engine on random weights of the `test` preset, a real socket, no Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from shoal import Engine, Model
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.limits import Limits
from shoal.api.served import ServedModel
from shoal.api.server import serving
from shoal.api.service import Hosted
from shoal.engine.front import AsyncEngine

KEY = "a-key-for-this-test"


@dataclass
class Service:
    url: str
    model: Model
    engine: AsyncEngine
    loop: asyncio.AbstractEventLoop

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def run(self, work: Any) -> Any:
        """The result of a coroutine of the engine, in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def stats(self) -> dict[str, float]:
        stats: dict[str, float] = self.run(self.engine.stats())
        return stats

    def until_idle(self, seconds: float = 5.0) -> None:
        """Waits until no request holds anything; the units are then back, or `check_integrity` kills the engine."""
        end = time.monotonic() + seconds
        while (stats := self.stats())["num_requests_running"] + stats["num_requests_waiting"]:
            assert time.monotonic() < end, stats
            time.sleep(0.01)
        assert self.stats()["kv_cache_usage_perc"] == 0

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)


@contextmanager
def running(model: Model, *, backlog: int = 256, limits: Limits | None = None, **options: Any) -> Iterator[Service]:
    """A service in a thread of its own, over an engine with `options`."""
    served = ServedModel("fish", model.config, model.tokenizer, model.chat_template)
    started: list[Service] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        engine = AsyncEngine(Engine(model, **options), backlog=backlog)
        app = build_app([Hosted(served, engine)], api_keys=ApiKeys([KEY]), limits=limits or Limits(seconds=60))
        async with serving(app) as server:
            started.append(Service(server.url, model, engine, asyncio.get_running_loop()))
            ready.set()
            await asyncio.to_thread(stop.wait)
        await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield started[0]
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    with running(Model.from_preset("test", seed=3), max_queue=4, max_batch=4, max_batch_tokens=64) as started:
        yield started


@pytest.fixture(scope="package")
def client(service: Service) -> openai.OpenAI:
    return service.openai()
