"""What runs beside an app, for as long as the app does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI


def beside(
    app: FastAPI, work: Callable[[], Coroutine[Any, Any, None]], end: Callable[[asyncio.Task[None]], object]
) -> None:
    """Start `work` as a task when `app` has started; when it stops, call `end` with the task and wait for it. What was put
    beside it before starts earlier and ends later."""
    before = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with before(running) as state:
            task = asyncio.create_task(work())
            try:
                yield state
            finally:
                end(task)
                await asyncio.wait({task})

    app.router.lifespan_context = lifespan
