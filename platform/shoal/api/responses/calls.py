"""A body of the Responses API as a chat, and so as engine requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits, at_most
from shoal.api.requests import EngineCall, chat_call, said, told_as
from shoal.api.responses.bodies import (
    AnyItem,
    CallItem,
    Format,
    InputImage,
    MessageItem,
    NamedFunction,
    OutputItem,
    Part,
    ResponsesRequest,
)
from shoal.api.served import ServedModel
from shoal.errors import RequestError
from shoal.inputs.tools import parts

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}  # of a chat's fields


def responses_call(
    body: ResponsesRequest, served: ServedModel, limits: Limits, before: Sequence[AnyItem] = ()
) -> EngineCall:
    """The call of `body`, whose input comes after the items `before` it. Raises RequestError naming the field that cannot be
    served; ContextLengthError."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", param="stream_options", do="set stream to true as well")
    effort = body.reasoning.effort if body.reasoning else None
    if effort is not None and body.depth is not None:
        raise RequestError("reasoning.effort and depth", param="depth", do="give one of them")
    messages, sources = _chat(body, limits, before)
    choice: Any = body.tool_choice
    if isinstance(choice, NamedFunction):
        choice = {"type": "function", "function": {"name": choice.name}}
    chat = {
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        **said(body, "temperature", "top_p"),
        "seed": body.seed,
        "depth": body.depth,
        "quality_tolerance": body.quality_tolerance,
        "reasoning_effort": effort,
        "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools],
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text.format if body.text else None),
    }
    with told_as(NAMES, sources):
        call = chat_call(ChatRequest.model_validate(chat), served, limits)
    return replace(call, guided_by=NAMES.get(call.guided_by, call.guided_by))


def _chat(body: ResponsesRequest, limits: Limits, before: Sequence[AnyItem]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a chat, and where each comes from. A call belongs to the assistant's message before it, and so does what
    is said behind one before there is a result: it is one turn, as in the other protocols."""
    chat: list[dict[str, Any]] = []
    sources: list[str] = []
    called: set[str] = set()
    if body.instructions:
        chat.append({"role": "system", "content": body.instructions})
        sources.append("instructions")
    new: Sequence[AnyItem] = [] if isinstance(body.input, str) else body.input
    at_most(
        "input", len(new) + len(before), limits.messages, "items with those of the turns before" if before else "items"
    )
    places = [(item, "previous_response_id") for item in before]
    for item, where in (*places, *((item, f"input[{index}]") for index, item in enumerate(new))):
        if isinstance(item, CallItem):
            called.add(item.call_id)
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if chat and chat[-1]["role"] == "assistant":
                chat[-1].setdefault("tool_calls", []).append(call)
                continue
            chat.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif isinstance(item, OutputItem):
            chat.append(_result(item, where, called))
        else:
            message = _message(item, where)
            if item.role == "assistant" and chat and "tool_calls" in chat[-1]:
                chat[-1]["content"] = [*parts(chat[-1]["content"]), *parts(message["content"])]
                continue
            chat.append(message)
        sources.append(where)
    if isinstance(body.input, str):
        return [*chat, {"role": "user", "content": body.input}], [*sources, "input"]
    return chat, sources


def _message(item: MessageItem, where: str) -> dict[str, Any]:
    if not isinstance(item.content, str) and item.role != "user":
        _only_text(item.content, f"{where}.content")
    content = item.content if isinstance(item.content, str) else [_part(part) for part in item.content]
    return {"role": item.role, "content": content}


def _result(item: OutputItem, where: str, called: set[str]) -> dict[str, Any]:
    if item.call_id not in called:
        param = f"{where}.call_id"
        raise RequestError(param, param=param, got=item.call_id[:64], allowed="the id of a function_call before it")
    if not isinstance(item.output, str):
        _only_text(item.output, f"{where}.output")
    content = item.output if isinstance(item.output, str) else [_part(part) for part in item.output]
    return {"role": "tool", "tool_call_id": item.call_id, "content": content}


def _only_text(parts: Sequence[Part], where: str) -> None:
    at = next((at for at, part in enumerate(parts) if isinstance(part, InputImage)), None)
    if at is not None:
        param = f"{where}[{at}]"
        raise RequestError(param, param=param, got="input_image", allowed="text; images in a message of the user")


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, InputImage):
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.text}


def _format(given: Format | None) -> dict[str, Any] | None:
    if given is None:
        return None
    needed = given.type == "json_schema"
    if (given.schema_ is not None) != needed or (given.name is not None) != needed:
        do = "give name and schema with type json_schema, and only there"
        raise RequestError("text.format", param="text.format", do=do)
    if not needed:
        return {"type": given.type}
    schema = {"name": given.name, "description": given.description, "schema": given.schema_}
    return {"type": given.type, "json_schema": schema}
