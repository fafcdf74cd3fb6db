"""What stands before the pages: a policy by which a browser loads nothing from elsewhere, the few routes of Gradio that the
pages use, a login where the API has keys, and bounds for uploads.

Notable: the pages know no keys. Whether a key is one of the service's is asked of the API, as by any other client.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable
from urllib.parse import parse_qs

import openai
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ui import login, uploads
from ui.uploads import Uploads

API = "/gradio_api/"
UPLOAD, FILE = API + "upload", API + "file="
# what the pages ask of Gradio. It has many more routes, of which some read files, write files or ask other servers
PUBLIC = re.compile(r"/theme\.css|/manifest\.json|/gradio_api/theme\.css|/(assets|static|svelte)/.+")
GET = re.compile(r"/config|/gradio_api/(app_id|info|queue/data|startup-events|upload_progress|heartbeat/[^/]+|file=.+)")
POST = re.compile(r"/gradio_api/(queue/join|cancel|reset|upload)")
SURE_SECONDS, MOST_SURE = 30.0, 1000  # for how long a key that the API took is not asked about again, and of how many
ASK_SECONDS = 10.0  # for the API to say
MOST_BYTES, MOST_FORM = 2**24 + 2**16, 2**13  # of a body, and of the login's, which anybody may send
BODY_SECONDS = 60.0  # for a body to arrive

# Gradio's pages are made of scripts and styles within the page
POLICY = "; ".join((
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:", "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:", "media-src 'self' data: blob:", "font-src 'self' data:", "connect-src 'self' data: blob:",
    "worker-src 'self' blob:", "frame-src 'none'", "object-src 'none'", "base-uri 'self'", "form-action 'self'",
    "frame-ancestors 'self'",
))  # fmt: skip
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
HEADERS += [(b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware before all that is below `path`: 404 for what no page asks for, a login where `api` wants a key, and only
    a session's own uploads."""

    def __init__(
        self, app: ASGIApp, *, path: str, pages: Iterable[str], api: openai.AsyncOpenAI, files: Uploads
    ) -> None:
        """`pages`: their paths below `path`, the first one's empty."""
        self._app, self._path, self._api, self._files = app, path, api, files
        self._pages = {f"/{page}" for page in pages}
        self._sure: dict[str, float] = {}  # key -> when the API took it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not (path == self._path or path.startswith(self._path + "/")):
            await self._app(scope, receive, send)
            return
        below = path.removeprefix(self._path)
        body = _Body(receive, MOST_FORM if below == login.LOGIN else MOST_BYTES)
        request = Request(scope, body.receive)
        more, session = list(HEADERS), login.session_of(request.cookies)
        if below in self._pages and not session:
            session = login.new_session()
            more.append(self._cookie(request, login.keep_session(session)))
        taken = bytearray()

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                rest = [(b"connection", b"close")] if body.refused else []  # else the server reads it to its end
                message = {**message, "headers": [*message["headers"], *more, *rest]}
            elif below == UPLOAD:
                taken.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self._files.add(session, _paths(bytes(taken)))
            await send(message)

        try:
            answer = await self._instead(request, below, session)
        except HTTPException as refusal:
            answer = JSONResponse({"detail": refusal.detail}, refusal.status_code)
        if answer is None and below == UPLOAD:  # its answer is read here
            scope = {**scope, "headers": [one for one in scope["headers"] if one[0] != b"accept-encoding"]}
        await (answer or self._app)(scope, body.receive, guarded)

    async def _instead(self, request: Request, below: str, session: str) -> ASGIApp | None:
        """What is answered instead of Gradio; None: Gradio answers."""
        if below == login.LOGIN:
            return await self._login(request)
        if below == login.LOGOUT:
            return self._to("login", request, login.keep_key(""))
        if not self._is_used(request.method, below):
            return JSONResponse({"detail": "Not Found"}, 404)
        if not below or PUBLIC.fullmatch(below):  # the first leads to "/"
            return None
        opens = await self._opens(login.key_of(request.cookies))
        if opens is False:
            if below in self._pages:
                return self._to(f"login?to={below[1:]}", request)
            return JSONResponse({"detail": "log in with an API key of this server"}, 401)
        if below.startswith(FILE) and not self._files.may_see(session, below.removeprefix(FILE)):
            return JSONResponse({"detail": "no file of this session"}, 403)
        if below == UPLOAD:
            return await self._refusal(opens, session)
        return None

    def _is_used(self, method: str, below: str) -> bool:
        if ".." in below.split("/"):
            return False
        if method in ("GET", "HEAD"):
            return not below or below in self._pages or any(some.fullmatch(below) for some in (GET, PUBLIC))
        return method == "POST" and POST.fullmatch(below) is not None

    async def _opens(self, key: str) -> bool | None:
        """Whether the API answers to `key`; None: it cannot tell now. Then the pages are shown, and say so: all that is in them
        is asked of the API with the same key."""
        now = time.monotonic()
        if now < self._sure.get(key, -SURE_SECONDS) + SURE_SECONDS:
            return True
        try:
            await (self._api.with_options(api_key=key) if key else self._api).models.list(timeout=ASK_SECONDS)
        except openai.AuthenticationError:
            return False
        except openai.OpenAIError:
            return None
        if len(self._sure) >= MOST_SURE:
            self._sure.clear()
        self._sure[key] = now
        return True

    async def _login(self, request: Request) -> Response:
        to = request.query_params.get("to", "")
        to = to if f"/{to}" in self._pages else ""
        said = login.ASKED
        if request.method == "POST":
            given = parse_qs((await request.body()).decode(errors="replace"))
            key = given.get("key", [""])[0].strip()
            if login.is_key(key) and await self._opens(key) is not False:
                return self._to(f"./{to}", request, login.keep_key(key))
            said = login.WRONG
        elif request.method not in ("GET", "HEAD"):
            return JSONResponse({"detail": "Method Not Allowed"}, 405)
        return HTMLResponse(login.FORM.format(to=to, said=said), headers={"cache-control": "no-store"})

    async def _refusal(self, opens: bool | None, session: str) -> ASGIApp | None:
        """Why no picture is taken now; None: it is."""
        if opens is None:
            return JSONResponse({"detail": "the server takes no picture now"}, 503)
        if not session:
            return JSONResponse({"detail": "load the page first: its cookie says whose the picture is"}, 403)
        if await asyncio.to_thread(uploads.is_full):
            return JSONResponse({"detail": "too many pictures wait here; they are removed after an hour"}, 507)
        return None

    def _to(self, where: str, request: Request, cookie: str = "") -> Response:
        answer = RedirectResponse(where, 303, headers={"cache-control": "no-store"})
        if cookie:
            answer.raw_headers.append(self._cookie(request, cookie))
        return answer

    @staticmethod
    def _cookie(request: Request, value: str) -> tuple[bytes, bytes]:
        encrypted = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        return b"set-cookie", (value + "; Secure" * encrypted).encode()


class _Body:
    """A body, as it comes. Gradio reads any, for as long as it comes, and the pages may run where the API's bounds are not."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._most, self._read = receive, most, 0
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        self._ended = self.refused = False

    async def receive(self) -> Message:
        """Raises HTTPException where more comes than may, or it takes too long, which Gradio answers as it is."""
        if self._ended or self.refused:
            return {"type": "http.disconnect"} if self.refused else await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            self.refused = True
            raise HTTPException(408, f"the body did not arrive: send it within {BODY_SECONDS:g} s") from None
        self._read += len(message.get("body", b""))
        self._ended, self.refused = not message.get("more_body"), self._read > self._most
        if self.refused:
            raise HTTPException(413, f"the body is too large: send at most {self._most} bytes")
        return message


def _paths(answer: bytes) -> list[str]:
    """The files that Gradio says it has taken; none where it refused."""
    try:
        said = json.loads(answer)
    except ValueError:
        return []
    return [path for path in said if isinstance(path, str)] if isinstance(said, list) else []
