"""What stands before the pages: a policy by which a browser loads nothing from elsewhere, and bounds for what is uploaded.

Notable: the pages show what a model says, and know no keys. So the policy holds whatever an answer spells, and whether a key is
one of the service's is asked of the API, as by any other client.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import openai
from gradio.utils import is_static_file
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ui.bubbles import LOST_PICTURE

UPLOAD = "/gradio_api/upload"
KEPT_SECONDS, LOOKED_EVERY = 3600, 300  # an upload is removed after so long, within so long
UPLOADED = {"_type": "gradio.FileData"}  # what Gradio knows a file by
MOST_FILES, MOST_BYTES = 2000, 2**30  # of all uploads together

# Gradio's pages are made of scripts and styles within the page
POLICY = "; ".join((
    "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:", "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:", "media-src 'self' data: blob:", "font-src 'self' data:", "connect-src 'self' data: blob:",
    "worker-src 'self' blob:", "frame-src 'none'", "object-src 'none'", "base-uri 'self'", "form-action 'self'",
))  # fmt: skip
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
HEADERS += [(b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware: all that is below `path` has the policy; an upload needs a key where `api` does, and room."""

    def __init__(self, app: ASGIApp, *, path: str, api: openai.AsyncOpenAI) -> None:
        self._app, self._path, self._api = app, path, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not (path == self._path or path.startswith(self._path + "/")):
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        refused = None
        if path.rstrip("/") == self._path + UPLOAD and scope["method"] != "OPTIONS":
            refused = await self._refusal(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
        await (refused or self._app)(scope, receive, guarded)

    async def _refusal(self, authorization: str) -> ASGIApp | None:
        """Why nothing is taken now; None: it is."""
        try:
            key = authorization.partition(" ")[2]
            await (self._api.with_options(api_key=key) if key else self._api).models.list()
        except openai.AuthenticationError:
            return JSONResponse({"detail": "a picture needs an API key of this server"}, 401)
        except openai.APIStatusError as error:
            return JSONResponse({"detail": "the server takes no picture now"}, error.status_code)
        except openai.OpenAIError:
            return JSONResponse({"detail": "the server does not answer"}, 503)
        files, held = await asyncio.to_thread(stored, folder())
        if files >= MOST_FILES or held >= MOST_BYTES:
            return JSONResponse({"detail": "too many pictures wait here; they are removed after an hour"}, 507)
        return None


@cache
def folder() -> Path:
    """Where this process keeps what is uploaded, below $GRADIO_TEMP_DIR or the system's; removed at its end."""
    made = tempfile.mkdtemp(prefix="shoal-pages-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    os.environ["GRADIO_TEMP_DIR"] = made  # by which Gradio is told
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def with_lost(given: Any) -> Any:
    """What a page sends, with `LOST_PICTURE` for each picture that is not there: it was removed, or another server has it.
    Gradio would refuse all of it, and with it whatever is asked in a conversation that had a picture an hour ago."""
    if isinstance(given, list):
        return [with_lost(item) for item in given]
    if not isinstance(given, dict):
        return given
    if given.get("meta") == UPLOADED and not _is_here(str(given.get("path"))):
        return {"path": str(LOST_PICTURE), "mime_type": "image/png", "meta": UPLOADED}
    return {name: with_lost(value) for name, value in given.items()}


def _is_here(path: str) -> bool:
    place = os.path.realpath(path)
    return os.path.isfile(place) and (Path(place).is_relative_to(os.path.realpath(folder())) or is_static_file(place))


def stored(folder: Path) -> tuple[int, int]:
    """How many files a folder holds, and their bytes."""
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(place, name)).st_size)
            except OSError:  # removed meanwhile
                continue
    return len(sizes), sum(sizes)
