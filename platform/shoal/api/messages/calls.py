"""A body of the Messages API as a chat, and so as engine requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits, at_most
from shoal.api.messages.bodies import (
    CountRequest,
    ImageBlock,
    Message,
    MessagesRequest,
    OutputConfig,
    TextBlock,
    Thought,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from shoal.api.requests import EngineCall, chat_call, said, told_as
from shoal.api.served import ServedModel
from shoal.errors import RequestError

NAMES = {  # of a chat's fields
    "stop": "stop_sequences",
    "response_format": "output_config.format",
}
FAILED = "Error: "  # before the result of a call that failed


def messages_call(body: MessagesRequest, served: ServedModel, limits: Limits) -> EngineCall:
    """Raises RequestError naming the field that cannot be served; ContextLengthError."""
    more = {
        **said(body, "temperature", "top_p", "top_k"),
        "stop": body.stop_sequences,
        "quality_tolerance": body.quality_tolerance,
        "depth": body.depth,
    }
    call = _call(body, more, served, limits)
    (request,) = call.requests  # whose answer may take all that the context has left
    most = min(body.max_tokens, request.sampling.max_tokens)
    return replace(call, requests=[replace(request, sampling=replace(request.sampling, max_tokens=most))])


def count(body: CountRequest, served: ServedModel, limits: Limits) -> int:
    """Tokens of the prompt. Raises as `messages_call`."""
    return _call(body, {}, served, limits).prompt_tokens


def _call(body: CountRequest, more: dict[str, Any], served: ServedModel, limits: Limits) -> EngineCall:
    chat, sources = _chat(body, limits)
    config = body.output_config or OutputConfig.model_validate({})
    if config.effort is not None and more.get("depth") is not None:
        raise RequestError("output_config.effort and depth", param="depth", do="give one of them")
    chat |= {"model": body.model, **_tools(body.tools, body.tool_choice), **more}
    chat |= {} if config.effort is None else {"reasoning_effort": config.effort}
    if config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema_}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    with told_as(NAMES, sources):
        call = chat_call(ChatRequest.model_validate(chat), served, limits)
    return replace(call, guided_by=NAMES.get(call.guided_by, call.guided_by))


def _chat(body: CountRequest, limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """The messages of a chat with what follows from the last of them; and where each comes from."""
    at_most("messages", len(body.messages), limits.messages)
    chat: list[dict[str, Any]] = []
    sources: list[str] = []
    if body.system:
        chat.append({"role": "system", "content": _plain(body.system)})
        sources.append("system")
    called: set[str] = set()
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        made = _message(message, where, called)
        chat += made
        sources += [where] * len(made)
    last = body.messages[-1]
    prefilled = last.role == "assistant" and bool(_plain(last.content)) and "tool_calls" not in chat[-1]
    return {"messages": chat, "continue_final_message": prefilled}, sources


def _message(message: Message, where: str, called: set[str]) -> list[dict[str, Any]]:
    """One message as those of a chat: results of calls are messages of their own there, before what else is said. `called` are
    the calls so far."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(message.content):
        here = f"{where}.content[{at}]"
        if isinstance(block, ToolUseBlock) and message.role != "assistant":
            raise RequestError(here, param=here, got="tool_use", allowed="it in a message of the assistant")
        if isinstance(block, (ToolResultBlock, ImageBlock)) and message.role != "user":
            raise RequestError(here, param=here, got=block.type, allowed="it in a message of the user")
        if isinstance(block, Thought):
            continue
        if isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
        elif isinstance(block, ImageBlock):
            url = f"data:{block.source.media_type};base64,{block.source.data}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif isinstance(block, ToolUseBlock):
            called.add(block.id)
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            if block.tool_use_id not in called:
                raise RequestError(
                    f"{here}.tool_use_id", param=f"{here}.tool_use_id", got=block.tool_use_id[:64],
                    allowed="the id of a tool_use block before it",
                )  # fmt: skip
            result = _plain(block.content, f"{here}.content")
            content = FAILED + result if block.is_error else result
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if calls:
        return [{"role": message.role, "content": parts or None, "tool_calls": calls}]
    return [*results, {"role": message.role, "content": parts}] if parts or not results else results


def _plain(content: str | Sequence[Any], where: str | None = None) -> str:
    """The texts of `content`, as one. Raises RequestError for an image where `where` is given, and leaves it out otherwise."""
    if isinstance(content, str):
        return content
    if where is not None and any(isinstance(block, ImageBlock) for block in content):
        raise RequestError(where, param=where, got="image", allowed="text in a tool_result")
    return "".join(block.text for block in content if isinstance(block, TextBlock))


def _tools(tools: Sequence[Tool], choice: ToolChoice | None) -> dict[str, Any]:
    functions = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in tools
    ]
    if choice is None:
        return {"tools": functions}
    if (choice.name is not None) != (choice.type == "tool"):
        raise RequestError("tool_choice.name", param="tool_choice", do="give it with type tool, and only there")
    named = {"type": "function", "function": {"name": choice.name}}
    kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    return {
        "tools": functions,
        "tool_choice": kinds[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }
