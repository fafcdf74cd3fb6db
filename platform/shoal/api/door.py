"""What a caller's next requests wait for when nearly all of its last ones were left at once.

A request that is left after some milliseconds costs next to nothing where it is accepted, and a hundred times that behind it.
Clients that leave and come again have a process busy with requests that nobody wants, and everybody else waits. So whoever
sends very many of them waits at the door as long as they stay; who is still there then is let in. Others are not touched.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.middleware import Present

# a request that is left within them, or before its answer begins, was left at once; and what the door costs
LEFT_SECONDS = 0.1
MEMORY_SECONDS = 1.0  # in which what was counted fades to a third
MANY = 20.0  # of a caller's requests that were left at once, counted so: of fewer there is little to win
MOST = 0.75  # and their share of all that it sent: who cancels as one types comes to less
CALLERS = 4096  # remembered


@dataclass
class _Caller:
    """What one caller sent lately, each request counted less the longer it is ago."""

    sent: float = 0.0
    left: float = 0.0
    at: float = 0.0

    def fade(self, now: float) -> None:
        kept = math.exp((self.at - now) / MEMORY_SECONDS)
        self.sent, self.left, self.at = self.sent * kept, self.left * kept, now

    @property
    def waits(self) -> bool:
        return self.left >= MANY and self.left >= MOST * self.sent


class Door:
    """ASGI middleware before all that a request costs. A caller is a key, good or not, or else an address."""

    def __init__(
        self,
        app: ASGIApp,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._app, self._present, self._clock, self._sleep = app, Present(app), clock, sleep
        self._callers: OrderedDict[int, _Caller] = OrderedDict()  # who came last is last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        came = self._clock()
        caller = self._caller(scope, came)
        caller.sent += 1
        wait = LEFT_SECONDS if caller.waits else 0.0
        began = ended = False  # the answer; and the request

        async def heard() -> Message:
            nonlocal ended
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                ended, now = True, self._clock()
                if not began or now - came <= wait + LEFT_SECONDS:
                    caller.fade(now)
                    caller.left += 1
            return message

        async def told(message: Message) -> None:
            nonlocal began, ended
            began = True
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        if wait:
            await self._sleep(wait)
        await (self._present if wait else self._app)(scope, heard, told)

    def _caller(self, scope: Scope, now: float) -> _Caller:
        named = [value for name, value in scope["headers"] if name in (b"authorization", b"x-api-key")]
        known = hash(tuple(named) or (scope.get("client") or ("",))[0])
        caller = self._callers.setdefault(known, _Caller(at=now))
        self._callers.move_to_end(known)
        if len(self._callers) > CALLERS:
            self._callers.popitem(last=False)
        caller.fade(now)
        return caller
