"""A call that an answer's end cuts off, wherever that is, in every protocol and every form of a call: it is told as cut, and
neither what frames it nor a piece of its JSON is text or arguments that nobody wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from shoal import presets
from shoal.api.served import ServedModel
from shoal.engine.events import Event, Request, Token
from shoal.engine.text import TextStream
from shoal.inputs.call_formats import OURS
from shoal.inputs.tokenizer import Tokenizer
from tests.unit.api.conftest import Scripted
from tests.unit.api.test_tools import ask
from tests.unit.open_weights import taught
from tests.unit.open_weights.taught import TOOLS

pytestmark = pytest.mark.anyio

ASK = [{"role": "user", "content": "How many fish?"}]
ARGUMENTS = '{"n": 3, "where": ["a } </tool", {"b": null}]}'
FUNCTIONS = [tool["function"] for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "add_fish"}}
RESPONSES = [{"type": "function", **function} for function in FUNCTIONS]
CLAUDE = [{"name": f["name"], "input_schema": f["parameters"]} for f in FUNCTIONS]
CHOICES = {  # of each protocol, by that of a chat
    "auto": ("auto", {"type": "auto"}),
    "required": ("required", {"type": "any"}),
    "named": ({"type": "function", "name": "add_fish"}, {"type": "tool", "name": "add_fish"}),
}


@pytest.fixture(scope="session", params=["ours", *sorted(taught.FORMATS)])
def served(request: pytest.FixtureRequest) -> ServedModel:
    if request.param != "ours":
        return taught.served(request.param)
    config = dataclasses.replace(presets.get("test").model, max_length=4096)
    return ServedModel("fish", config, Tokenizer.bytes_only())


class Stopping(Scripted):
    """Ends where a stop text is complete, as an engine does."""

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        text, made = TextStream(self.tokenizer, request.sampling.stop), 0
        for token in self.tokenizer.encode(self.reply)[: request.sampling.max_tokens]:
            said, ended = text.push(token)
            made += 1
            yield [Token(request.id, token, said, None, 4)]
            if ended:
                break
        yield [dataclasses.replace(self._finished(request, 4, made, 0.0), text=text.finish())]


@pytest.fixture
def engine(served: ServedModel) -> Scripted:
    its = served.tokenizer
    spoken: Any = SimpleNamespace(encode=getattr(its, "template_ids", its.encode), stream=its.stream)
    return Stopping(its if served.tokenizer.calls is None else spoken)


def written(served: ServedModel, choice: str) -> str:
    form = served.tokenizer.calls or OURS
    if choice == "named" and served.tokenizer.calls is None:
        return ARGUMENTS
    if choice == "required" and served.tokenizer.calls is None:
        return f'{{"name": "add_fish", "arguments": {ARGUMENTS}}}'
    said = "Let me look. " if choice == "auto" and not form.bare else ""
    return said + form.begin("add_fish") + ARGUMENTS + form.end


def said_only(text: str | None) -> None:
    """And, at most, one letter of a frame, which may be anything."""
    assert "Let me look.".startswith((text or "").removesuffix("<").strip()), text


@pytest.mark.parametrize("choice", [*CHOICES])
async def test_wherever_it_is_cut_it_is_told_as_cut(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel, choice: str
) -> None:
    engine.reply = written(served, choice)
    count = len(engine.tokenizer.encode(engine.reply))
    its = {"auto": "auto", "required": "required", "named": NAMED}[choice]
    for most in {*range(1, min(count, 40)), *range(40, count, 7), count - 1}:
        answer, _ = await ask(http, messages=ASK, tools=TOOLS, tool_choice=its, max_tokens=most)
        assert answer["finish_reason"] == "length", most
        said_only(answer["message"]["content"])
        for call in answer["message"].get("tool_calls", ()):
            assert ARGUMENTS.startswith(call["function"]["arguments"].strip()) or is_call(call["function"])
    for most in {*range(1, count, 7), count - 1}:
        await in_responses(http, CHOICES[choice][0], most)
        await in_messages(http, CHOICES[choice][1], most)


def sent(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


def is_call(function: dict[str, Any]) -> bool:
    return function["name"] == "add_fish" and json.loads(function["arguments"]) == json.loads(ARGUMENTS)


async def in_responses(http: httpx.AsyncClient, choice: Any, most: int) -> None:
    body = {"model": "fish", "input": ASK, "tools": RESPONSES, "tool_choice": choice, "max_output_tokens": most}
    whole = (await http.post("/v1/responses", json=body)).json()
    streamed = sent((await http.post("/v1/responses", json={**body, "stream": True})).text)[-1]["response"]
    for answer in (whole, streamed):
        assert (answer["status"], answer["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
        for item in answer["output"]:
            if item["type"] == "message":
                said_only(item["content"][0]["text"])
            elif item["status"] == "incomplete":
                assert ARGUMENTS.startswith(item["arguments"].strip())
            else:
                assert is_call(item)


async def in_messages(http: httpx.AsyncClient, choice: Any, most: int) -> None:
    body = {"model": "fish", "messages": ASK, "tools": CLAUDE, "tool_choice": choice, "max_tokens": most}
    whole = (await http.post("/v1/messages", json=body)).json()
    told = sent((await http.post("/v1/messages", json={**body, "stream": True})).text)
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta"]
    assert whole["stop_reason"] == told[-2]["delta"]["stop_reason"] == "max_tokens"
    for text in (*(b["text"] for b in whole["content"] if b["type"] == "text"), *(d.get("text") for d in deltas[:1])):
        said_only(text)
    uses = [block["input"] for block in whole["content"] if block["type"] == "tool_use"]
    assert all(use == json.loads(ARGUMENTS) for use in uses), "none, or all that was written"
    assert [json.loads(d["partial_json"]) for d in deltas if "partial_json" in d] == uses
    opened = [event["content_block"]["type"] for event in told if event["type"] == "content_block_start"]
    assert opened == [block["type"] for block in whole["content"]]


@pytest.mark.parametrize("choice", ["required", "named"])
async def test_a_forced_call_that_a_stop_text_cuts_is_no_call_to_run(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel, choice: str
) -> None:
    engine.reply = written(served, choice)
    its = NAMED if choice == "named" else "required"
    answer, _ = await ask(http, messages=ASK, tools=TOOLS, tool_choice=its, stop=['"where"'])
    assert answer["finish_reason"] == "stop"
    body = {"model": "fish", "messages": ASK, "tools": CLAUDE, "tool_choice": CHOICES[choice][1], "max_tokens": 400}
    whole = (await http.post("/v1/messages", json={**body, "stop_sequences": ['"where"']})).json()
    assert whole["content"] == [] and whole["stop_reason"] in ("stop_sequence", "end_turn")


@pytest.mark.parametrize("stop", ["\n", "{", '"name"', "add_", '"n"', "3", "}"])
async def test_a_free_call_that_a_stop_text_cuts_is_no_text(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel, stop: str
) -> None:
    engine.reply = written(served, "auto")
    if stop in engine.reply:
        answer, _ = await ask(http, messages=ASK, tools=TOOLS, stop=[stop])
        said_only(answer["message"]["content"])
        assert answer["finish_reason"] == "stop" and "tool_calls" not in answer["message"]
        body = {"model": "fish", "messages": ASK, "tools": CLAUDE, "max_tokens": 400, "stop_sequences": [stop]}
        whole = (await http.post("/v1/messages", json=body)).json()
        assert all(block["type"] == "text" for block in whole["content"])
        said_only("".join(block["text"] for block in whole["content"]))


async def test_text_about_calls_is_kept(http: httpx.AsyncClient, engine: Scripted, served: ServedModel) -> None:
    form = served.tokenizer.calls or OURS
    if form.close:
        engine.reply = f"Write {form.open} in front of it, and more."
        answer, _ = await ask(http, messages=ASK, tools=TOOLS, max_tokens=len(engine.tokenizer.encode(engine.reply)))
        assert (answer["message"]["content"], answer["finish_reason"]) == (engine.reply, "length")
