"""How a service ends: it takes no new work, and what runs has its time to end.

A probe and a client are both told: /ready is 503 from then on, and so is everything else that would be work. What needs no key
(health, metrics, the pages) is answered to the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.api.access import Access
from shoal.errors import EngineDeadError

STREAM_SECONDS = 60.0  # that a service which is stopped gives to the answers that run
POLL_SECONDS = 0.05
READY = "/ready"


class Drain:
    """Counts the requests of one app that are work, and refuses them once it is closed."""

    def __init__(self, open_paths: tuple[str, ...]) -> None:
        self._open_paths = open_paths
        self.running = 0  # requests that are work
        self.closed = False

    def close(self) -> None:
        """From now on no work is taken."""
        self.closed = True

    async def ended(self, seconds: float) -> bool:
        """Waits until no work is left, `seconds` at most; false where some is."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self.running and loop.time() < until:
            await asyncio.sleep(POLL_SECONDS)
        return not self.running

    def guard(self, app: ASGIApp, failed: Callable[[Exception, Access], ASGIApp]) -> ASGIApp:
        """ASGI middleware around `app`, which answers with what `failed` makes of an error."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            work = not any(path == open_ or path.startswith(open_ + "/") for open_ in self._open_paths)
            if self.closed and (work or path == READY):
                refusal = EngineDeadError(
                    "the service is stopping", do="send the request to another, or try again later"
                )
                await failed(refusal, scope["state"]["access"])(scope, receive, send)
                return
            self.running += work
            try:
                await app(scope, receive, send)
            finally:
                self.running -= work

        return guarded
