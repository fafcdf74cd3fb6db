"""What requests need before an engine has them (a body parsed, a chat encoded), so much of it at once, in turns by payer.

An engine's turns begin where it sees a request. A key that sends many, or long ones, or leaves before it is answered, would
have the cores before that, and everybody would wait behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from shoal.api.client import must_be_there, while_connected
from shoal.engine.turns import Turns

T = TypeVar("T")


class Entry:
    """Work in threads, of `most` requests at once; who waits for it does so by turns of payers, and of each of its clients."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: Turns[asyncio.Future[None]] = Turns()

    async def run(self, payer: str, client: str, receive: Receive, work: Callable[[], T]) -> T:
        """What `work` gives, in a thread. Raises ClientGone for a client that has left, before or while it waits: nothing is
        done for it. Its body must have been read (`while_connected`)."""
        await must_be_there(receive)
        if self._free:
            self._free -= 1
        else:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.put(mine, payer, client)
            try:
                await while_connected(receive, mine)
            except BaseException:
                if mine.done() and not mine.cancelled():
                    self._leave()  # it had just been let in
                raise
        try:
            return await run_in_threadpool(work)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Lets in the next that still waits."""
        while self._waiting:
            following = self._waiting.take()
            if not following.done():
                following.set_result(None)
                return
        self._free += 1
