"""Requests that a batch asks of the app itself: they take the routes that live ones take, with no socket between.

Notable: what a live request has of `middleware.Gate` it has here: an id, its key and the key's limits, a line in the log. So
there is one place that checks, runs and counts a call, whoever asks.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.access import Access, told
from shoal.api.auth import Key
from shoal.engine.events import LATER

Failed = Callable[[Exception, Access], ASGIApp]

AGAIN = (429, 503)  # what is answered with these is asked again
RETRIED = {"deadline_exceeded", "generation_failed"}  # and what ends with one of these codes, `TRIES` times in all
TRIES = 3
LIVE_SHARE = 0.5  # of a key's limits, which its batches leave to live requests
PAUSE_SECONDS, MOST_PAUSE = 0.5, 30.0
DAY = 86400.0
PRIORITY = 2 * LATER  # behind what watches a version: re-runs and shadows


class Open:
    """ASGI middleware, the innermost, around the routes: gives what it is around to `take`, to be called without what stands
    before it."""

    def __init__(self, app: ASGIApp, take: Callable[[ASGIApp], None]) -> None:
        self._app = app
        take(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class Reply:
    """What a request was answered. `body` is JSON."""

    status: int
    request_id: str
    body: bytes
    unused: list[str]
    retry_after: float  # seconds; 0: it was not said


class Inside:
    """Asks the app behind `Open`."""

    def __init__(self, owner: object, failed: Failed) -> None:
        """`owner` is the app as the routes know it; `failed` makes an answer of an error."""
        self._owner, self._failed = owner, failed
        self._app: ASGIApp | None = None

    def take(self, app: ASGIApp) -> None:
        """The app to ask."""
        self._app = app

    async def ask(
        self,
        path: str,
        body: bytes,
        *,
        whose: Callable[[], Key | None] = lambda: None,
        batch: str = "",
        end: float = math.inf,
        waits: Collection[int] = AGAIN,
    ) -> Reply:
        """The answer to a POST of `body` for the key that `whose` gives, at low priority and until `end` (Unix time): where
        there is no room, or half of the key's limits is used, it waits and asks again. `batch` is who asks,
        `waits` are the statuses that are asked again. Raises what `whose` does."""
        tries = 0
        pause = PAUSE_SECONDS
        while True:
            key = whose()
            wait = 0.0 if key is None else key.spare(LIVE_SHARE)
            if wait > 0:
                await asyncio.sleep(min(MOST_PAUSE, wait))
                continue
            reply = await self._once(path, body, key, batch, max(1.0, min(DAY, end - time.time())))
            tries += 1
            again = reply.status in waits or (tries < TRIES and _code(reply) in RETRIED)
            if not again:
                return reply
            await asyncio.sleep(min(MOST_PAUSE, max(reply.retry_after, pause)))
            pause *= 2

    async def _once(self, path: str, body: bytes, key: Key | None, batch: str, seconds: float) -> Reply:
        assert self._app is not None, "the app has been started"
        access = Access(uuid.uuid4().hex, "POST", path, key=key, priority=PRIORITY, seconds_left=seconds)
        access.facts["batch"] = batch
        sent = _Sent()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
            "client": (batch, 0), "server": None, "state": {"access": access}, "app": self._owner,
        }  # fmt: skip
        with told(access, {}):
            try:
                if key is not None:
                    await key.admitted()
                    access.admitted = True
                await self._app(scope, _receive(body), sent)
            except Exception as error:
                sent = _Sent()
                await self._failed(error, access)(scope, _receive(b""), sent)
            finally:
                if access.admitted and key is not None:
                    key.leave()
            access.answered(sent.status)
            access.route = path
        return Reply(sent.status, access.id, b"".join(sent.parts), access.unused, sent.retry_after)


class _Sent:
    """What an app sends."""

    def __init__(self) -> None:
        self.status, self.parts, self.retry_after = 500, list[bytes](), 0.0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = dict(message.get("headers", ())).get(b"retry-after", b"0").decode("latin-1")
            self.retry_after = float(given) if given.isdecimal() else 0.0
        elif message["type"] == "http.response.body":
            self.parts.append(message.get("body", b""))


def _receive(body: bytes) -> Receive:
    """Gives `body`, and then nothing for ever: who asks never leaves, but is cancelled."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            await asyncio.Event().wait()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _code(reply: Reply) -> str | None:
    if reply.status < 400:
        return None
    try:
        return str(json.loads(reply.body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return None
