"""All pages as one Gradio app: chats, the comparison, training runs and the service."""

from __future__ import annotations

import gradio as gr
import openai

from ui import compare, service, training
from ui.assistants import ASSISTANTS
from ui.chat import AT_ONCE, build_chat
from ui.site import Site

MAX_FILE_SIZE = "8mb"  # the API's own limit for an image


def build(base_url: str, model: str | None, root: str, api: openai.AsyncOpenAI) -> gr.Blocks:
    """The pages over the API at `base_url` (which ends in /v1), which they ask through `api`. `model` is named first (None: the
    server's first); `root` is the path that browsers find the first page at."""
    places = [*(assistant.place for assistant in ASSISTANTS), compare.PLACE, training.PLACE, service.PLACE]
    first, *others = ASSISTANTS
    page = gr.Blocks(title="Shoal", analytics_enabled=False, fill_height=True)
    at = Site(page, places, root, base_url, model, api)
    with page:
        build_chat(at, first)
    for assistant in others:
        with page.route(assistant.place.name, assistant.place.path, show_in_navbar=False):
            build_chat(at, assistant)
    for module in (compare, training, service):
        with page.route(module.PLACE.name, module.PLACE.path, show_in_navbar=False):
            module.build(at)
    page.queue(default_concurrency_limit=AT_ONCE)
    return page
