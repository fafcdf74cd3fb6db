"""Puts the chat page on an API app: ``shoal serve`` without Ray, and the gateway on Ray Serve."""

from __future__ import annotations

from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI, Response

from ui.app import CSS, ICON, MAX_FILE_SIZE, THEME, build


def mount(app: FastAPI, *, base_url: str, model: str | None, path: str = "/ui") -> FastAPI:
    """`app` with the page at `path`. The page asks the API at `base_url` (which ends in /v1), as any client would."""

    @app.get("/favicon.ico", include_in_schema=False)  # browsers ask for it, whatever the page says
    async def favicon() -> Response:
        return Response(ICON.read_bytes(), media_type="image/svg+xml")

    return gr.mount_gradio_app(
        app,
        build(base_url, model),
        path=path,
        root_path=urlsplit(base_url).path.rstrip("/").removesuffix("/v1") + path,  # Gradio guesses it wrongly for files
        theme=THEME,
        css=CSS.read_text(encoding="utf-8"),
        max_file_size=MAX_FILE_SIZE,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
    )
