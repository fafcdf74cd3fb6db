"""All pages as one Gradio app: chats, the comparison, training runs, drift, releases and the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import openai

from ui import bubbles, compare, drift, login, releases, service, training
from ui.assistants import ASSISTANTS, PICTURES
from ui.chat import AT_ONCE, build_chat
from ui.site import Site
from ui.uploads import Uploads

MAX_FILE_SIZE = "8mb"  # the API's own limit for an image
KEPT_SECONDS, LOOKED_EVERY = 3600, 300  # an upload is removed after so long, within so long
MODULES = (compare, training, drift, releases, service)
PLACES = (*(assistant.place for assistant in ASSISTANTS), *(module.PLACE for module in MODULES))


def build(base_url: str, model: str | None, root: str, api: openai.AsyncOpenAI, files: Uploads) -> gr.Blocks:
    """The pages over the API at `base_url` (which ends in /v1), which they ask through `api`. `model` is named first (None: the
    server's first); `root` is the path that browsers find the first page at. A page may name `files` of its session."""
    gr.set_static_paths([bubbles.LOST_PICTURE, *(Path(file) for file in PICTURES)])  # before pages copy them
    first, *others = ASSISTANTS
    page = gr.Blocks(
        title="Shoal", analytics_enabled=False, fill_height=True, delete_cache=(LOOKED_EVERY, KEPT_SECONDS)
    )
    at = Site(page, PLACES, root, base_url, model, api)
    with page:
        build_chat(at, first)
    for assistant in others:
        with page.route(assistant.place.name, assistant.place.path, show_in_navbar=False):
            build_chat(at, assistant)
    for module in MODULES:
        with page.route(module.PLACE.name, module.PLACE.path, show_in_navbar=False):
            module.build(at)
    _keep_to(page, files)
    page.queue(default_concurrency_limit=AT_ONCE)
    return page


def _keep_to(page: gr.Blocks, files: Uploads) -> None:
    """Whatever event is asked for, its function and Gradio are given no files but `files` of the session that asks."""
    process = page.process_api

    async def process_own(block_fn: Any, inputs: list[Any], *, request: Any = None, **named: Any) -> Any:
        session = login.session_of(request.cookies) if isinstance(request, gr.Request) else ""
        return await process(block_fn, files.own(session, inputs), request=request, **named)

    page.process_api = process_own  # type: ignore[method-assign, assignment]
    page.has_launched = True  # so that Gradio checks paths too: it does not where it is mounted
