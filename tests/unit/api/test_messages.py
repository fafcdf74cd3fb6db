"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's bodies, events and errors, over the same engine as a chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.api.auth import ApiKeys
from shoal.api.served import ServedModel
from shoal.engine.events import Finished
from shoal.errors import EngineDeadError, GenerationError, QueueFullError
from tests.unit.api.test_chat import URL as CHAT_URL
from tests.unit.api.test_chat import png
from tests.unit.api.test_tools import CALL

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools

URL = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "fish", "max_tokens": 32, "messages": HI}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
LOG = {"name": "log", "description": "does log", "input_schema": SCHEMA}
DATA = png().partition(",")[2]
CALLED = {"id": "c1", "type": "function", "function": {"name": "log", "arguments": '{"n": 7}'}}
USE = {"type": "tool_use", "id": "c1", "name": "log", "input": {"n": 7}}
CACHED = {"cache_control": {"type": "ephemeral"}}
SOURCE = {"type": "base64", "media_type": "image/png", "data": DATA}
IMAGE = {"type": "image", "source": SOURCE}
ASKED = {"role": "assistant", "content": [USE]}
RESULT = {"type": "tool_result", "tool_use_id": "c1"}
FIRST = "messages[0].content[0]"


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*blocks]}


def said(text: str) -> list[dict[str, Any]]:
    """The payloads of a stream; each event is named by its type."""
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        payload = json.loads(data.removeprefix("data: "))
        assert name == f"event: {payload['type']}"
        found.append(payload)
    return found


