"""What engines say of themselves: asked at most once a second, told at once where it is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from shoal.api import fresh
from shoal.api.fresh import EVERY_SECONDS, Fresh
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(fresh, "PATIENCE_SECONDS", 0.0)
    return [100.0]


async def all_that_can_run() -> None:
    """What waits for nothing but its turn has had it."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_second_has_one_question_however_many_ask(now: list[float]) -> None:
    asked: list[int] = []

    async def ask() -> int:
        asked.append(len(asked))
        await asyncio.sleep(0)
        return len(asked)

    known = Fresh(ask, lambda: now[0])
    assert await asyncio.gather(*(known.get() for _ in range(50))) == [1] * 50
    now[0] += EVERY_SECONDS * 0.9
    assert await known.get() == 1
    now[0] += EVERY_SECONDS
    await known.get()
    await all_that_can_run()
    assert await known.get() == 2 and len(asked) == 2


async def test_callers_of_metrics_models_and_probes_ask_an_engine_once(
    connect: Callable[..., httpx.AsyncClient], engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"stats": 0, "check_health": 0}
    for name in asked:
        before = getattr(engine, name)

        async def counted(name: str = name, before: Callable[[], object] = before) -> object:
            asked[name] += 1
            return await before()  # type: ignore[misc]

        monkeypatch.setattr(engine, name, counted)
    monkeypatch.setattr(fresh, "EVERY_SECONDS", 3600.0)
    http = connect()
    paths = ["/metrics", "/v1/models", "/v1/models/fish", "/health", "/ready"] * 8
    replies = await asyncio.gather(*(http.get(path) for path in paths))
    assert {reply.status_code for reply in replies} == {200}
    assert asked == {"stats": 1, "check_health": 1}
