"""`shoal bench serve`: that the engine's part of a first token is the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks import serve
from shoal import Model
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.engine import Engine
from shoal.engine.front import AsyncEngine
from shoal.errors import ResourceError
from tests.serving import in_a_thread


@pytest.fixture(scope="module")
def bench() -> Iterator[serve.Bench]:
    model = Model.from_preset("test", seed=3)
    engine = AsyncEngine(Engine(model, max_batch=2), backlog=8)
    app = build_app([Hosted(ServedModel("bench", model.config, model.tokenizer, model.chat_template), engine)])
    with in_a_thread(app, [engine]) as thread:
        yield serve.Bench(Path(), int(thread.url.rpartition(":")[2]), 4, 1)


@pytest.mark.drill
def test_the_engine_s_part_of_a_first_token_is_some_and_less_than_all(
    bench: serve.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SINGLE", 2)
    told = serve._latency(bench)
    assert told["requests"] == 2
    assert 0 < told["engine_ms"] < told["http_ms"] and 0 < told["added_ms"] < told["http_ms"]


def test_who_else_asks_the_service_that_is_measured_is_noticed(bench: serve.Bench) -> None:
    async def measured() -> None:
        before = await serve._counted(bench, 0)
        for _ in range(2):
            httpx.post(f"{bench.url}/v1/completions", json=bench.body(1, 1), timeout=30).raise_for_status()
        await asyncio.sleep(1.1)  # what engines say is up to a second old
        await serve._counted(bench, before[0] + 1)

    with pytest.raises(ResourceError, match="let nobody else ask it"):
        asyncio.run(measured())
