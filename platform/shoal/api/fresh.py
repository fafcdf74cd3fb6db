"""What engines say of themselves, asked of them at most once a second, however many want to know.

Notable: nobody waits long for an answer that is known. Where engines are slow to answer, because they or this process have much
to do, their last answer is given, if it is not older than `KNOWN_SECONDS`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from shoal.errors import EngineDeadError

T = TypeVar("T")

EVERY_SECONDS = 1.0  # between two questions
PATIENCE_SECONDS = 0.5  # for a new answer, where there is one of the last `KNOWN_SECONDS`
KNOWN_SECONDS = 10.0
PROBE_SECONDS = 5.0  # for an engine to answer


class Fresh(Generic[T]):
    """The answer to one question, for askers in one event loop."""

    def __init__(self, ask: Callable[[], Awaitable[T]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._known: T | Exception | None = None
        self._asked = self._answered = -float("inf")
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> T | Exception:
        """The answer, or the error in its place: TimeoutError after `PROBE_SECONDS`."""
        if self._asking is None and self._clock() - self._asked >= EVERY_SECONDS:
            self._asked = self._clock()
            self._asking = asyncio.create_task(self._renew())
        if self._asking is not None:
            asking = self._asking  # shared by all who ask: one that leaves does not end it
            if self._clock() - self._answered <= KNOWN_SECONDS:
                await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
            else:
                await asyncio.wait({asking})
        assert self._known is not None
        return self._known

    async def _renew(self) -> None:
        known: T | Exception = EngineDeadError("the question to the engine was interrupted", do="try again")
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                known = await self._ask()
        except Exception as error:
            known = error
        finally:  # this task may be cancelled, too
            self._known, self._answered, self._asking = known, self._clock(), None
