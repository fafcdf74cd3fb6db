"""What happens to every HTTP request before a route sees it: an id, the key, the size of the body, one line in the log.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide the client's disconnect from the routes, and with it cancellation.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.auth import ApiKeys
from shoal.api.wire import BodyTooLargeError, MediaTypeError, UnauthorizedError
from shoal.errors import RequestError

log = logging.getLogger("shoal.api")

OPEN_PATHS = (
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/openapi.json",
    "/ui",
    "/favicon.ico",
)  # need no key; all else does
DISCARD_TIMES, DISCARD_SECONDS = 4, 10.0  # how much of a refused body is read, in limits, and for how long

Failed = Callable[[Exception], ASGIApp]

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Gate:
    """ASGI middleware around the whole app. Refuses with 401, 413 and 415; echoes or makes ``X-Request-Id``; answers
    with what `failed` makes of an error that no handler took."""

    def __init__(
        self, app: ASGIApp, *, keys: ApiKeys | None, body_bytes: int, failed: Failed, answer_id: bool = True
    ) -> None:
        self._app, self._keys, self._body_bytes = app, keys, body_bytes
        self._failed, self._answer_id = failed, answer_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and end of the server; there are no websockets
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # nothing was sent: the client left first

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._answer_id:
                    message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        body = _Body(receive, self._body_bytes)
        try:
            try:
                self._check(scope, headers)
                body.expect(headers.get(b"content-length"))
            except RequestError as refused:
                await body.discard()
                await self._failed(refused)(scope, receive, named)
            else:
                await self._app(scope, body.receive, named)
        except Exception as error:
            answer = self._failed(error)  # logs it
            if status == 499:
                await answer(scope, receive, named)
        finally:
            seconds = time.perf_counter() - began
            who = scope["state"].get("user")
            log.info(
                "%s %s %d %.3fs id=%s%s",
                scope["method"],
                scope["path"][:200].encode("unicode_escape").decode(),
                status,
                seconds,
                request_id,
                f" user={who!r}" if who else "",
            )

    def _open(self, path: str) -> bool:
        return any(path == open_ or path.startswith(open_ + "/") for open_ in OPEN_PATHS)

    def _check(self, scope: Scope, headers: dict[bytes, str]) -> None:
        if self._keys is not None and not self._open(scope["path"]):
            raw = headers.get(b"authorization")
            if raw is None:
                raise UnauthorizedError("no API key", do="send it as 'Authorization: Bearer KEY'")
            if not self._keys.allow(raw.encode("latin-1").decode("utf-8", "surrogateescape")):
                raise UnauthorizedError(
                    "wrong API key", do="send one of this server's keys as 'Authorization: Bearer KEY'"
                )
        coding = headers.get(b"content-encoding", "identity")
        if coding != "identity":
            raise MediaTypeError("Content-Encoding", got=coding[:40], allowed="identity: send the body uncompressed")


class _Body:
    """The request's body, counted as it arrives: its length may be unsaid, or said wrongly."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._read = receive, limit, 0

    def expect(self, content_length: str | None) -> None:
        """Raises BodyTooLargeError when the announced length is over the limit."""
        if content_length and content_length.isdecimal() and int(content_length) > self._limit:
            raise self._too_large(content_length)

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            await self.discard()
            raise self._too_large(f"more than {self._limit}")
        return message

    async def discard(self) -> None:
        """Reads on, so that a client that is still sending sees the answer instead of a broken connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while self._read <= DISCARD_TIMES * self._limit:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def _too_large(self, got: str) -> BodyTooLargeError:
        return BodyTooLargeError("the body is too large", got=f"{got} bytes", allowed=f"at most {self._limit}")
