"""Engines of a release in this process, without Ray: one that serves, and one of a canary beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from shoal.api.trial import OnBegun, Weighed
from shoal.config import FULL
from shoal.engine.events import Event, Request
from shoal.engine.metrics import Samples
from shoal.loop.versions import Version

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine

Load = Callable[[str], "AsyncEngine"]

LOOK_SECONDS = 0.1


class Changing:
    """An engine that another can take the place of, as an `EngineClient`: streams end on the one that they began with."""

    def __init__(self, engine: AsyncEngine, label: str) -> None:
        """`label`: of the version that it serves."""
        self._engine, self._label = engine, label
        self._running: Counter[AsyncEngine] = Counter()
        self._leaving: set[asyncio.Task[None]] = set()

    async def batches(self, request: Request, on_begun: OnBegun | None = None) -> AsyncGenerator[list[Event], None]:
        engine = self._engine
        if on_begun is not None:
            on_begun(self._label)
        self._running[engine] += 1
        try:
            async with aclosing(engine.batches(request)) as lists:
                async for events in lists:
                    yield events
        finally:
            self._running[engine] -= 1

    def take(self, engine: AsyncEngine, label: str) -> None:
        """New requests get `engine`; the one before it is closed when its last stream has ended."""
        before, self._engine, self._label = self._engine, engine, label
        task = asyncio.create_task(self._leave(before))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, engine: AsyncEngine) -> None:
        while self._running[engine]:
            await asyncio.sleep(LOOK_SECONDS)
        del self._running[engine]
        await engine.close()

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int = FULL,
        *,
        payer: str = "",
        client: str = "",
        priority: int = 0,
        adapter: str = "",
        on_begun: OnBegun | None = None,
    ) -> list[list[float]]:
        engine = self._engine
        if on_begun is not None:
            on_begun(self._label)
        self._running[engine] += 1
        try:
            return await engine.embed(prompts, depth, payer=payer, client=client, priority=priority, adapter=adapter)
        finally:
            self._running[engine] -= 1

    async def load_adapter(self, directory: str) -> str:
        return await self._engine.load_adapter(directory)

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        await self._engine.keep_adapters(known, held, at)

    async def stats(self) -> Samples:
        return await self._engine.stats()

    async def info(self) -> list[dict[str, str]]:
        return await self._engine.info()

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def close(self) -> None:
        """Ends the engine that serves, and those that leave."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(self._engine.close(), *(engine.close() for engine in [*self._running]))


class Here:
    """`follow.Deploys` in this process."""

    def __init__(self, serving: Changing, load: Load) -> None:
        """`load` makes an engine of the weights in a model directory, in a thread."""
        self._serving, self._load = serving, load
        self._canary: Changing | None = None

    async def serve(self, version: Version) -> None:
        engine = await asyncio.to_thread(self._load, str(version.served))
        self._serving.take(engine, version.label)

    async def begin(self, version: Version) -> Weighed:
        self._canary = Changing(await asyncio.to_thread(self._load, str(version.served)), version.label)
        return self._canary

    async def end(self) -> None:
        canary, self._canary = self._canary, None
        if canary is not None:
            await canary.close()

    async def close(self) -> None:
        """Ends all engines."""
        await asyncio.gather(self.end(), self._serving.close())

    def weights(self, version: Version) -> str:
        return version.label
