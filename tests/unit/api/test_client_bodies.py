"""Bodies as known programs send them, and the fields that such programs need honoured."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from shoal.api.served import ServedModel

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
CLAUDE_CODE = {
    "model": "fish",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "system": [
        {"type": "text", "text": "You are Claude Code."},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"}},
    ],
    "metadata": {"user_id": json.dumps({"device_id": "d" * 64, "account_uuid": "a" * 36, "session_id": "s" * 36})},
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "tools": [
        {"name": "Bash", "description": "Runs.", "input_schema": SCHEMA, "eager_input_streaming": True},
        {"name": "Read", "description": "Reads.", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>"}, {"type": "text", "text": "List."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "eA=="},
                {"type": "text", "text": "I look.", "citations": None},
                {
                    "type": "tool_use",
                    "id": "t1",
                    "name": "Bash",
                    "input": {"command": "ls"},
                    "caller": {"type": "direct"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": "a.py",
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
    ],
}
CODEX = {
    "model": "fish",
    "instructions": "You are Codex.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List."}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "Hm."}],
            "content": None,
            "encrypted_content": "x",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
            "phase": "commentary",
        },
        {
            "type": "function_call",
            "name": "shell",
            "arguments": '{"command": "ls"}',
            "call_id": "c1",
            "namespace": None,
        },
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": SCHEMA},
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto", "context": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "thread",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "i"},
}


def text_of(engine: Any, served: ServedModel) -> str:
    return served.tokenizer.decode(engine.requests[-1].prompt.ids)


async def test_claude_code_s(http: httpx.AsyncClient, engine: Any, served: ServedModel) -> None:
    reply = await http.post("/v1/messages?beta=true", json=CLAUDE_CODE)
    assert reply.status_code == 200, reply.text
    read = text_of(engine, served)
    assert "Be brief." in read and "I look." in read and "a.py" in read and "Hm." not in read
    told = reply.headers["x-shoal-unused"]
    assert "messages[].content[].thinking" in told and "context_management" in told
    counted = {name: CLAUDE_CODE[name] for name in ("model", "system", "messages", "tools", "thinking")}
    assert (await http.post("/v1/messages/count_tokens?beta=true", json=counted)).status_code == 200


async def test_codex_s(http: httpx.AsyncClient, engine: Any, served: ServedModel) -> None:
    reply = await http.post("/v1/responses", json=CODEX)
    assert reply.status_code == 200, reply.text
    read = text_of(engine, served)
    assert "I look." in read and "a.py" in read and "Hm." not in read and "web_search" not in read
    told = reply.headers["x-shoal-unused"]
    assert {"input[].reasoning", "input[].phase", "tools[].web_search", "client_metadata"} <= set(told.split(", "))
    alone = {**CODEX, "tools": []}  # as it asks for a summary
    assert (await http.post("/v1/responses", json=alone)).status_code == 200


async def test_a_thread_is_refused_so_that_their_client_goes_on_without_one(http: httpx.AsyncClient) -> None:
    error = (await http.post("/v1/messages", json={**CLAUDE_CODE, "thread": {"type": "create"}})).json()["error"]
    assert (error["param"], error["details"]) == ("thread", {"error_code": "thread_unsupported_request"})


async def test_what_is_refused_is_the_text_of_an_answer(
    http: httpx.AsyncClient, engine: Any, served: ServedModel
) -> None:
    hi = {"role": "user", "content": "hi"}
    for said in ({"refusal": "I cannot."}, {"content": [{"type": "refusal", "refusal": "I cannot."}]}):
        body = {"model": "fish", "messages": [hi, {"role": "assistant", **said}, hi]}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        assert "I cannot." in text_of(engine, served)
    answer = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    assert (await http.post("/v1/responses", json={"model": "fish", "input": [hi, answer, hi]})).status_code == 200
    assert "I cannot." in text_of(engine, served)


def function(name: str, protocol: str) -> dict[str, Any]:
    if protocol == "chat":
        return {"type": "function", "function": {"name": name}}
    return {"type": "function", "name": name}


@pytest.mark.parametrize("protocol", ["chat", "responses"])
async def test_allowed_tools_are_shown_and_called_and_no_others(
    http: httpx.AsyncClient, engine: Any, served: ServedModel, protocol: str
) -> None:
    async def ask(mode: str, *names: str) -> httpx.Response:
        allowed: dict[str, Any] = {"mode": mode, "tools": [function(name, protocol) for name in names]}
        choice = {"type": "allowed_tools", **({"allowed_tools": allowed} if protocol == "chat" else allowed)}
        url, key = ("/v1/chat/completions", "messages") if protocol == "chat" else ("/v1/responses", "input")
        tools = [function(name, protocol) for name in ("log", "look", "dig")]
        body = {"model": "fish", key: [{"role": "user", "content": "hi"}], "tools": tools, "tool_choice": choice}
        return await http.post(url, json=body)

    assert (await ask("auto", "log", "dig")).status_code == 200
    read = text_of(engine, served)
    assert '"log"' in read and '"dig"' in read and '"look"' not in read and engine.requests[-1].sampling.guided is None
    assert (await ask("required", "look")).status_code == 200
    guide = engine.requests[-1].sampling.guided
    assert guide is not None and '"look"' in guide.spec and '"log"' not in guide.spec
    refused = await ask("auto", "shark")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


async def test_truncation_leaves_out_the_oldest_turns(
    http: httpx.AsyncClient, engine: Any, served: ServedModel
) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "log", "arguments": "{}"}
    turns: list[dict[str, Any]] = [{"role": "developer", "content": "Be brief."}]
    for number in range(20):
        result = {"type": "function_call_output", "call_id": f"c{number}", "output": "x" * (served.config.context // 8)}
        turns += [{"role": "user", "content": f"turn {number}."}, {**call, "call_id": f"c{number}"}, result]
    turns.append({"role": "user", "content": "And now?"})
    body = {"model": "fish", "instructions": "You are a fish.", "input": turns, "max_output_tokens": 9}
    long = await http.post("/v1/responses", json=body)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    short = await http.post("/v1/responses", json={**body, "truncation": "auto"})
    assert short.status_code == 200 and short.json()["truncation"] == "auto"
    read = text_of(engine, served)
    kept = [number for number in range(20) if f"turn {number}." in read]
    assert kept == [*range(kept[0], 20)] and len(kept) > 2
    for first, status in ((kept[0], 200), (kept[0] - 1, 400)):  # as many as fit
        given = [turns[0], *turns[1 + 3 * first :]]
        assert (await http.post("/v1/responses", json={**body, "input": given})).status_code == status
    assert "You are a fish." in read and "Be brief." in read and read.endswith("And now?")
    huge = {**body, "input": "x" * 4 * served.config.context, "truncation": "auto"}
    assert (await http.post("/v1/responses", json=huge)).status_code == 400


async def test_log_probabilities_of_a_response_are_those_of_the_chat(http: httpx.AsyncClient, engine: Any) -> None:
    hi = [{"role": "user", "content": "hi"}]
    chat = {"model": "fish", "messages": hi, "logprobs": True, "top_logprobs": 2}
    choice = (await http.post("/v1/chat/completions", json=chat)).json()["choices"][0]
    asked: list[dict[str, Any]] = [
        {"top_logprobs": 2},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ]
    for more in asked:
        body = {"model": "fish", "input": "hi", **more}
        reply = await http.post("/v1/responses", json=body)
        part = reply.json()["output"][0]["content"][0]
        assert part["logprobs"] == choice["logprobs"]["content"] and "x-shoal-unused" not in reply.headers
        text = (await http.post("/v1/responses", json={**body, "stream": True})).text
        events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
        deltas = [
            entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]
        ]
        (done,) = [event for event in events if event["type"] == "response.output_text.done"]
        assert deltas == done["logprobs"] == part["logprobs"]
    plain = (await http.post("/v1/responses", json={"model": "fish", "input": "hi"})).json()
    assert plain["output"][0]["content"][0]["logprobs"] == [] and plain["top_logprobs"] is None
