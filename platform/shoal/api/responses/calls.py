"""A body of the Responses API as a chat, and so as engine requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits, at_most
from shoal.api.requests import EngineCall, chat_call, said, told_as
from shoal.api.responses.bodies import (
    KEPT,
    LOGPROBS,
    AllowedFunctions,
    AnyItem,
    CallItem,
    Format,
    FunctionTool,
    InputImage,
    ItemReference,
    MessageItem,
    NamedFunction,
    OutputItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
)
from shoal.api.served import ServedModel
from shoal.errors import ContextLengthError, RequestError
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
    told = LOGPROBS in body.include
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
        "tools": [
            {"type": "function", "function": tool.model_dump(exclude={"type"})}
            for tool in body.tools
            if isinstance(tool, FunctionTool)
        ],
        "tool_choice": _choice(body.tool_choice),
        "logprobs": bool(told or body.top_logprobs),
        "top_logprobs": body.top_logprobs,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text.format if body.text else None),
    }
    with told_as(NAMES, sources):
        made = partial(_fitting, limits=limits) if body.truncation == "auto" else partial(chat_call, limits=limits)
        call = made(ChatRequest.model_validate(chat), served)
    return replace(call, guided_by=NAMES.get(call.guided_by, call.guided_by))


def _fitting(chat: ChatRequest, served: ServedModel, limits: Limits) -> EngineCall:
    """The call of `chat` without as many of its oldest turns as it takes for the rest to fit the context: what the system says
    at the beginning stays, and so does the last turn. Raises as `chat_call`."""
    roles = [message.role for message in chat.messages]
    head = next((at for at, role in enumerate(roles) if role not in ("system", "developer")), 0)
    turns = [head, *(at for at, role in enumerate(roles) if role == "user" and at > head)]

    def call(turn: int) -> EngineCall | None:
        messages = chat.messages[:head] + chat.messages[turns[turn] :]
        try:
            return chat_call(chat.model_copy(update={"messages": messages}), served, limits)
        except ContextLengthError:
            if turn == len(turns) - 1:
                raise
            return None

    whole = call(0)
    if whole is not None:
        return whole
    low, high = 1, len(turns) - 1
    fits = call(high)
    while low < high:  # from `high` on all fit
        middle = (low + high) // 2
        tried = call(middle)
        low, high, fits = (middle + 1, high, fits) if tried is None else (low, middle, tried)
    assert fits is not None  # else it was raised
    return fits


def _choice(choice: Any) -> Any:
    """A tool_choice as a chat has it."""
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedFunctions):
        tools = [_choice(tool) for tool in choice.tools]
        return {"type": choice.type, "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


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
        if isinstance(item, ReasoningItem):
            continue
        if isinstance(item, CallItem):
            called.add(item.call_id)
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if chat and chat[-1]["role"] == "assistant":
                chat[-1].setdefault("tool_calls", []).append(call)
                continue
            chat.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif isinstance(item, ItemReference):  # those that are stored have been put in its place
            raise RequestError(where, param=where, got=item.id[:100], do=f"send the item itself; {KEPT}")
        elif isinstance(item, OutputItem):
            chat.append(_result(item, where, called))
        else:
            message = _message(item, where)
            if item.role == "assistant" and chat and "tool_calls" in chat[-1]:
                chat[-1]["content"] = [*parts(chat[-1]["content"]), *parts(message["content"])]
                continue
            chat.append(message)
        sources.append(where)
    if not chat and not isinstance(body.input, str):
        raise RequestError("input", param="input", got="no message", allowed="at least one")
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
