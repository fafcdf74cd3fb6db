"""What well-known clients send, by their own types: each field once, and every answer sent back as history. Nothing is a 5xx,
and a 400 is only what would change the answer: those are listed here."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from shoal import presets
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.inputs.tokenizer import Tokenizer
from tests.client_types import each, example, walk
from tests.extra import package
from tests.unit.api.conftest import Scripted

HI = {"role": "user", "content": "hi"}
CALL = {"id": "x", "type": "function", "function": {"name": "x", "arguments": "{}"}}
TOOL = {"name": "x", "input_schema": {"type": "object"}}
CALLED = {  # what comes before a message: a call that it may answer
    "chat": [HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "responses": [{**HI, "type": "message"}, {"type": "function_call", "call_id": "x", "name": "x", "arguments": "{}"}],
    "messages": [HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "x", "input": {}}]}],
}
AROUND: dict[str, dict[str, Any]] = {
    "chat": {"messages": [HI], "tools": [{"type": "function", "function": {"name": "x"}}]},
    "responses": {"input": "hi", "tools": [{"type": "function", "name": "x"}]},
    "messages": {"messages": [HI], "max_tokens": 9, "tools": [TOOL]},
    "count": {"messages": [HI], "tools": [TOOL]},
}
SKIPPED = frozenset({"model", "type", "role", "betas", "user_profile_id", "workspace_id"})  # the last three are headers

_CLAUDES = [  # by expression, what would change an answer of the Messages API
    r"\.messages\[\]<user>\.content\[\]<(image>\.(source<(url|file)|transf)|document|search_result|tool_use|container_upload)",
    r"\.messages\[\]<assistant>\.content\[\]<(image|document|search_result|tool_result|container_upload)",
    r"\.messages\[\]<(user|assistant)>\.content\[\]<(server_tool_use|.+_tool_result)>",
    r"\.messages\[\]<user>\.content\[\]<tool_result>\.content\[\]<(image|search_result|document|tool_reference|browser_state)",
    r"\.tools\[\]<(?!ToolParam|BetaToolParam)",  # the server's own, and those whose schema the client does not send
    r"\.tools\[\]<\w*ToolParam>\.(allowed_callers\[\]=code|input_examples)",
]
# (address, module and name of the type, what is around a field, by expression what would change the answer)
_OPENAI, _CLAUDE = "openai.types", "anthropic.types"
_PARAMS = "CompletionCreateParamsNonStreaming"
BODIES: dict[str, tuple[str, str, str, str, list[str]]] = {
    "chat": ("/v1/chat/completions", f"{_OPENAI}.chat.completion_create_params", _PARAMS, "chat", [
        r"\.messages\[\]<user>\.content\[\]<(input_audio|file)>", r"\.messages\[\]<function>",
        r"\.messages\[\]<assistant>\.(audio|function_call|tool_calls\[\]<custom>)",
        r"\.(audio|function_call|functions|moderation|prediction|web_search_options|modalities\[\]=audio)",
        r"\.response_format<json_schema>$", r"\.(tool_choice|tools\[\])<custom>",
        r"\.tool_choice<allowed_tools>",  # of no tool that the example offers
    ]),
    "completions": ("/v1/completions", f"{_OPENAI}.completion_create_params", _PARAMS, "", [
        r"\.suffix",
    ]),
    "embeddings": ("/v1/embeddings", f"{_OPENAI}.embedding_create_params", "EmbeddingCreateParams", "", [r"\.dimensions"]),
    "responses": (
        "/v1/responses", f"{_OPENAI}.responses.response_create_params", "ResponseCreateParamsNonStreaming", "responses", [
        r"\.(access_programs|background|conversation|context_management|image|moderation|prompt$|reasoning.mode)",
        r"\.(store|previous_response_id)$",  # where no texts are kept
        r"\.input\[\]<(\w+_call|\w+_call_output|tool_search_output|mcp_\w+|program\w*)>$",
        r"\.input\[\]<(additional_tools|configuration_update|compaction\w*|ItemReference)>",
        r"\.input\[\]<user>\.content\[\]<(input_image|input_file)",
        r"\.input\[\]<function_call_output>\.output\[\]<(input_image|input_file)",
        r"\.tool_choice<", r"\.tools\[\]<(?!function)", r"\.tools\[\]<function>\.(async|allowed_callers|output_schema)",
    ]),
    "messages": ("/v1/messages", f"{_CLAUDE}.message_create_params", "MessageCreateParamsNonStreaming", "messages", [
        *_CLAUDES, r"\.container",
    ]),
    "beta": ("/v1/messages", f"{_CLAUDE}.beta.message_create_params", "MessageCreateParamsNonStreaming", "messages", [
        *_CLAUDES, r"\.(compaction|container|mcp_servers|output_config.task_budget|thread)",
        r"\.messages\[\]<\w+>\.content\[\]<(mcp_\w+|compaction|tool_addition|tool_removal|fallback)>",
        r"\.messages\[\]<system>\.(clear_at|output_config)",
        r"\.context_management\.edits\[\]<(clear_tool_uses|compact)",
    ]),
    "count": (
        "/v1/messages/count_tokens", f"{_CLAUDE}.message_count_tokens_params", "MessageCountTokensParams", "count", _CLAUDES,
    ),
}  # fmt: skip


def whole(body: dict[str, Any], protocol: str) -> dict[str, Any]:
    """`body` as it can be answered, whatever a walk has put into it."""
    for name in ("messages", "input"):
        if isinstance(body.get(name), list) and protocol in AROUND:
            given = [{**part} for part in body[name]]
            for part in given:
                if part.get("type") == "function_call_output":
                    part.setdefault("call_id", "x")
                elif part.get("role") in ("assistant", "system") and "tool_calls" not in part and "type" not in part:
                    part.setdefault("content", "x")
            before = CALLED["messages" if protocol == "count" else protocol]
            body = {**body, name: [*before, *given]}
    beside: dict[str, Any] = {} if protocol in AROUND else {"prompt" if "input" not in body else "input": "hi"}
    beside |= {"stream": True} if "stream_options" in body else {}
    beside |= {"logprobs": True} if "top_logprobs" in body and protocol == "chat" else {}
    return {**AROUND.get(protocol, {}), **beside, **body, "model": "fish"}


class Server:
    """The app, asked one request after the other."""

    def __init__(self, portal: BlockingPortal) -> None:
        config = dataclasses.replace(presets.get("test").model, max_length=4096)
        served = ServedModel("fish", config, Tokenizer.bytes_only())
        app = build_app([Hosted(served, Scripted(served.tokenizer))])
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        self._portal = portal

    def post(self, url: str, body: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            return await self._http.post(url, json=body)

        return self._portal.call(ask)


@pytest.fixture(scope="module")
def server() -> Any:
    with start_blocking_portal() as portal:
        yield Server(portal)


@pytest.mark.parametrize("name", [*BODIES])
def test_each_field_of_a_body_is_taken_or_would_change_the_answer(server: Server, name: str) -> None:
    url, module, kind, protocol, changing = BODIES[name]
    taken, refused = set[str](), dict[str, str]()

    def ask(path: str, body: dict[str, Any]) -> bool:
        reply = server.post(url, whole(body, protocol))
        assert reply.status_code in (200, 400), (path, reply.text)
        if reply.status_code == 200:
            taken.add(path)
            return True
        error = reply.json()["error"]
        assert error["param"], (path, error)
        refused[path] = error["message"]
        return False

    package(module.partition(".")[0])
    walk(getattr(importlib.import_module(module), kind), "", ask, lambda body: body, SKIPPED)
    wrong = [f"{path}: {said}" for path, said in refused.items() if not any(re.match(one, path) for one in changing)]
    assert not wrong, "\n".join(wrong)
    idle = [one for one in changing if not any(re.match(one, path) for path in refused)]
    assert not idle, f"listed, and not refused: {idle}"
    assert len(taken) > 10 or protocol == ""


def histories() -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each client's types of answers one with all fields, by its name, as a body that sends it back."""
    chat, responses = package("openai.types.chat"), package("openai.types.responses")
    claude, beta = package("anthropic.types"), package("anthropic.types.beta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
        litellm = package("litellm.types.utils")
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    kinds = [chat.ChatCompletionMessage, chat.ParsedChatCompletionMessage, litellm.Message]
    for kind in kinds:
        message = {
            **example(kind, full=True),
            "role": "assistant",
            "content": "so",
            "audio": None,
            "images": None,
            "function_call": None,
        }
        message["tool_calls"] = [CALL | call for call in message.get("tool_calls") or []]  # some make ids themselves
        thought = {
            "reasoning_content": "hm",
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
        }
        found[f"{kind.__module__}.{kind.__name__}"] = ("chat", {"messages": [HI, {**thought, **message}, HI]})
    items = [
        responses.ResponseOutputItem,
        responses.ParsedResponseOutputMessage,
        responses.ParsedResponseFunctionToolCall,
    ]
    for kind in items:
        for name, item in each(kind):
            found[f"openai {getattr(kind, '__name__', '')} {name}"] = ("responses", {"input": [HI, item, HI]})
    for module, kinds in (
        (claude, ["ContentBlock", "ParsedTextBlock"]),
        (beta, ["BetaContentBlock", "BetaTextBlock"]),
    ):
        for kind in kinds:
            for name, block in each(getattr(module, kind)):
                turn = {"role": "assistant", "content": [block]}
                found[f"anthropic {kind} {name}"] = ("messages", {"messages": [HI, turn, HI]})
    return found


# What servers of these clients do, which none here does: to leave it out would change the chat.
_SERVERS = (
    r"(_call|_result|_output|_search|_use|_listing|mcp_.*|computer.*|program.*|compaction.*|fallback|container_upload"
    r"|additional_tools|configuration_update)$"
)
_OURS = r" (function_call|tool_use)$"


def test_what_a_client_was_answered_can_be_sent_back(server: Server) -> None:
    urls = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
    statuses = {}
    for name, (protocol, body) in histories().items():
        reply = server.post(urls[protocol], {**AROUND[protocol], **body, "model": "fish"})
        statuses[name] = reply.status_code
        foreign = re.search(_SERVERS, name) and not re.search(_OURS, name)
        assert reply.status_code == (400 if foreign else 200), (name, reply.text, body)
    assert sum(status == 200 for status in statuses.values()) >= 12
