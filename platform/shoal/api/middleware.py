"""What happens to every HTTP request before a route sees it: an id, the key and its limits, the size of the body; and after it,
one line in the log.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide the client's disconnect from the routes, and with it cancellation.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.api.access import Access, told
from shoal.api.auth import ApiKeys
from shoal.api.client import ClientGone, must_be_there
from shoal.api.wire import BodyTooLargeError, MediaTypeError, OverloadedError
from shoal.errors import RequestError

# need no key; all else does
OPEN_PATHS = ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/ui", "/favicon.ico")
STREAMING = "/ui/gradio_api/"  # of its GETs some never end, and none is asked for its head
LONGEST_ID = 128
UNUSED = "x-shoal-unused"  # the header that names what was taken and changes nothing
LONGEST_UNUSED = 2048  # letters of it: clients and proxies refuse an answer with a long header
# where the pages would look for what is in them: anybody can say it
UNHEARD = (b"x-forwarded-host", b"x-gradio-server")
DISCARD_TIMES, DISCARD_SECONDS = 4, 10.0  # how much of a refused body is read, in limits, and for how long

PRESENT_SECONDS = 2.0  # for the beginning of a body to come to a proxy

Failed = Callable[[Exception, Access], ASGIApp]

_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,%d}" % LONGEST_ID)


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The ``X-Request-Id`` that a client gave, where it can be one; else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex


class Identified:
    """ASGI middleware in front of a proxy that takes over any id: here every request gets a good one first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope = {**scope, "headers": [*kept, (b"x-request-id", request_id(scope["headers"]).encode())]}
        await self._app(scope, receive, send)


