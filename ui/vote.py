"""Votes on answers, and better answers: the buttons below an answer, and the API's /v1/shoal/feedback, by which they reach what
a service captures. `vote.js` does what they do; of a service that captures nothing they are hidden.

Notable: what was voted is kept in the browser, by the answer's id, and so is there again with the conversation.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

import gradio as gr
import httpx
import openai

from ui import history, talk
from ui.site import QUIET, Component, Key, Site

ID = re.compile(r"[\w.:-]{1,100}")  # of an answer
CALLED = "(...given) => vote.{}(...given)"  # a function of vote.js
NAMES = {"rating", "correction"}
_GROUP = re.compile(r'<div class="votes( kept)? answer-([\w.:-]{1,100})" role="group">.*?</div>')


def buttons(id_: str, *, kept: bool) -> str:
    """What stands below the answer `id_`, as markup; `kept`: so are its texts, and a better answer can be learned from."""
    if not ID.fullmatch(id_):
        return ""
    # of classes and titles, since Gradio lets no other attributes through; `vote.js` adds those for readers of the screen
    return (
        f'<div class="votes{" kept" if kept else ""} answer-{html.escape(id_)}" role="group">'
        '<button type="button" class="up" title="Good answer"></button>'
        '<button type="button" class="down" title="Bad answer"></button>'
        '<button type="button" class="better">Write the better answer</button>'
        '<span class="told" role="status"></span></div>'
    )


def taken_out(markup: str) -> tuple[str, dict[str, Any]]:
    """`markup` without buttons, and of which answer they were: `id`, and whether it is `kept`."""
    found = _GROUP.search(markup)
    if found is None:
        return markup, {}
    return markup.replace(found[0], ""), {"id": found[2], "kept": found[1] is not None}


def keep_box() -> tuple[Component, Component]:
    """The choice to have texts kept, which is shown where the service may, and what the browser remembers of it."""
    box = gr.Checkbox(
        False, label="Keep what is written here, so that the model can learn from it", visible=False, elem_id="keep"
    )
    return box, gr.BrowserState("", storage_key="shoal-keep", secret=history.STORED_AS)


def build(at: Site, chat: Component, key: Key, keep: Component, remembered: Component) -> None:
    """The events of the buttons below the answers of `chat`, inside the Blocks that are open."""
    takes = gr.HTML("", elem_id="takes")  # style.css shows the buttons by it
    ballot, told = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    cast = gr.Button("Vote", visible="hidden", elem_id="cast")
    correct = gr.Button("Correct", visible="hidden", elem_id="correct")

    async def look(given: str, chosen: str) -> tuple[Any, Any]:
        """What the service takes of this key."""
        try:
            answer: httpx.Response = await at.client(given).get("/shoal/feedback", cast_to=httpx.Response)
            taken: dict[str, Any] = answer.json()
        except openai.OpenAIError:
            return "", gr.update(visible=False, value=False)
        if not taken["captured"]:
            return "", gr.update(visible=False, value=False)
        texts = bool(taken["texts"])
        info = f"For {taken['texts_days']} days, without e-mail addresses, telephone and card numbers; names stay."
        mark = f'<i class="{"takes texts" if texts else "takes"}"></i>'
        return mark, gr.update(visible=texts, value=texts and chosen == "yes", info=info)

    async def vote(ballot: str, given: str) -> str:
        """Gives it to the API; why it was not taken, as JSON."""
        said: dict[str, Any] = json.loads(ballot)
        body = {"id": str(said.get("id"))} | {name: said[name] for name in NAMES if said.get(name)}
        try:
            await at.client(given).post("/shoal/feedback", body=body, cast_to=httpx.Response)
        except openai.NotFoundError:
            return json.dumps({"id": said["id"], "fault": "The service does not know this answer any more."})
        except openai.OpenAIError as error:
            return json.dumps({"id": said["id"], "fault": talk.reason(error)})
        return json.dumps({"id": said["id"], "fault": ""})

    key.then(at, look, [remembered], [takes, keep])
    keep.input(lambda on: "yes" if on else "no", keep, remembered, **QUIET)
    sent = cast.click(vote, [ballot, key.box], told, js=CALLED.format("next"), trigger_mode="multiple", **QUIET)
    sent.success(None, told, None, js=CALLED.format("told"), **QUIET)
    sent.failure(None, None, None, js=CALLED.format("lost"), **QUIET)
    correct.click(None, chat, None, js=CALLED.format("write"), **QUIET)
