"""The chat page, found by name: it is a package of its own, ``ui``, that is installed beside this one and is no part of it.

Notable: to import Gradio and to build the pages takes three times as long as all else that a gateway does at its start. `later`
lets it answer before.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from starlette._utils import get_route_path
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

import shoal
from shoal.api.app import UiMount
from shoal.api.lifespan import beside
from shoal.errors import ResourceError, frames

MOUNT = "ui.mount:mount"
PATHS = ("/ui", "/favicon.ico")  # what the pages answer, and all below the first

log = logging.getLogger(__name__)


def chat_page(base_url: str, model: str | None = None, mount: str = MOUNT) -> UiMount:
    """What puts the chat page on an app; the page asks the API at `base_url` (which ends in /v1) for `model` (None: the
    server's first). `mount` is ``module:function``. Raises ResourceError when it, or gradio, is not there.
    """
    module, _, name = mount.partition(":")
    with _checkout_found():
        try:
            put = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise _missing(str(error)) from error

    def mount_page(app: FastAPI) -> FastAPI:
        app = put(app, base_url=base_url, model=model)
        for path in ("/", "/ui"):
            app.add_route(path, _into, include_in_schema=False)
        return app

    return mount_page


def chat_page_later(base_url: str, model: str | None = None, mount: str = MOUNT) -> UiMount:
    """`chat_page`, made in a thread once the app has started. A request for a page that comes before waits for it. Raises
    ResourceError when it is not there; where it cannot be made, its requests are answered 500, and the log says why."""
    module = mount.partition(":")[0]
    with _checkout_found():
        for wanted in (module.partition(".")[0], "gradio"):
            if find_spec(wanted) is None:
                raise _missing(f"No module named {wanted!r}")
    return later(lambda app: chat_page(base_url, model, mount)(app))


def chat_page_elsewhere(app: FastAPI) -> FastAPI:
    """`app`, whose root leads to pages that another process answers below the same address."""
    app.add_route("/", _into, include_in_schema=False)
    return app


def later(put: UiMount) -> UiMount:
    """`put`, done in a thread once the app has started, on an app of its own that answers what is below `PATHS`."""

    def mount(app: FastAPI) -> FastAPI:
        pages = _Pages(put)
        beside(app, pages.live, lambda _: pages.ended.set())
        app.router.routes.append(pages)
        return app

    return mount


class _Pages(BaseRoute):
    """What is below `PATHS`, answered by an app that is made meanwhile."""

    def __init__(self, put: UiMount) -> None:
        self._put, self._app = put, FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self._made, self.ended = asyncio.Event(), asyncio.Event()
        self._failed: Exception | None = None

    async def live(self) -> None:
        """Makes the app, and keeps it until `ended`."""
        try:
            self._app = await asyncio.to_thread(self._put, self._app)
            async with self._app.router.lifespan_context(self._app):
                self._made.set()
                await self.ended.wait()
        except Exception as error:
            self._failed = error
            log.error("the pages could not be made\n%s", frames(error))
        finally:
            self._made.set()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = get_route_path(scope) if scope["type"] == "http" else ""
        mine = any(path == own or path.startswith(own + "/") for own in PATHS)
        return (Match.FULL if mine else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._made.wait()
        if self._failed is not None:
            raise ResourceError("the pages are not there", got=type(self._failed).__name__, do="see the server's log")
        await self._app(scope, receive, send)


@contextmanager
def _checkout_found() -> Iterator[None]:
    """In this block, modules are found that lie beside the package where it runs from a checkout."""
    sources = Path(shoal.__file__).parents[1]
    checkout = str(sources.parent)
    if sources.name != "platform" or checkout in sys.path:  # installed: what lies around it is none of ours
        yield
        return
    sys.path.append(checkout)
    try:
        yield
    finally:
        sys.path.remove(checkout)


def _missing(got: str) -> ResourceError:
    return ResourceError("the chat page", got=got, do="pip install 'shoal[ui]', or switch it off")


def _into(request: Request) -> RedirectResponse:
    """The page's addresses are relative to ``/ui/``. So is this one, since a proxy may have changed scheme, host and path."""
    return RedirectResponse(f"ui/?{request.url.query}".rstrip("?"))
