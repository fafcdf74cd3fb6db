"""A chat page: the conversation, the settings of the next answer beside it, earlier conversations below them."""

from __future__ import annotations

import asyncio
import copy
import html
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr
import openai

from ui import bubbles, history, login, lookup, program, site, talk, vote, words
from ui.assistants import Assistant
from ui.site import QUIET, Component, Site
from ui.talk import Card, Said, Settings, Words
from ui.uploads import IMAGES

AT_ONCE = 64  # answers that stream at once; the engine's queue bounds them further
MOST_TOKENS = 128  # of an answer, unless the slider says more
SAVED_EVERY = 0.25  # seconds between two savings of a conversation while an answer streams
WRITE = "Write a message"
LOST = (
    "Below the answer stands what it lost, never more; where none stands, nobody looked, and the router chose a depth at which "
    "such prompts lose that in the mean."
)
CALLED = "(...given) => chat.{}(...given)"  # a function of chat.js
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
        # the conversation comes first
        settings: Component = gr.Column(scale=1, min_width=280, elem_id="settings", render=False)
        with settings:
            controls = _controls(assistant)
            kept = _kept()
            with gr.Accordion("The last request as curl", open=False, elem_id="curl"):
                command = gr.Code(
                    "# ask something first", show_label=False, wrap_lines=True, interactive=False, buttons=["copy"]
                )
        with gr.Column(scale=4, min_width=320):
            chat = _chatbot(assistant)
            with gr.Group():
                box = _textbox()
            keep, remembered = vote.keep_box()
        settings.render()
    _describe(at, assistant, head, controls, chat)
    answering = _talk(at, assistant, chat, box, [*controls.values(), keep], command)
    vote.build(at, chat, keep, remembered)
    program.build(at)
    _remember(at, assistant, chat, kept, answering)
    _offer(chat, controls["system"], kept)


def _talk(
    at: Site, assistant: Assistant, chat: Component, box: Component, inputs: list[Component], command: Component
) -> list[Any]:
    """A question goes into the conversation, and the answer below it: the events that answer. All that an answer needs comes
    with the question: a service that began anew meanwhile, or another one, remembers nothing."""

    def pick(example: gr.SelectData) -> tuple[Any, Any]:
        text = str(example.value["text"])  # one of the page's own, or of the model's
        files: list[str] = next(
            (one.get("files", []) for one in assistant.examples.values() if one["text"] == text), []
        )
        content = [*({"path": file} for file in files), text]
        return [{"role": "user", "content": content}], gr.update(interactive=False, submit_btn=False, stop_btn=True)

    shown = [chat, box]
    asked = [
        box.submit(None, [box, chat], shown, js=CALLED.format("ask"), **QUIET),
        chat.retry(None, chat, shown, js=CALLED.format("retry"), **QUIET),
        chat.example_select(pick, None, shown, **QUIET),
    ]
    chat.undo(None, chat, shown, js=CALLED.format("undo"), **QUIET)
    answering = [
        event.success(_replies(at, assistant), [chat, *inputs], [chat, command], concurrency_limit=AT_ONCE, **QUIET)
        for event in asked
    ]
    for event in answering:
        for then in (event.then, event.failure):  # whether it came to its end, was stopped, or failed
            then(None, chat, shown, js=CALLED.format("ended"), **QUIET)
    box.stop(None, None, None, js=CALLED.format("stop"), cancels=answering, **QUIET)
    chat.clear(None, None, None, cancels=answering, **QUIET)
    return answering


