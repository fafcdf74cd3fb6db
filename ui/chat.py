"""A chat page: the conversation, the settings of the next answer beside it, earlier conversations below them."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import openai

from ui import history, site, talk
from ui.assistants import Assistant
from ui.site import QUIET, Component, Key, Site
from ui.talk import Settings

IMAGES = (".png", ".jpg", ".jpeg", ".webp")  # what the API decodes
AT_ONCE = 64  # answers that stream at once; the engine's queue bounds them further
MOST_TOKENS = 128  # of an answer, unless the slider says more
SAVED_EVERY = 0.25  # seconds between two savings of a conversation while an answer streams
WRITE = "Write a message"
DOWNLOAD = """(text) => {{
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{kind}'}}));
  link.download = '{name}';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}}"""  # made in the browser: the server keeps no file


def build_chat(at: Site, assistant: Assistant) -> None:
    """The page of one assistant, inside the Blocks that are open."""
    head = at.head(assistant.place)
    if assistant.notice:
        gr.HTML(f'<div class="notice" role="note">{html.escape(assistant.notice)}</div>')
    with gr.Row(equal_height=False, elem_id="main"):
        settings: Component = gr.Column(
            scale=1, min_width=280, elem_id="settings", render=False
        )  # the conversation comes first
        with settings:
            controls = _controls(assistant)
            key = Key.ask()
            kept = _kept()
            with gr.Accordion("The last request as curl", open=False, elem_id="curl"):
                command = gr.Code(
                    "# ask something first", show_label=False, wrap_lines=True, interactive=False, buttons=["copy"]
                )
        with gr.Column(scale=4, min_width=320):
            inputs = [*controls.values(), key.box]
            chat = gr.ChatInterface(
                _replies(at),
                multimodal=True,
                chatbot=_chatbot(assistant.hint),
                textbox=_textbox(),
                additional_inputs=inputs,
                additional_outputs=[command],
                examples=[[example, *[None] * len(inputs)] for example in assistant.examples.values()],
                example_labels=list(assistant.examples),
                concurrency_limit=AT_ONCE,
                show_progress="hidden",
                api_visibility="private",
            )
        settings.render()
    _describe(at, assistant, head, controls, key)
    _remember(at, assistant, chat, kept)
    _offer(chat, controls["system"], kept)


def _replies(at: Site) -> Any:
    """What answers a message of the page; its arguments follow the order of `_controls`."""

    async def reply(
        message: dict[str, Any],
        shown: list[dict[str, Any]],
        model: str | None,
        depth: str,
        most: float,
        temperature: float,
        system: str,
        top_p: float,
        seed: str,
        tolerance: str,
        key: str,
    ) -> AsyncIterator[tuple[dict[str, Any], Any]]:
        try:
            cards = await at.cards(key)
        except openai.OpenAIError as error:
            yield talk.faulty(talk.reason(error)), gr.skip()
            return
        card = site.of(cards, model)
        asked = talk.messages(shown, message, system.strip())
        try:
            given = talk.number("Seed", seed, whole=True), talk.number("Tolerance", tolerance)
        except ValueError as error:
            yield talk.faulty(str(error)), gr.skip()
            return
        settings = Settings(depth, int(most), temperature, top_p, *given)
        command: Any = talk.curl(at.url, settings.body(card.name, asked), key=bool(key))
        async for state in talk.answer(at.client(key), card, asked, settings):
            yield state, command
            command = gr.skip()

    return reply


def _controls(assistant: Assistant) -> dict[str, Component]:
    """The settings of an answer, in the order in which `reply` takes them."""
    model = gr.Dropdown([], label="Model", visible=False, filterable=False, elem_id="model")
    depth = gr.Radio([("auto, by the question", "auto")], value="auto", label="Depth", elem_id="depth")
    most = gr.Slider(1, MOST_TOKENS, value=MOST_TOKENS, step=1, label="Most tokens", buttons=[])
    likeliest = "0 gives the likeliest answer."
    temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info=likeliest, buttons=[])
    with gr.Accordion("More settings", open=False, elem_id="more"):
        system = gr.Textbox(assistant.system, label="System prompt", lines=2, max_lines=8)
        share = "Only the likeliest tokens that make up this share."
        top_p = gr.Slider(0.01, 1, value=1, step=0.01, label="Top-p", info=share, buttons=[])
        same = "The same seed gives the same answer. Empty: another each time."
        # of text, since Gradio's Number shows, and sends, 0 where there is none
        seed = gr.Textbox("", label="Seed", info=same, max_lines=1)
        lost = "Nats a token that depth auto may lose. Empty: as the server says."
        tolerance = gr.Textbox("", label="Tolerance", info=lost, max_lines=1)
    return {
        "model": model,
        "depth": depth,
        "most": most,
        "temperature": temperature,
        "system": system,
        "top_p": top_p,
        "seed": seed,
        "tolerance": tolerance,
    }


def _kept() -> dict[str, Component]:
    """The controls of earlier conversations: which to show, a new one, and the downloads."""
    where = "In this browser only, no pictures."
    earlier = gr.Dropdown([], value=None, label="Conversations", info=where, filterable=False, elem_id="earlier")
    with gr.Row(elem_id="kept"):
        new = gr.Button("New chat", size="sm", min_width=80)
        markdown = gr.Button("Save as Markdown", size="sm", min_width=80)
        as_json = gr.Button("Save as JSON", size="sm", min_width=80)
    return {"earlier": earlier, "new": new, "markdown": markdown, "json": as_json}


def _describe(at: Site, assistant: Assistant, head: Component, controls: dict[str, Component], key: Key) -> None:
    """What the page shows of the models, read when the page opens, when a key is given and when a model is picked."""

    async def describe(given: str, picked: str | None, depth: str, most: float) -> tuple[Any, ...]:
        try:
            cards = await at.cards(given)
        except openai.OpenAIError as error:
            return (
                at.header(assistant.place, talk.reason(error), fault=True),
                gr.skip(),
                gr.skip(),
                gr.skip(),
                Key.shown(given, error),
            )
        card = site.of(cards, picked)
        names = [(site.label(card), card.name) for card in cards]
        return (
            at.header(assistant.place, site.about(card)),
            gr.update(choices=names, value=card.name, visible=len(cards) > 1),
            site.depths_of(card, depth),
            gr.update(maximum=card.context - 1, value=min(most, card.context // 2)),
            Key.shown(given),
        )

    shown = [head, controls["model"], controls["depth"], controls["most"], key.box]
    set_now = [controls["model"], controls["depth"], controls["most"]]
    key.then(at, describe, set_now, shown)
    controls["model"].input(describe, [key.box, *set_now], shown, **QUIET)


def _remember(at: Site, assistant: Assistant, chat: gr.ChatInterface, kept: dict[str, Component]) -> None:
    """Keeps the conversations of this page in the browser, and brings the last one back when the page opens."""
    chats = gr.BrowserState([], storage_key=f"shoal-chats-{assistant.place.path}", secret=history.STORED_AS)
    # key of the conversation that is shown, which the page sends with what it shows. From the server's memory came that of the
    # next one, so that a page that opened on a busy machine took a conversation for an empty one
    current = gr.Textbox(visible="hidden")
    earlier, known = kept["earlier"], gr.State([])  # known: what the list was last made of

    def listed(stored: Any, key: str) -> Any:
        choices = history.titles(stored)
        return gr.update(choices=choices, value=key if key in dict(choices).values() else None)

    def shown(stored: Any, key: str) -> tuple[Any, ...]:
        messages = history.load(stored, key)
        return messages, messages, key, listed(stored, key)

    def opened(stored: Any) -> tuple[Any, ...]:
        titles = history.titles(stored)
        if titles:
            return shown(stored, titles[0][1])
        return gr.skip(), gr.skip(), history.new_key(), gr.skip()  # a message sent meanwhile must not be wiped out

    async def save(stored: Any, key: str, messages: list[dict[str, Any]]) -> tuple[Any, ...]:
        await asyncio.sleep(SAVED_EVERY)
        now = history.save(stored, key, messages) if key else stored
        # a page that only shows what is kept must not write it: meanwhile another tab may have written more
        return gr.skip() if now == stored else now, gr.update(placeholder=WRITE)  # which Gradio empties

    def placed(stored: Any, key: str, before: list[Any]) -> tuple[Any, Any]:
        now = [key, *history.titles(stored)]
        if not key or now == before:  # a list that is open is not drawn anew while an answer comes
            return gr.skip(), gr.skip()
        return listed(stored, key), now

    conversation = [chat.chatbot, chat.chatbot_state, current, earlier]
    inputs = [chats, current, chat.chatbot]
    saved = chat.chatbot.change(save, inputs, [chats, chat.textbox], trigger_mode="always_last", **QUIET)
    # which of them is shown may have changed while it was saved
    saved.then(placed, [chats, current, known], [earlier, known], **QUIET)
    at.page.load(opened, chats, conversation, **QUIET)
    earlier.input(shown, [chats, earlier], conversation, **QUIET)
    kept["new"].click(lambda stored: shown(stored, history.new_key()), chats, conversation, **QUIET)


def _offer(chat: gr.ChatInterface, system: Component, kept: dict[str, Component]) -> None:
    """The conversation as a file: Markdown to read, JSON to fine-tune with."""
    text = gr.Textbox(visible="hidden")
    written = {
        "markdown": (lambda shown, _: history.as_markdown(shown), "shoal-chat.md", "text/markdown"),
        "json": (history.as_json, "shoal-chat.json", "application/json"),
    }
    for button, (write, name, kind) in written.items():
        made = kept[button].click(write, [chat.chatbot_state, system], text, **QUIET)
        made.then(None, text, None, js=DOWNLOAD.format(kind=kind, name=name))


def _chatbot(hint: str) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        label="Conversation",
        elem_id="chat",
        height="calc(100dvh - 200px)",
        min_height=320,
        layout="bubble",
        buttons=["copy"],
        latex_delimiters=[],
        placeholder=hint,
    )


def _textbox() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        show_label=False,
        label="Message",
        placeholder=WRITE,
        file_types=list(IMAGES),
        sources=["upload"],
        stop_btn=True,
        max_lines=8,
    )
