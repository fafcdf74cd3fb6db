"""Run beside a block of Python in an answer: the API runs it in its sandbox, where the service was told to (`--run-code`).
`program.js` puts the button there and shows what came out; of a service that runs nothing there is none.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import httpx
import openai

from ui import talk
from ui.site import QUIET, Component, Site

CALLED = "(...given) => program.{}(...given)"  # a function of program.js
ENDS = {
    "time": "It was ended: its time was over.",
    "output": "It was ended: it printed too much.",
    "killed": "It was ended by the system.",
}


def build(at: Site) -> None:
    """The events of the buttons, inside the Blocks that are open."""
    runs = gr.HTML("", elem_id="runs")  # program.js puts buttons where it has a mark
    sent, told = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
    start = gr.Button("Run", visible="hidden", elem_id="start-program")

    async def look(request: gr.Request) -> str:
        """Whether the service runs programs of this key."""
        try:
            await at.client(request).get("/shoal/programs", cast_to=httpx.Response)
        except openai.OpenAIError:
            return ""
        return '<i class="runs"></i>'

    async def run(program: str, request: gr.Request) -> str:
        """What became of it, or why it was not run, as JSON."""
        try:
            body = {"program": program}
            answer: httpx.Response = await at.client(request).post("/shoal/programs", body=body, cast_to=httpx.Response)
        except openai.OpenAIError as error:
            return json.dumps({"fault": talk.reason(error)})
        return json.dumps(said(answer.json()))

    at.page.load(look, None, runs, **QUIET)
    done: Component = start.click(run, sent, told, js=CALLED.format("next"), **QUIET)
    done.success(None, told, None, js=CALLED.format("told"), **QUIET)
    done.failure(None, None, None, js=CALLED.format("lost"), **QUIET)


def said(ran: dict[str, Any]) -> dict[str, str]:
    """What the page shows of a run: `out`, and `fault` for how it ended where that was not well."""
    errors = str(ran["err"]).strip()
    if ran["how"] == "failed" and not errors:
        errors = f"It ended with exit code {ran['code']}."
    return {"out": str(ran["out"]), "fault": "\n".join(filter(None, (errors, ENDS.get(ran["how"], ""))))}
