"""Puts the pages on an API app: ``shoal serve`` without Ray, and the gateway on Ray Serve."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI, Response

from ui import talk
from ui.app import MAX_FILE_SIZE, PLACES, build
from ui.assistants import PICTURES
from ui.guard import Guard
from ui.look import CSS, FIRST, ICON, SCRIPTS, THEME
from ui.uploads import Uploads, folder


def mount(app: FastAPI, *, base_url: str, model: str | None, path: str = "/ui") -> FastAPI:
    """`app` with the pages at `path`. They ask the API at `base_url` (which ends in /v1), as any client would."""
    root = urlsplit(base_url).path.rstrip("/").removesuffix("/v1") + path
    api, before = talk.client(base_url), app.router.lifespan_context

    @asynccontextmanager
    async def closing(served: FastAPI) -> AsyncIterator[Any]:
        async with before(served) as state:
            yield state
            await api.close()

    app.router.lifespan_context = closing
    files = Uploads(PICTURES)
    app.add_middleware(Guard, path=path, pages=[place.path for place in PLACES], api=api, files=files)
    folder()  # before Gradio asks for it

    @app.get("/favicon.ico", include_in_schema=False)  # browsers ask for it, whatever the page says
    async def favicon() -> Response:
        return Response(ICON.read_bytes(), media_type="image/svg+xml")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode is not supported")  # said although it is off
        return gr.mount_gradio_app(
            app,
            build(base_url, model, root, api, files),
            path=path,
            root_path=root,  # Gradio guesses it wrongly for files
            theme=THEME,
            css=CSS.read_text(encoding="utf-8"),
            head=FIRST + "".join(f"<script>{script.read_text(encoding='utf-8')}</script>" for script in SCRIPTS),
            allowed_paths=[],
            max_file_size=MAX_FILE_SIZE,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
