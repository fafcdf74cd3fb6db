"""Votes on answers, and better answers: what becomes of the buttons below an answer (`bubbles.votes`). `vote.js` hears them
and gives each vote to the API's /v1/shoal/feedback through here; of a service that captures nothing they are hidden.

Notable: what was voted is kept in the browser, by the answer's id, and so is there again with the conversation.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import httpx
import openai

from ui import history, talk
from ui.site import QUIET, Component, Site

CALLED = "(...given) => vote.{}(...given)"  # a function of vote.js
NAMES = {"rating", "correction"}


def keep_box() -> tuple[Component, Component]:
    """The choice to have texts kept, which is shown where the service may, and what the browser remembers of it."""
    box = gr.Checkbox(
        False, label="Keep what is written here, so that the model can learn from it", visible=False, elem_id="keep"
    )
    return box, gr.BrowserState("", storage_key="shoal-keep", secret=history.STORED_AS)


def build(at: Site, chat: Component, keep: Component, remembered: Component) -> None:
    """The events of the buttons below the answers of `chat`, inside the Blocks that are open."""
    takes = gr.HTML("", elem_id="takes")  # style.css shows the buttons by it
    ballot, told = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    cast = gr.Button("Vote", visible="hidden", elem_id="cast")
    correct = gr.Button("Correct", visible="hidden", elem_id="correct")

    async def look(request: gr.Request, chosen: str) -> tuple[Any, Any]:
        """What the service takes of this key."""
        try:
            answer: httpx.Response = await at.client(request).get("/shoal/feedback", cast_to=httpx.Response)
            taken: dict[str, Any] = answer.json()
        except openai.OpenAIError:
            return "", gr.update(visible=False, value=False)
        if not taken["captured"]:
            return "", gr.update(visible=False, value=False)
        texts = bool(taken["texts"])
        info = f"For {taken['texts_days']} days, without e-mail addresses, telephone and card numbers; names stay."
        mark = f'<i class="{"takes texts" if texts else "takes"}"></i>'
        return mark, gr.update(visible=texts, value=texts and chosen == "yes", info=info)

    async def vote(ballot: str, request: gr.Request) -> str:
        """Gives it to the API; why it was not taken, as JSON."""
        said: dict[str, Any] = json.loads(ballot)
        id_ = str(said.get("id"))
        body = {"id": id_} | {name: said[name] for name in NAMES if said.get(name)}
        try:
            await at.client(request).post("/shoal/feedback", body=body, cast_to=httpx.Response)
        except openai.NotFoundError:
            return json.dumps({"id": id_, "fault": "The service does not know this answer any more."})
        except openai.OpenAIError as error:
            return json.dumps({"id": id_, "fault": talk.reason(error)})
        return json.dumps({"id": id_, "fault": ""})

    at.page.load(look, remembered, [takes, keep], **QUIET)
    keep.input(lambda on: "yes" if on else "no", keep, remembered, **QUIET)
    sent = cast.click(vote, ballot, told, js=CALLED.format("next"), trigger_mode="multiple", **QUIET)
    sent.success(None, told, None, js=CALLED.format("told"), **QUIET)
    sent.failure(None, None, None, js=CALLED.format("lost"), **QUIET)
    correct.click(None, chat, None, js=CALLED.format("write"), **QUIET)
