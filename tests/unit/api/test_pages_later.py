"""Pages that are made while the API answers already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from shoal.api.app import build_app
from shoal.api.page import chat_page_later, later
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.errors import ResourceError
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            yield http


async def test_the_api_answers_before_the_pages_are_made_and_they_come_to_who_waits(
    served: ServedModel, engine: Scripted
) -> None:
    go_on, lives = threading.Event(), list[str]()

    def put(app: FastAPI) -> FastAPI:
        assert go_on.wait(60)
        before = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(served: FastAPI) -> AsyncIterator[object]:
            async with before(served) as state:
                lives.append("began")
                yield state
                lives.append("ended")

        app.router.lifespan_context = lifespan
        app.add_route("/ui/{page}", lambda request: PlainTextResponse("a page"))
        return app

    app = build_app([Hosted(served, engine)], ui_mount=later(put))
    async with running(app) as http:
        page = asyncio.create_task(http.get("/ui/some"))
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/uii")).status_code == 404
        assert not page.done() and not lives
        go_on.set()
        assert (await page).text == "a page" and "x-request-id" in (await page).headers
        assert lives == ["began"]
    assert lives == ["began", "ended"]


async def test_pages_that_cannot_be_made_are_500_and_nothing_else_is(
    served: ServedModel, engine: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def put(app: FastAPI) -> FastAPI:
        raise KeyError("".join(("sec", "ret")))

    app = build_app([Hosted(served, engine)], ui_mount=later(put))
    async with running(app) as http:
        reply = await http.get("/ui/")
        assert (reply.status_code, (await http.get("/ready")).status_code) == (500, 200)
        assert "the pages are not there" in reply.json()["error"]["message"]
    assert "could not be made" in caplog.text and "secret" not in caplog.text


async def test_pages_that_are_not_installed_are_refused_at_once() -> None:
    with pytest.raises(ResourceError, match="no_such_package"):
        chat_page_later("http://t/v1", mount="no_such_package.mount:mount")
