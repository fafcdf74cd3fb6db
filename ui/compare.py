"""The comparison: one prompt at two or more depths, or of two or more models, with the time and the speed of each."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr
import openai

from ui import bubbles, site, talk
from ui.chat import LOST
from ui.look import Place
from ui.site import QUIET, Component, Site
from ui.talk import Card, Said, Settings
from ui.uploads import IMAGES

PLACE = Place("Compare", "compare", "tools")
MOST, AT_FIRST = 4, 2  # answers beside each other
MOST_TOKENS = 64
TOLERANCES = (0.05, 0.2)  # nats a token, beside the depths
WITHIN = "within "  # and then one of them: as a depth is picked
TOGETHER, IN_TURN = "at the same time", "one after another"
MAY_LOSE = (
    "What an answer may lose is in nats a token, beside full depth: with 0.05 each token is a twentieth less likely in the "
    f"mean. {LOST}"
)
SHARED = "Together they share the machine."
IDLE: dict[str, Any] = {"submit_btn": "Compare", "stop_btn": False}  # one button, which does what can be done now
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"}
STOPPED = '<div class="facts">stopped</div>'  # before its first word
ASKING = '<p class="note" role="status">Waiting for the first word…'
# it went with the button that was pressed
FOCUS = "() => document.activeElement === document.body && document.querySelector('#prompt {}')?.focus()"


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    with gr.Row(equal_height=True, elem_id="ask"):
        prompt = gr.MultimodalTextbox(
            label="Prompt",
            placeholder="One prompt for all, with a picture if you like",
            file_types=list(IMAGES),
            sources=["upload"],
            **IDLE,
            lines=2,
            elem_id="prompt",
        )
    with gr.Row(equal_height=True):
        columns = site.judged_by_the_api(
            gr.Radio([2, 3, 4], value=AT_FIRST, label="Answers", elem_id="columns", scale=2, min_width=160)
        )
        turns = site.judged_by_the_api(
            gr.Radio(
                [TOGETHER, IN_TURN],
                value=TOGETHER,
                label="Run them",
                info=SHARED,
                elem_id="turns",
                scale=4,
                min_width=300,
            )
        )
        most = gr.Slider(1, MOST_TOKENS, value=MOST_TOKENS, step=1, label="Most tokens", buttons=[], scale=3)
    with gr.Accordion("More settings", open=False), gr.Row():
        temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", buttons=[])
        seed = gr.Number(1, label="Seed", precision=0, minimum=0, info="The same for all.")
    lost = gr.HTML(f'<p class="note">{MAY_LOSE}</p>', visible=False)  # until a model has depths to draft with
    with gr.Row(equal_height=True, elem_id="panes"):
        panes = [_pane(number) for number in range(MOST)]
    columns.change(_visible, columns, [box for box, *_ in panes], **QUIET)
    picks = [pick for _, model, depth, _ in panes for pick in (model, depth)]
    answers = [answer for *_, answer in panes]
    _describe(at, head, picks, [most, lost])
    asked = prompt.submit(lambda: gr.update(**BUSY), None, prompt, **QUIET)
    asked.then(None, None, None, js=FOCUS.format(".stop-button"))
    inputs = [prompt, columns, turns, most, temperature, seed, *picks]
    running = asked.then(_run(at), inputs, answers, concurrency_limit=None, **QUIET)
    # whether they came to their end or were stopped; when the stop is pressed, the last words are still on their way
    ended = running.then(_ended, answers, [prompt, *answers], **QUIET)
    ended.then(None, None, None, js=FOCUS.format("textarea"))
    prompt.stop(None, None, None, cancels=[running])


async def beside(streams: Sequence[AsyncGenerator[Said, None]], *, together: bool) -> AsyncIterator[list[Said | None]]:
    """The states of all `streams` as they come, None before the first of each. Closing it closes them all."""
    states: list[Said | None] = [None] * len(streams)
    if not together:
        for number, stream in enumerate(streams):
            async with aclosing(stream):
                async for state in stream:
                    states[number] = state
                    yield list(states)
        return
    changed = asyncio.Event()

    async def pump(number: int) -> None:
        async with aclosing(streams[number]) as stream:
            async for state in stream:
                states[number] = state
                changed.set()

    tasks = [asyncio.create_task(pump(number)) for number in range(len(streams))]
    whole = asyncio.gather(*tasks)
    whole.add_done_callback(lambda _: changed.set())
    try:
        while not whole.done():
            await changed.wait()
            changed.clear()
            yield list(states)
        await whole  # raises what a stream raised
        yield list(states)  # what came while the last states were taken
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _pane(number: int) -> tuple[Component, Component, Component, Component]:
    """(the box of one answer, its model, its depth, the answer)."""
    name = "ABCD"[number]
    with gr.Column(min_width=240, visible=number < AT_FIRST, elem_classes="pane") as box:
        gr.HTML(f'<h2 class="letter">{name}</h2>')
        model = site.judged_by_the_api(gr.Dropdown([], label=f"Model of {name}", visible=False, filterable=False))
        depth = site.judged_by_the_api(
            gr.Dropdown([("auto, by the question", "auto")], value="auto", label=f"Depth of {name}", filterable=False)
        )
        answer = gr.HTML(_waiting(), elem_id=f"answer-{name}")
    return box, model, depth, answer


def _depths(card: Card) -> list[tuple[str, str]]:
    """Choices of depth, and of what an answer may lose where the model has depths to draft with: (label, value)."""
    within = [(f"auto, may lose {nats:g} nats a token", f"{WITHIN}{nats:g}") for nats in TOLERANCES]
    return site.depths(card) + (within if len(card.depths) > 1 else [])


def _settings(picked: str, most: int, temperature: float, seed: int | None) -> Settings:
    """Of an answer at the depth `picked`, a value of `_depths`."""
    if picked.startswith(WITHIN):
        return Settings("auto", most, temperature, seed=seed, tolerance=float(picked.removeprefix(WITHIN)))
    return Settings(picked, most, temperature, seed=seed)


def _visible(columns: int) -> list[Any]:
    return [gr.update(visible=number < columns) for number in range(MOST)]


def _describe(at: Site, head: Component, picks: Sequence[Component], others: Sequence[Component]) -> None:
    """What the page shows of the models: by default the shallowest answer stands beside the deepest. `others`: the bound on
    tokens, and what is said of tolerances."""

    async def describe(request: gr.Request) -> list[Any]:
        try:
            cards = await at.cards(request)
        except openai.OpenAIError as error:
            said = at.header(PLACE, request, talk.reason(error), fault=True)
            return [said, *[gr.skip()] * (len(picks) + len(others))]
        card = cards[0]
        names = [(site.label(card), card.name) for card in cards]
        order = [name for name in card.depths if name != "full"]
        first = [order[0] if order else "full", "full", *order[1:], "auto", "auto", "auto"]
        updates = []
        for number in range(MOST):
            other = cards[min(number, len(cards) - 1)]  # models differ, if there are some
            updates.append(gr.update(choices=names, value=other.name, visible=len(cards) > 1))
            updates.append(gr.update(choices=_depths(other), value="full" if len(cards) > 1 else first[number]))
        limit = gr.update(maximum=card.context - 1, value=min(MOST_TOKENS, card.context // 2))
        told = gr.update(visible=any(len(card.depths) > 1 for card in cards))
        return [at.header(PLACE, request, site.all_of(cards)), *updates, limit, told]

    async def described(request: gr.Request, picked: str, depth: str) -> Any:
        try:
            card = site.of(await at.cards(request), picked)
            choices = _depths(card)
            return gr.update(choices=choices, value=depth if depth in [value for _, value in choices] else "auto")
        except openai.OpenAIError:
            return gr.skip()  # the answer will say so

    at.page.load(describe, None, [head, *picks, *others], **QUIET)
    for model, depth in zip(picks[::2], picks[1::2], strict=True):
        model.input(described, [model, depth], depth, **QUIET)


def _run(at: Site) -> Any:
    async def run(
        prompt: dict[str, Any],
        columns: int,
        turns: str,
        most: float,
        temperature: float,
        seed: float | None,
        request: gr.Request,
        *picks: str,
    ) -> AsyncIterator[list[str]]:
        if not (prompt["text"].strip() or prompt["files"]):
            yield [bubbles.fault("Write a prompt first."), *[_waiting()] * (MOST - 1)]
            return
        if str(bubbles.LOST_PICTURE) in prompt["files"]:
            yield [
                bubbles.fault("The server does not have this picture any more: add it once more."),
                *[_waiting()] * (MOST - 1),
            ]
            return
        try:
            cards = await at.cards(request)
        except openai.OpenAIError as error:
            yield [bubbles.fault(talk.reason(error)), *[_waiting()] * (MOST - 1)]
            return
        asked = bubbles.messages([], prompt)
        chosen = list(zip(picks[::2], picks[1::2], strict=True))[:columns]
        streams = []
        for model, depth in chosen:
            settings = _settings(depth, int(most), temperature, None if seed is None else int(seed))
            streams.append(talk.stream(at.client(request), site.of(cards, model), asked, settings))
        yield [_asking()] * columns + [_waiting()] * (MOST - columns)
        async with aclosing(beside(streams, together=turns == TOGETHER)) as states:  # type: ignore[type-var]
            async for now in states:
                yield [_shown(state) for state in now] + [_waiting()] * (MOST - columns)

    return run


def _waiting() -> str:
    return '<p class="note">The answer comes here.</p>'


def _asking(waits: float | None = None) -> str:
    """That no word has come yet, and for how long; who hears the page is told once."""
    seconds = f'<span aria-hidden="true"> {waits:.0f} s</span>' if waits else ""
    return f"{ASKING}{seconds}</p>"


def _ended(*shown: str) -> list[Any]:
    """The button that begins, and the answers; those that did not begin are marked."""
    return [gr.update(**IDLE), *[STOPPED if answer.startswith(ASKING) else answer for answer in shown]]


def _shown(state: Said | None) -> str:
    if state is None or not (state.text or state.whole or state.fault):
        return _asking(state.waits if state else None)
    text = f'<div class="answer">{html.escape(state.text)}</div>' if state.text or not state.fault else ""
    return text + (f'<div role="status">{bubbles.beneath(state)}</div>' if state.whole else bubbles.beneath(state))