def _replies(at: Site, assistant: Assistant) -> Any:
    """What answers the last question of a conversation; its arguments follow the order of `_controls`, then `keep`."""

    async def reply(
        shown: list[dict[str, Any]],
        model: str | None,
        depth: str,
        most: float,
        temperature: float,
        system: str,
        top_p: float,
        seed: str,
        tolerance: str,
        keep: bool,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, Any]]:
        if not shown or shown[-1]["role"] != "user":
            yield gr.skip(), gr.skip()
            return
        try:
            given = talk.number("Seed", seed, whole=True), talk.number("Tolerance", tolerance)
            if bubbles.lacks_picture(shown[-1]):
                raise ValueError("The server does not have this picture any more: add it once more, and ask again.")
            began = time.perf_counter()
            async with aclosing(talk.insist(lambda: at.cards(request))) as found:
                async for cards in found:
                    if not isinstance(cards, list):
                        waits = time.perf_counter() - began
                        yield [*shown, bubbles.said(Said("", waits=waits, refused=True))], gr.skip()
        except ValueError as error:
            yield [*shown, bubbles.faulty(str(error))], gr.skip()
            return
        except openai.OpenAIError as error:
            yield [*shown, bubbles.faulty(talk.reason(error))], gr.skip()
            return
        assert isinstance(cards, list)
        card = site.of(cards, model)
        tools = await lookup.read(at.client(request)) if assistant.tools else None
        signed_in, place = lookup.place(tools, bubbles.first(shown), request.session_hash)
        made = site.words_of(card, assistant.place.path)
        if system.strip() in _unwritten(assistant, cards):  # what the user wrote stands
            system = signed_in or _system(assistant, made)  # who asks is known to the tools
        depth = "" if made and depth == "auto" else depth
        asked = bubbles.conversation(shown, system.strip())
        settings, told = Settings(depth, int(most), temperature, top_p, *given, store=bool(keep)), None
        async with aclosing(lookup.stream(at.client(request), card, asked, settings, tools, place)) as states:
            async for state in states:
                sent = state.settings or settings
                command = (
                    gr.skip()
                    if sent == told
                    else words.curl(at.url, sent.body(card.name, asked), key=bool(login.key_of(request.cookies)))
                )
                told = sent
                yield [*shown, bubbles.said(state)], command

    return reply


def _system(assistant: Assistant, made: Words | None) -> str:
    return made.system if made else assistant.system


def _unwritten(assistant: Assistant, cards: list[Card]) -> set[str]:
    """Systems' words that stand on a page without anybody having written them there."""
    of = (site.words_of(card, assistant.place.path) for card in cards)
    return {assistant.system.strip(), *(made.system.strip() for made in of if made)}


def _controls(assistant: Assistant) -> dict[str, Component]:
    """The settings of an answer, in the order in which `reply` takes them."""
    model = site.judged_by_the_api(gr.Dropdown([], label="Model", visible=False, filterable=False, elem_id="model"))
    depth = site.judged_by_the_api(
        gr.Radio([("auto, by the question", "auto")], value="auto", label="Depth", elem_id="depth")
    )
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
        may = (
            "What an answer of depth auto may lose beside full depth, in nats a token: 0 loses nothing, with 0.1 each token "
            f"is a tenth less likely in the mean. {LOST} Empty: as the server says."
        )
        tolerance = gr.Textbox("", label="Tolerance", info=may, max_lines=1)
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
    earlier = site.judged_by_the_api(
        gr.Dropdown([], value=None, label="Conversations", info=where, filterable=False, elem_id="earlier")
    )
    with gr.Row(elem_id="kept"):
        new = gr.Button("New chat", size="sm", min_width=80)
        markdown = gr.Button("Save as Markdown", size="sm", min_width=80)
        as_json = gr.Button("Save as JSON", size="sm", min_width=80)
    return {"earlier": earlier, "new": new, "markdown": markdown, "json": as_json}


