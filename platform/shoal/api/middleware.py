"""What happens to every HTTP request before a route sees it: an id, the key and its limits, the size of the body; and after it,
one line in the log.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide the client's disconnect from the routes, and with it cancellation.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.access import Access, told
from shoal.api.auth import ApiKeys
from shoal.api.wire import BodyTooLargeError, MediaTypeError
from shoal.errors import RequestError

# need no key; all else does
OPEN_PATHS = ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/ui", "/favicon.ico")
LONGEST_ID = 128
DISCARD_TIMES, DISCARD_SECONDS = 4, 10.0  # how much of a refused body is read, in limits, and for how long

Failed = Callable[[Exception, Access], ASGIApp]

_ID = re.compile(rf"[A-Za-z0-9._:/+=-]{{1,{LONGEST_ID}}}")


class Gate:
    """ASGI middleware around the whole app. Refuses with 401, 413, 415 and 429; echoes or makes ``X-Request-Id``; answers
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
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        access = scope.setdefault("state", {})["access"] = Access(self._id(given), scope["method"], scope["path"])
        with told(access, headers):
            await self._answer(access, headers, scope, receive, send)
            access.route = getattr(scope.get("route"), "path", None)

    async def _answer(
        self, access: Access, headers: dict[bytes, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, access.status = True, message["status"]
                seconds = 0.0 if access.status == 408 else DISCARD_SECONDS  # 408: it has been waited for
                rest = [] if await body.read_out(seconds) else [(b"connection", b"close")]
                message = {**message, "headers": [*message["headers"], *self._told(access), *rest]}
            await send(message)

        body = _Body(receive, headers, self._body_bytes)
        try:
            try:
                self._check(scope, headers, access)
                body.expect()
            except RequestError as refused:
                await self._failed(refused, access)(scope, receive, named)
            else:
                await self._app(scope, body.receive, named)
        except Exception as error:
            answer = self._failed(error, access)  # logs it
            if not started:
                await answer(scope, receive, named)

    def _id(self, given: str) -> str:
        if not self._answer_id:  # a proxy answers with whatever it was given, so that is what the log says, too
            return given[:LONGEST_ID]
        return given if _ID.fullmatch(given) else uuid.uuid4().hex

    def _told(self, access: Access) -> list[tuple[bytes, bytes]]:
        """The headers that every answer has, under the names that OpenAI's clients read."""
        told = {"openai-processing-ms": str(round(access.seconds * 1000))}
        told |= {"x-request-id": access.id} if self._answer_id else {}
        told |= access.key.headers() if access.key is not None else {}
        return [(name.encode(), value.encode()) for name, value in told.items()]

    def _open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where a Serve config or a proxy puts the app
        return any(path == open_ or path.startswith(open_ + "/") for open_ in OPEN_PATHS)

    def _check(self, scope: Scope, headers: dict[bytes, str], access: Access) -> None:
        if self._keys is not None and not self._open(scope):
            raw = headers.get(b"authorization")
            given = None if raw is None else raw.encode("latin-1").decode("utf-8", "surrogateescape")
            access.key = self._keys.find(given)
            access.key.admit()
        coding = headers.get(b"content-encoding", "identity")
        if coding != "identity":
            raise MediaTypeError("Content-Encoding", got=coding[:40], allowed="identity: send the body uncompressed")


class _Body:
    """The request's body, counted as it arrives: its length may be unsaid, or said wrongly."""

    def __init__(self, receive: Receive, headers: Mapping[bytes, str], limit: int) -> None:
        self._receive, self._limit, self._read = receive, limit, 0
        self._length = headers.get(b"content-length", "0")
        self._ended = self._length == "0" and b"transfer-encoding" not in headers
        self._waits = headers.get(b"expect", "").lower() == "100-continue"  # with the body, until we ask for it

    def expect(self) -> None:
        """Raises BodyTooLargeError when the announced length is over the limit."""
        if self._length.isdecimal() and int(self._length) > self._limit:
            raise self._too_large(self._length)

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._ended, self._waits = not message.get("more_body"), False
        if self._read > self._limit:
            raise self._too_large(f"more than {self._limit}")
        return message

    async def read_out(self, seconds: float) -> bool:
        """Reads on, so that a client that is still sending sees the answer instead of a broken connection. False when the end
        did not come: then the connection must not be kept, or the server reads what comes for as long as it comes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._ended and not self._waits and self._read <= DISCARD_TIMES * self._limit:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self._ended = not message.get("more_body")
        return self._ended

    def _too_large(self, got: str) -> BodyTooLargeError:
        return BodyTooLargeError("the body is too large", got=f"{got} bytes", allowed=f"at most {self._limit}")
