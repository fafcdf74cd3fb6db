"""POST /v1/responses: OpenAI's newer bodies, items and events, over the same engine as a chat."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from shoal.engine.events import Finished
from shoal.errors import GenerationError, QueueFullError
from tests.unit.api.test_chat import URL as CHAT_URL
from tests.unit.api.test_chat import png
from tests.unit.api.test_messages import CALLED, HI, SCHEMA, said
from tests.unit.api.test_tools import CALL

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools

URL = "/v1/responses"
BODY: dict[str, Any] = {"model": "fish", "input": "hi"}
LOG = {"type": "function", "name": "log", "description": "does log", "parameters": SCHEMA}
USE = {"type": "function_call", "call_id": "c1", "name": "log", "arguments": '{"n": 7}'}
DONE = {"type": "function_call_output", "call_id": "c1", "output": "done"}
IMAGE = {"type": "input_image", "image_url": png()}
AWAY = {**IMAGE, "image_url": "http://x"}
SAID = {
    "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
    "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}],
}  # fmt: skip


async def ask(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post(URL, json={**BODY, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


class TestPrompts:
    """Each body is read as the chat that says the same."""

    @pytest.mark.parametrize(
        ("fields", "chat"),
        [
            ({}, HI),
            ({"input": HI}, HI),
            ({"instructions": "be brief"}, [{"role": "system", "content": "be brief"}, *HI]),
            (
                {"input": [{"role": "developer", "content": "be brief"}, *HI]},
                [{"role": "system", "content": "be brief"}, *HI],
            ),
            (
                {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, IMAGE]}]},
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": png()}},
                        ],
                    }
                ],
            ),
            (
                {"input": [*HI, SAID, USE, DONE, {"role": "user", "content": "and?"}]},
                [
                    *HI,
                    {"role": "assistant", "content": "so", "tool_calls": [CALLED]},
                    {"role": "tool", "tool_call_id": "c1", "content": "done"},
                    {"role": "user", "content": "and?"},
                ],
            ),
            (
                {"input": [*HI, USE, {**USE, "call_id": "c2"}, DONE, {**DONE, "call_id": "c2"}]},
                [
                    *HI,
                    {"role": "assistant", "content": None, "tool_calls": [CALLED, {**CALLED, "id": "c2"}]},
                    {"role": "tool", "tool_call_id": "c1", "content": "done"},
                    {"role": "tool", "tool_call_id": "c2", "content": "done"},
                ],
            ),
        ],
    )
    async def test_is_that_of_the_chat(
        self, http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], chat: Any
    ) -> None:
        await ask(http, **fields)
        assert (await http.post(CHAT_URL, json={"model": "fish", "messages": chat})).status_code == 200
        mine, theirs = engine.requests
        assert mine.prompt.ids == theirs.prompt.ids and mine.prompt.ids

    async def test_tools_and_formats_are_told_and_guided_as_those_of_a_chat(
        self, http: httpx.AsyncClient, engine: Any
    ) -> None:
        function = {key: LOG[key] for key in ("name", "description", "parameters")}
        tools = [{"type": "function", "function": function}]
        shape = {"name": "x", "description": "a catch", "schema": SCHEMA}
        named = {"type": "function", "name": "log"}
        for mine, theirs in (
            ({"tools": [LOG]}, {"tools": tools}),
            ({"tools": [LOG], "tool_choice": "required"}, {"tools": tools, "tool_choice": "required"}),
            (
                {"tools": [LOG], "tool_choice": named},
                {"tools": tools, "tool_choice": {"type": "function", "function": {"name": "log"}}},
            ),
            (
                {"text": {"format": {"type": "json_schema", **shape}}},
                {"response_format": {"type": "json_schema", "json_schema": shape}},
            ),
            ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
            ({"reasoning": {"effort": "low"}}, {"reasoning_effort": "low"}),
        ):
            await ask(http, **mine)
            reply = await http.post(CHAT_URL, json={"model": "fish", "messages": HI, **theirs})
            assert reply.status_code == 200, reply.text
            one, other = engine.requests[-2:]
            assert (one.prompt.ids, one.sampling.guided) == (other.prompt.ids, other.sampling.guided)
            assert one.depth == other.depth

    async def test_settings_reach_the_engine_and_hints_are_named(self, http: httpx.AsyncClient, engine: Any) -> None:
        body = {**BODY, "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9, "depth": "shallow", "seed": 3}
        hints = {"safety_identifier": "u", "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}}
        reply = await http.post(URL, json={**body, **hints, "store": False, "background": False})
        s = engine.requests[-1].sampling
        assert (s.temperature, s.top_p, s.max_tokens, s.seed) == (0.5, 0.9, 9, 3)
        assert set(reply.headers["x-shoal-unused"].split(", ")) == {"safety_identifier", "include", "text.verbosity"}
        assert (await http.post(URL, json=body)).headers.get("x-shoal-unused") is None


class TestAnswers:
    async def test_a_whole_one(self, http: httpx.AsyncClient, engine: Any) -> None:
        answer = await ask(http, metadata={"run": "7"}, instructions="be brief")
        assert (answer["object"], answer["status"], answer["incomplete_details"]) == ("response", "completed", None)
        (item,) = answer["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        assert item["content"] == [{"type": "output_text", "text": engine.reply, "annotations": [], "logprobs": []}]
        usage = answer["usage"]
        assert usage["input_tokens"] == len(engine.requests[0].prompt.ids)
        assert usage["input_tokens_details"]["cached_tokens"] == 3
        assert usage["output_tokens"] == len(engine.reply.encode())
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert (answer["metadata"], answer["instructions"], answer["store"]) == ({"run": "7"}, "be brief", False)
        cut = await ask(http, max_output_tokens=3)
        assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert cut["output"][-1]["status"] == "incomplete"

    @pytest.mark.parametrize("at_once", [1, 5, 100])
    @pytest.mark.parametrize(
        "reply",
        ["Hello, fish! ¿ok?", CALL, f"so {CALL}{CALL.replace('7', '8')} and", f"a {CALL}", "", '<tool_call>{"na'],
    )
    async def test_a_stream_says_the_same_in_openai_s_order(
        self, http: httpx.AsyncClient, engine: Any, reply: str, at_once: int
    ) -> None:
        engine.reply, engine.at_once = reply, at_once
        whole = await ask(http, tools=[LOG])
        streamed = await http.post(URL, json={**BODY, "tools": [LOG], "stream": True})
        found = said(streamed.text)
        assert [event["sequence_number"] for event in found] == [*range(len(found))]
        first, second, *middle, last = found
        assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
        assert (first["response"]["status"], first["response"]["output"]) == ("in_progress", [])
        assert last["type"] == "response.completed"
        items: list[dict[str, Any]] = []
        written = ""
        for event in middle:
            kind = event["type"].removeprefix("response.")
            assert event["output_index"] == len(items)
            if kind == "output_item.added":
                written, opened = "", event["item"]
                assert opened["status"] == "in_progress"
            elif kind in ("output_text.delta", "function_call_arguments.delta"):
                assert event["item_id"] == opened["id"]
                written += event["delta"]
            elif kind in ("output_text.done", "function_call_arguments.done"):
                assert event["text" if kind == "output_text.done" else "arguments"] == written
            elif kind == "output_item.done":
                assert event["item"]["id"] == opened["id"]
                items.append(event["item"])
            else:
                assert kind in ("content_part.added", "content_part.done")
        assert items == last["response"]["output"]

        def plain(answer: Any) -> Any:
            varied = {"id", "call_id", "created_at", "completed_at"}
            items = [{k: v for k, v in item.items() if k not in varied} for item in answer["output"]]
            return {**{k: v for k, v in answer.items() if k not in varied}, "output": items}

        assert plain(last["response"]) == plain(whole)


class TestErrors:
    FIRST = "input[0].content[0]"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"store": True}, "store"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"conversation": "c"}, "conversation"),
            ({"background": True}, "background"),
            ({"truncation": "never"}, "truncation"),
            ({"top_logprobs": 21}, "top_logprobs"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 10**9}, "max_output_tokens"),
            ({"temperature": -1}, "temperature"),
            ({"max_tokens": 7}, "max_tokens"),
            ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
            ({"depth": "full", "reasoning": {"effort": "low"}}, "depth"),
            ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "tools[0].type"),
            ({"tools": [LOG, {"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
            ({"tools": [LOG], "tool_choice": {"type": "function", "name": "dig"}}, "tool_choice"),
            ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
            ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format"),
            ({"input": []}, "input"),
            ({"input": 7}, "input"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
            ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
            ({"input": [DONE]}, "input[0].call_id"),
            ({"input": [USE, {**DONE, "output": [IMAGE]}]}, "input[1].output[0]"),
            ({"input": [{"role": "assistant", "content": [IMAGE]}]}, FIRST),
            ({"instructions": "s", "input": [*HI, {"role": "user", "content": [AWAY]}]}, "input[1]"),
            ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, FIRST),
        ],
    )  # fmt: skip
    async def test_a_wrong_body_is_one_clear_line(
        self, http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str
    ) -> None:
        for stream in (False, True):
            reply = await http.post(URL, json={**BODY, **fields, "stream": stream})
            if stream and param == "stream_options":
                assert reply.status_code == 200
                continue
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), error
            assert "\n" not in error["message"]
        assert engine.requests == [] or param == "stream_options"

    async def test_errors_have_their_status_before_the_first_token_and_an_event_after_it(
        self, http: httpx.AsyncClient, engine: Any
    ) -> None:
        engine.ends = Finished("x", "error", error=GenerationError("it failed"))
        *_, last = said((await http.post(URL, json={**BODY, "stream": True})).text)
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["message"] == "it failed"
        engine.raises = QueueFullError("full")
        assert (await http.post(URL, json={**BODY, "stream": True})).status_code == 429
