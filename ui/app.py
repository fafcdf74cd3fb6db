"""All pages as one Gradio app: chats, the comparison, training runs, drift, releases and the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import openai

from ui import bubbles, compare, drift, guard, releases, service, training
from ui.assistants import ASSISTANTS, PICTURES
from ui.chat import AT_ONCE, build_chat
from ui.site import Site

MAX_FILE_SIZE = "8mb"  # the API's own limit for an image


def build(base_url: str, model: str | None, root: str, api: openai.AsyncOpenAI) -> gr.Blocks:
    """The pages over the API at `base_url` (which ends in /v1), which they ask through `api`. `model` is named first (None: the
    server's first); `root` is the path that browsers find the first page at."""
    places = [
        *(assistant.place for assistant in ASSISTANTS),
        compare.PLACE,
        training.PLACE,
        drift.PLACE,
        releases.PLACE,
        service.PLACE,
    ]
    first, *others = ASSISTANTS
    page = gr.Blocks(
        title="Shoal", analytics_enabled=False, fill_height=True, delete_cache=(guard.LOOKED_EVERY, guard.KEPT_SECONDS)
    )
    at = Site(page, places, root, base_url, model, api)
    with page:
        build_chat(at, first)
    for assistant in others:
        with page.route(assistant.place.name, assistant.place.path, show_in_navbar=False):
            build_chat(at, assistant)
    for module in (compare, training, drift, releases, service):
        with page.route(module.PLACE.name, module.PLACE.path, show_in_navbar=False):
            module.build(at)
    gr.set_static_paths([bubbles.LOST_PICTURE, *(Path(file) for file in PICTURES)])
    _mend(page)
    page.queue(default_concurrency_limit=AT_ONCE)
    return page


def _mend(page: gr.Blocks) -> None:
    """What a page sends is taken though a picture in it is gone."""
    preprocess = page.preprocess_data

    async def mended(block_fn: Any, inputs: list[Any], *more: Any, **named: Any) -> Any:
        return await preprocess(block_fn, guard.with_lost(inputs), *more, **named)

    page.preprocess_data = mended  # type: ignore[method-assign]