async def ask(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post(URL, json={**BODY, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


class TestPrompts:
    """Each body is read as the chat that says the same."""

    @pytest.mark.parametrize(
        ("messages", "chat", "fields"),
        [
            (HI, HI, {}),
            (
                [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}]}],
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": png()}},
                            {"type": "text", "text": "b"},
                        ],
                    }
                ],
                {},
            ),
            (HI, [{"role": "system", "content": "be brief"}, *HI], {"system": "be brief"}),
            (
                HI,
                [{"role": "system", "content": "be brief"}, *HI],
                {"system": [{"type": "text", "text": "be ", **CACHED}, {"type": "text", "text": "brief"}]},
            ),
            (
                [
                    *HI,
                    {"role": "assistant", "content": [{"type": "text", "text": "so"}, USE]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "done"}]},
                            {"type": "text", "text": "and?"},
                        ],
                    },
                ],
                [
                    *HI,
                    {"role": "assistant", "content": "so", "tool_calls": [CALLED]},
                    {"role": "tool", "tool_call_id": "c1", "content": "done"},
                    {"role": "user", "content": "and?"},
                ],
                {},
            ),
            (
                [
                    *HI,
                    ASKED,
                    user({**RESULT, "content": "no", "is_error": True}),
                ],
                [
                    *HI,
                    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                    {"role": "tool", "tool_call_id": "c1", "content": "Error: no"},
                ],
                {},
            ),
        ],
    )  # fmt: skip
    async def test_is_that_of_the_chat(
        self, http: httpx.AsyncClient, engine: Any, messages: Any, chat: Any, fields: dict[str, Any]
    ) -> None:
        await ask(http, messages=messages, **fields)
        assert (await http.post(CHAT_URL, json={"model": "fish", "messages": chat})).status_code == 200
        mine, theirs = engine.requests
        assert mine.prompt.ids == theirs.prompt.ids and mine.prompt.ids
        counted = await http.post(COUNT, json={"model": "fish", "messages": messages, **fields})
        assert counted.json() == {"input_tokens": len(mine.prompt.ids)}

    async def test_the_answer_goes_on_with_what_the_assistant_began(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        await ask(http, messages=[*HI, {"role": "assistant", "content": "the sea"}])
        assert engine.requests[0].prompt.ids[-7:] == served.tokenizer.encode("the sea")

    async def test_tools_are_told_and_guided_as_those_of_a_chat(self, http: httpx.AsyncClient, engine: Any) -> None:
        function = {"name": "log", "description": "does log", "parameters": SCHEMA}
        for mine, theirs in (
            ({"type": "auto"}, "auto"),
            ({"type": "any"}, "required"),
            ({"type": "tool", "name": "log"}, {"type": "function", "function": {"name": "log"}}),
            ({"type": "none"}, "none"),
        ):
            await ask(http, tools=[LOG], tool_choice=mine)
            chat = {"model": "fish", "messages": HI, "tools": [{"type": "function", "function": function}]}
            await http.post(CHAT_URL, json={**chat, "tool_choice": theirs})
            one, other = engine.requests[-2:]
            assert (one.prompt.ids, one.sampling.guided) == (other.prompt.ids, other.sampling.guided)

    async def test_settings_reach_the_engine(self, http: httpx.AsyncClient, engine: Any) -> None:
        await ask(
            http, temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["x", "yz"], depth="shallow", max_tokens=9,
            metadata={"user_id": "u7"},
        )  # fmt: skip
        request = engine.requests[-1]
        s = request.sampling
        assert (s.temperature, s.top_p, s.top_k, s.stop, s.max_tokens) == (0.5, 0.9, 7, ("x", "yz"), 9)
        assert request.depth == "shallow"
        for effort, depth in (("low", "shallow"), ("medium", "auto"), ("high", "full")):
            await ask(http, output_config={"effort": effort})
            assert engine.requests[-1].depth == depth
        await ask(http, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
        assert json.loads(engine.requests[-1].sampling.guided.spec) == SCHEMA

    async def test_hints_are_taken_and_named(self, http: httpx.AsyncClient) -> None:
        hints = {
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "messages": [user({"type": "text", "text": "a", **CACHED})],
        }
        reply = await http.post(URL, json={**BODY, **hints})
        told = {"thinking", "messages[].content[].cache_control"}
        assert set(reply.headers["x-shoal-unused"].split(", ")) == told
        reply = await http.post(URL, json={**BODY, "thinking": {"type": "disabled"}})
        assert "x-shoal-unused" not in reply.headers


class TestAnswers:
    async def test_a_whole_one(self, http: httpx.AsyncClient, engine: Any) -> None:
        answer = await ask(http)
        count, prompt = len(engine.reply.encode()), len(engine.requests[0].prompt.ids)
        assert answer.pop("id").startswith("msg_") and answer["usage"].pop("depth")
        assert answer == {
            "type": "message", "role": "assistant", "model": "fish", "stop_reason": "end_turn", "stop_sequence": None,
            "content": [{"type": "text", "text": engine.reply, "citations": None}],
            "usage": {
                "input_tokens": prompt - 3, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0,
                "output_tokens": count,
            },
        }  # fmt: skip

    @pytest.mark.parametrize("at_once", [1, 5, 100])
    @pytest.mark.parametrize(
        "reply",
        ["Hello, fish! ¿ok?", CALL, f"so {CALL}{CALL.replace('7', '8')} and", f"a {CALL}", "", '<tool_call>{"na'],
    )
    async def test_a_stream_says_the_same_in_the_protocol_s_order(
        self, http: httpx.AsyncClient, engine: Any, reply: str, at_once: int
    ) -> None:
        engine.reply, engine.at_once = reply, at_once
        whole = await ask(http, tools=[LOG], max_tokens=500)
        streamed = await http.post(URL, json={**BODY, "tools": [LOG], "max_tokens": 500, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        first, *middle, delta, last = said(streamed.text)
        assert (first["type"], first["message"]["content"], last) == ("message_start", [], {"type": "message_stop"})
        assert first["message"]["stop_reason"] is None and first["message"]["usage"]["output_tokens"] == 0
        assert delta["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
        assert delta["usage"] == whole["usage"]
        blocks: list[dict[str, Any]] = []
        opened = None
        for event in middle:
            if event["type"] == "content_block_start":
                assert opened is None and event["index"] == len(blocks)
                opened = event["index"]
                blocks.append({**event["content_block"], "written": ""})
            elif event["type"] == "content_block_delta":
                assert event["index"] == opened
                kind = event["delta"]["type"]
                assert kind == ("text_delta" if blocks[-1]["type"] == "text" else "input_json_delta")
                blocks[-1]["written"] += event["delta"]["text" if kind == "text_delta" else "partial_json"]
            else:
                assert (event["type"], event["index"]) == ("content_block_stop", opened)
                opened = None
        assert opened is None
        for block in blocks:
            written = block.pop("written")
            block |= {"text": written} if block["type"] == "text" else {"input": json.loads(written)}
        strip = [{k: v for k, v in block.items() if k != "id"} for block in blocks]
        assert strip == [{k: v for k, v in block.items() if k != "id"} for block in whole["content"]]
        assert whole["stop_reason"] == ("tool_use" if "tool_use" in {b["type"] for b in blocks} else "end_turn")

    async def test_why_it_ended(self, http: httpx.AsyncClient, engine: Any, served: ServedModel) -> None:
        assert (await ask(http, max_tokens=3))["stop_reason"] == "max_tokens"
        engine.reply = "a" * 20_000
        assert (await ask(http, max_tokens=10**9))["stop_reason"] == "model_context_window_exceeded"
        engine.reply = "so END"
        script = engine.batches

        async def stopped(request: Any) -> Any:
            """As the engine holds a stop string back, and leaves it out."""
            async for events in script(request):
                for event in events:
                    if not isinstance(event, Finished):
                        event.text = event.text if event.text in "so " else ""
                yield events

        engine.batches = stopped
        for stops, told in ((["END"], "END"), (["X", "EN", "END"], "EN"), (["X"], None)):
            answer = await ask(http, stop_sequences=stops)
            expected = ("stop_sequence", told) if told else ("end_turn", None)
            assert (answer["stop_reason"], answer["stop_sequence"]) == expected


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"temperature": -1}, "temperature"),
            ({"stop_sequences": [""]}, "stop_sequences"),
            ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
            ({"top_k": -2}, "top_k"),
            ({"depth": "abyss"}, "depth"),
            ({"depth": "full", "output_config": {"effort": "low"}}, "depth"),
            ({"mcp_servers": [{}]}, "mcp_servers"),
            ({"max_token": 7}, "max_token"),
            ({"tools": [{"name": "w", "max_uses": 3, "type": "web_search_20250305"}]}, "tools[0].type"),
            ({"tools": [LOG, LOG]}, "tools"),
            ({"tools": [LOG], "tool_choice": {"type": "tool"}}, "tool_choice"),
            ({"tools": [LOG], "tool_choice": {"type": "tool", "name": "dig"}}, "tool_choice"),
            ({"tool_choice": {"type": "any"}}, "tool_choice"),
            ({"messages": [*HI, {"role": "system", "content": [IMAGE]}]}, "messages[1].content[0]"),
            ({"system": "s", "messages": [*HI, user({**IMAGE, "source": {**SOURCE, "data": "!"}})]}, "messages[1]"),
            ({"messages": [user({"type": "image", "source": {"type": "url", "url": "http://x"}})]}, f"{FIRST}.source.type"),
            ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, FIRST),
            ({"messages": [user(USE)]}, FIRST),
            ({"messages": [user({"type": "tool_result", "tool_use_id": "c9"})]}, f"{FIRST}.tool_use_id"),
            ({"messages": [*HI, ASKED, user({**RESULT, "content": [IMAGE]})]}, "messages[2].content[0].content"),
            ({"messages": [user({"type": "document"})]}, FIRST),
        ],
    )  # fmt: skip
    async def test_a_wrong_body_is_one_clear_line_in_their_envelope(
        self, http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str
    ) -> None:
        for stream in (False, True):
            reply = await http.post(URL, json={**BODY, **fields, "stream": stream})
            body = reply.json()
            assert (reply.status_code, body["type"]) == (400, "error"), body
            assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)
            assert body["request_id"] == reply.headers["x-request-id"] and "\n" not in body["error"]["message"]
        assert engine.requests == []

    async def test_each_status_has_their_type(self, connect: Callable[..., httpx.AsyncClient], engine: Any) -> None:
        http = connect(api_keys=ApiKeys(["sk-1"]))
        key = {"x-api-key": "sk-1"}

        async def kind(status: int, headers: dict[str, str] = key, **fields: Any) -> str:
            reply = await http.post(URL, json={**BODY, **fields}, headers=headers)
            assert (reply.status_code, reply.json()["type"]) == (status, "error"), reply.text
            return reply.json()["error"]["type"]

        assert await kind(401, {}) == await kind(401, {"x-api-key": "sk-2"}) == "authentication_error"
        assert await kind(404, model="shark") == "not_found_error"
        for error, status, told in (
            (QueueFullError("full"), 429, "rate_limit_error"),
            (EngineDeadError("dead"), 503, "overloaded_error"),
            (GenerationError("no"), 500, "api_error"),
            (ZeroDivisionError("secret"), 500, "api_error"),
        ):
            engine.raises = error
            assert await kind(status) == told
        assert (await http.get("/v1/models", headers=key)).status_code == 200
        assert "type" not in (await http.get("/v1/models")).json()  # others keep OpenAI's

    async def test_after_the_first_token_an_error_is_an_event(self, http: httpx.AsyncClient, engine: Any) -> None:
        engine.ends = Finished("x", "error", error=GenerationError("it failed"))
        *_, last = said((await http.post(URL, json={**BODY, "stream": True})).text)
        assert (last["type"], last["error"]["type"]) == ("error", "api_error")