class Headed:
    """ASGI middleware around the routes: HEAD is answered where GET is, with the same headers and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope.get("method") != "HEAD" or path.startswith(STREAMING):
            await self._app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, bare)


class Present:
    """ASGI middleware before a proxy: a request whose client has left is not passed on. What it would cost behind the proxy is
    many times what it has cost until then, and who leaves at once can send very many. One whose body does not come in
    `seconds` passes as it is: behind the proxy that has its bound, and its answer."""

    def __init__(self, app: ASGIApp, seconds: float = PRESENT_SECONDS) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        first: Message | None
        try:
            first = await asyncio.wait_for(receive(), self._seconds)
        except TimeoutError:
            await self._app(scope, receive, send)
            return
        if first["type"] == "http.disconnect":
            return
        if not first.get("more_body"):
            try:
                await must_be_there(receive)
            except ClientGone:
                return

        async def again() -> Message:
            nonlocal first
            message, first = first, None
            return await receive() if message is None else message

        await self._app(scope, again, send)


class Gate:
    """ASGI middleware around the whole app. Refuses with 401, 413, 415, 429 and 503; echoes or makes ``X-Request-Id``; answers
    with what `failed` makes of an error that no handler took."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys | None,
        body_bytes: int,
        bodies_bytes: int,
        failed: Failed,
        answer_id: bool = True,
        longer: Mapping[str, int] | None = None,
    ) -> None:
        """`bodies_bytes`: of all bodies at once; `longer`: path -> bytes of a body, where these are others: of files, which are
        not held in memory."""
        self._app, self._keys, self._body_bytes, self._longer = app, keys, body_bytes, longer or {}
        self._failed, self._answer_id = failed, answer_id
        self._bodies = _Bodies(bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and end of the server; there are no websockets
            await self._app(scope, receive, send)
            return
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in UNHEARD]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        access = Access(request_id(scope["headers"]), scope["method"], scope["path"])
        scope.setdefault("state", {})["access"] = access
        with told(access, headers):
            try:
                await self._answer(access, headers, scope, receive, send)
            finally:
                if access.admitted and access.key is not None:
                    access.key.leave()
            access.route = getattr(scope.get("route"), "path", None)

    async def _answer(
        self, access: Access, headers: dict[bytes, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                access.answered(message["status"])
                seconds = 0.0 if access.status == 408 else DISCARD_SECONDS  # 408: it has been waited for
                rest = [] if await body.read_out(seconds) else [(b"connection", b"close")]
                message = {**message, "headers": [*message["headers"], *self._told(access), *rest]}
            elif not message.get("more_body"):
                access.end()  # who has read the answer to its end knows that its row is kept
            await send(message)

        longer = self._longer.get(_path(scope))
        held = self._bodies if longer is None else _Bodies(longer)
        body = _Body(receive, headers, longer or self._body_bytes, self._body_bytes, held)
        try:
            try:
                await self._check(scope, headers, access)
                body.expect()
            except RequestError as refused:
                await self._failed(refused, access)(scope, receive, named)
            else:
                await self._app(scope, body.receive, named)
        except Exception as error:
            answer = self._failed(error, access)  # logs it
            if not started:
                await answer(scope, receive, named)
        finally:
            body.release()

    def _told(self, access: Access) -> list[tuple[bytes, bytes]]:
        """The headers that every answer has, under the names that OpenAI's clients read."""
        told = {"openai-processing-ms": str(round(access.seconds * 1000))}
        told |= {"x-request-id": access.id} if self._answer_id else {}
        told |= access.key.headers() if access.key is not None else {}
        told |= {UNUSED: _listed(access.unused)} if access.unused else {}
        return [(name.encode(), value.encode()) for name, value in told.items()]

    def _open(self, scope: Scope) -> bool:
        path = _path(scope)
        return any(path == open_ or path.startswith(open_ + "/") for open_ in OPEN_PATHS)

    async def _check(self, scope: Scope, headers: dict[bytes, str], access: Access) -> None:
        if self._keys is not None and not self._open(scope):
            raw = headers.get(b"authorization")
            if raw is None and b"x-api-key" in headers:  # as Anthropic's clients send it
                raw = f"Bearer {headers[b'x-api-key']}"
            given = None if raw is None else raw.encode("latin-1").decode("utf-8", "surrogateescape")
            access.key = self._keys.find(given)
            await access.key.admitted()
            access.admitted = True
        coding = headers.get(b"content-encoding", "identity")
        if coding != "identity":
            raise MediaTypeError("Content-Encoding", got=coding[:40], allowed="identity: send the body uncompressed")


def _listed(names: list[str]) -> str:
    """As many of `names` as a header holds, and "..." for the others."""
    whole = ", ".join(names)
    return whole if len(whole) <= LONGEST_UNUSED else whole[:LONGEST_UNUSED].rpartition(", ")[0] + ", ..."


def _path(scope: Scope) -> str:
    """Of a request, from where a Serve config or a proxy puts the app."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class _Bodies:
    """The bodies of the requests that are answered now, which are in memory until they are."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0  # bytes


class _Body:
    """The request's body, counted as it arrives: the client may have given no length, or a wrong one."""

    def __init__(self, receive: Receive, headers: Mapping[bytes, str], limit: int, usual: int, bodies: _Bodies) -> None:
        """`usual`: as `limit`, of bodies that are no files; of one that is refused no more is read than of these. `bodies`: all
        that there are, this one among them until `release`."""
        self._bodies, self._held = bodies, 0
        self._receive, self._limit, self._usual, self._read = receive, limit, usual, 0
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
        size = len(message.get("body", b""))
        if self._bodies.held + size > self._bodies.most:
            do, most = "try again in a moment", f"{self._bodies.most} bytes"
            raise OverloadedError("too many large bodies at once", allowed=most, do=do)
        self._held += size
        self._bodies.held += size
        return message

    def release(self) -> None:
        """It is in memory no more."""
        self._bodies.held -= self._held
        self._held = 0

    async def read_out(self, seconds: float) -> bool:
        """Reads on, so that a client that is still sending sees the answer instead of a broken connection. False when the end
        did not come: then the connection must not be kept, or the server reads what comes for as long as it comes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._ended and not self._waits and self._read <= DISCARD_TIMES * self._usual:
                    message = await self._receive()
                    self._read += len(message.get("body", b""))
                    self._ended = not message.get("more_body")
        return self._ended

    def _too_large(self, got: str) -> BodyTooLargeError:
        return BodyTooLargeError("the body is too large", got=f"{got} bytes", allowed=f"at most {self._limit}")
