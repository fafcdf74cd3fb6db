"""Tools of a model whose own chat template knows them, over HTTP in every protocol: shown by it, read and guided as it
teaches."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from shoal.api.served import ServedModel
from shoal.inputs.call_formats import FORMATS
from tests.unit.api.conftest import Scripted
from tests.unit.api.test_tools import ask
from tests.unit.open_weights import taught
from tests.unit.open_weights.taught import TOOLS

pytestmark = pytest.mark.anyio

ASK = [{"role": "user", "content": "How many fish?"}]
ARGUMENTS = {"n": 3, "where": ["\u6f6e \U0001f41f", {"a": None}]}


@pytest.fixture(scope="session", params=sorted(taught.FORMATS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def served(family: str) -> ServedModel:
    return taught.served(family)


@pytest.fixture
def engine(served: ServedModel) -> Scripted:
    """What it says has the tokens of the model's own, control tokens too."""
    its = served.tokenizer
    spoken: Any = SimpleNamespace(encode=its.template_ids, stream=its.stream)
    return Scripted(spoken)


def written(served: ServedModel, name: str, arguments: Any) -> str:
    form = served.tokenizer.calls
    assert form is not None
    return form.begin(name) + json.dumps(arguments, ensure_ascii=False) + form.end


async def test_a_call_is_an_answer_in_every_protocol(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel
) -> None:
    form = served.tokenizer.calls
    said = "" if form is None or form.bare else "Let me look. "
    engine.reply = said + written(served, "add_fish", ARGUMENTS)
    choice, _ = await ask(http, messages=ASK, tools=TOOLS)
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", said.rstrip() or None)
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add_fish", ARGUMENTS)
    shown = engine.requests[0].prompt
    functions = [tool["function"] for tool in TOOLS]
    plain = [{"type": "function", **function} for function in functions]
    claude = [
        {"name": f["name"], "description": f.get("description"), "input_schema": f["parameters"]} for f in functions
    ]
    for url, body in (
        ("/v1/responses", {"input": ASK[0]["content"], "tools": plain}),
        ("/v1/messages", {"messages": ASK, "tools": claude, "max_tokens": 400}),
    ):
        for stream in (False, True):
            reply = await http.post(url, json={"model": "fish", "stream": stream, **body})
            assert reply.status_code == 200, reply.text
            assert "add_fish" in reply.text and "[TOOL_CALLS]" not in reply.text and "tool_call>" not in reply.text
        assert engine.requests[-1].prompt == shown, "one prompt, whatever the protocol"
    back = [*ASK, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "four-4711"}]
    again, _ = await ask(http, messages=back, tools=TOOLS)
    assert again["finish_reason"] == "tool_calls"
    prompt: Any = engine.requests[-1].prompt
    text = served.tokenizer.decode(prompt.ids)
    assert "four-4711" in text and "You can call functions" not in text and ARGUMENTS["where"][0] in text  # type: ignore[index]


async def test_a_forced_call_and_one_call(http: httpx.AsyncClient, engine: Scripted, served: ServedModel) -> None:
    engine.reply = written(served, "add_fish", ARGUMENTS)
    for choice in ("required", {"type": "function", "function": {"name": "add_fish"}}):
        answer, chunks = await ask(http, messages=ASK, tools=TOOLS, tool_choice=choice)
        (call,) = answer["message"]["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add_fish", ARGUMENTS)
        assert sum("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks) > 10, "streamed"
        guide = engine.requests[-1].sampling.guided
        assert guide is not None and guide.kind == "lark"
    form = served.tokenizer.calls
    assert form is not None
    await ask(http, messages=ASK, tools=TOOLS, parallel_tool_calls=False)
    assert engine.requests[-1].sampling.frame == ((form.open, form.close) if form.close else None)


async def test_without_tools_nothing_is_shown_and_nothing_is_a_call(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel
) -> None:
    engine.reply = written(served, "look", {})
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        reply = (await http.post("/v1/chat/completions", json={"model": "fish", "messages": ASK, **more})).json()
        message = reply["choices"][0]["message"]
        assert message["content"] == engine.reply and "tool_calls" not in message
        prompt: Any = engine.requests[-1].prompt
        assert "add_fish" not in served.tokenizer.decode(prompt.ids)


async def test_what_is_no_history_of_calls_is_a_400(http: httpx.AsyncClient, engine: Scripted) -> None:
    def turns(arguments: str, role: str = "assistant") -> list[dict[str, Any]]:
        call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": arguments}}
        return [
            *ASK,
            {"role": role, "content": "x", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "x"},
        ]

    async def status(messages: list[dict[str, Any]]) -> int:
        reply = await http.post("/v1/chat/completions", json={"model": "fish", "messages": messages, "tools": TOOLS})
        return reply.status_code

    assert await status(turns("{}")) == 200
    for messages in (turns("{}")[2:], turns("{}", "user"), [*ASK, turns("{}")[2]]):
        assert await status(messages) == 400
    for depth in (99, 300, 900, 5000):  # lists in lists, which a template may not print, or Python not read
        assert await status(turns("[" * depth + "]" * depth)) in (200, 400)


async def test_an_answer_with_text_behind_its_call_goes_back_as_one_turn(
    http: httpx.AsyncClient, engine: Scripted, served: ServedModel
) -> None:
    """In every protocol, and to the same prompt."""
    engine.reply = written(served, "look", {}) + (
        " I look." if served.tokenizer.calls != FORMATS["llama"] else "; I look."
    )
    functions = [tool["function"] for tool in TOOLS]
    plain = [{"type": "function", **function} for function in functions]
    claude = [
        {"name": f["name"], "description": f.get("description"), "input_schema": f["parameters"]} for f in functions
    ]
    more: dict[str, Any] = {"model": "fish", "tools": plain}
    items = (await http.post("/v1/responses", json={**more, "input": ASK})).json()["output"]
    assert [item["type"] for item in items] == ["function_call", "message"]
    items.append({"type": "function_call_output", "call_id": items[0]["call_id"], "output": "two"})
    reply = await http.post("/v1/responses", json={**more, "input": [*ASK, *items]})
    assert reply.status_code == 200, reply.text
    body = {"model": "fish", "tools": claude, "max_tokens": 99}
    blocks = (await http.post("/v1/messages", json={**body, "messages": ASK})).json()["content"]
    assert [block["type"] for block in blocks] == ["tool_use", "text"]
    gave = {"type": "tool_result", "tool_use_id": blocks[0]["id"], "content": "two"}
    turns = [*ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": [gave]}]
    reply = await http.post("/v1/messages", json={**body, "messages": turns})
    assert reply.status_code == 200, reply.text
    shown = [served.tokenizer.decode(request.prompt.ids) for request in engine.requests]
    if served.tokenizer.calls != FORMATS["mistral"]:  # whose template shows the ids of calls
        assert shown[1] == shown[3]
    assert shown[1].count("two") == 1