def _describe(at: Site, assistant: Assistant, head: Component, controls: dict[str, Component], chat: Component) -> None:
    """What the page shows of the models, read when the page opens, when a key is given and when a model is picked."""

    async def describe(
        request: gr.Request, picked: str | None, depth: str, most: float, system: str
    ) -> tuple[Any, ...]:
        try:
            cards = await at.cards(request)
        except openai.OpenAIError as error:
            return (
                at.header(assistant.place, request, talk.reason(error), fault=True),
                gr.skip(),
                gr.skip(),
                gr.skip(),
                gr.skip(),
                gr.skip(),
            )
        card = site.of(cards, picked)
        names = [(site.label(card), card.name) for card in cards]
        made = site.words_of(card, assistant.place.path)
        any_made = any(site.words_of(one, assistant.place.path) for one in cards)
        unwritten = system.strip() in _unwritten(assistant, cards)
        return (
            at.header(assistant.place, request, site.about(card)),
            gr.update(choices=names, value=card.name, visible=len(cards) > 1),
            site.depths_of(card, depth, made.depth if made else "auto"),
            gr.update(maximum=card.context - 1, value=min(most, card.context // 2)),
            _system(assistant, made) if any_made and unwritten else gr.skip(),
            gr.update(examples=_examples(assistant, made)) if any_made else gr.skip(),
        )

    set_now = [controls[name] for name in ("model", "depth", "most", "system")]
    shown = [head, controls["model"], controls["depth"], controls["most"], controls["system"], chat]
    at.page.load(describe, set_now, shown, **QUIET)
    controls["model"].input(describe, set_now, shown, **QUIET)


def _remember(
    at: Site, assistant: Assistant, chat: Component, kept: dict[str, Component], answering: list[Any]
) -> None:
    """Keeps the conversations of this page in the browser (`kept.js`), and brings the last one back when the page opens.
    Another one ends what is `answering`, whose words would come into it."""
    path = assistant.place.path
    # what earlier versions kept in one piece, which two tabs overwrote for each other
    before = gr.BrowserState([], storage_key=f"shoal-chats-{path}", secret=history.STORED_AS)
    # key of the conversation that is shown: the page sends it with what it shows. From the server came that of the next
    # one: a page that opened on a busy machine took a conversation for an empty one
    current, made = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    earlier = kept["earlier"]

    def called(name: str) -> str:
        return f"(...given) => kept.{name}({json.dumps(path)}, ...given)"

    def opened(chosen: Any, key: str) -> tuple[Any, ...]:
        shown = history.load(chosen)
        return shown or gr.skip(), key  # a message sent meanwhile must not be wiped out

    def picked(chosen: Any, key: str) -> tuple[Any, ...]:
        return history.load(chosen), key

    async def save(key: str, messages: list[dict[str, Any]]) -> str:
        await asyncio.sleep(SAVED_EVERY)
        return history.made(key, messages) if key else ""

    listed = {"js": called("show"), **QUIET}
    saved = chat.change(save, [current, chat], made, trigger_mode="always_last", **QUIET)
    saved.then(None, [made, current], [current, earlier], js=called("save"), **QUIET)
    begun = at.page.load(opened, [before, current], [chat, current], js=called("opened"), **QUIET)
    begun.then(None, current, earlier, **listed)
    leave = {"js": CALLED.format("leave"), "cancels": answering, **QUIET}
    left = earlier.input(None, None, None, **leave)
    left = left.then(picked, [made, earlier], [chat, current], js=called("choose"), **QUIET)
    left.then(None, current, earlier, **listed)
    left = kept["new"].click(None, None, None, **leave)
    left.then(None, None, [chat, current, earlier], js=called("anew"), **QUIET)


def _offer(chat: Component, system: Component, kept: dict[str, Component]) -> None:
    """The conversation as a file: Markdown to read, JSON to fine-tune with."""
    text = gr.Textbox(visible="hidden")
    written = {
        "markdown": (lambda shown, _: history.as_markdown(shown), "shoal-chat.md", "text/markdown"),
        "json": (history.as_json, "shoal-chat.json", "application/json"),
    }
    for button, (write, name, kind) in written.items():
        made = kept[button].click(write, [chat, system], text, **QUIET)
        made.then(None, text, None, js=DOWNLOAD.format(kind=kind, name=name))


def _examples(assistant: Assistant, made: Words | None = None) -> Any:
    """First messages: of a model that was made for the page, or the page's own."""
    if made and made.examples:
        return [{"text": text, "display_text": text} for text in made.examples]
    # a copy, since Gradio writes into it
    return [{**copy.deepcopy(parts), "display_text": label} for label, parts in assistant.examples.items()]


def _chatbot(assistant: Assistant) -> Component:
    return gr.Chatbot(
        examples=_examples(assistant),
        show_label=False,
        label="Conversation",
        elem_id="chat",
        height="calc(100dvh - 200px)",
        min_height=320,
        layout="bubble",
        buttons=["copy"],
        latex_delimiters=[],
        placeholder=assistant.hint,
    )


def _textbox() -> Component:
    return gr.MultimodalTextbox(
        show_label=False,
        label="Message",
        placeholder=WRITE,
        file_types=list(IMAGES),
        sources=["upload"],
        max_lines=8,
        elem_id="message",
    )
