"""Items of a turn as they are stored, shown, and read again by a later turn."""

from __future__ import annotations

import re
from typing import Any

from pydantic import TypeAdapter

from shoal.api.responses.bodies import (
    AnyItem,
    CallItem,
    InputImage,
    MessageItem,
    OutputItem,
    Part,
    ResponsesRequest,
)

_ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[AnyItem])


def kept_items(body: ResponsesRequest, id_: str) -> list[dict[str, Any]]:
    """The input of the response `id_` as it is stored, without images. Each item has an id of its own, whatever the client
    called it: two of one id could not be told apart by who reads on after one."""
    hexa = id_.removeprefix("resp_")
    if isinstance(body.input, str):
        return [_message(f"msg_{hexa}_0", "user", [_text("user", body.input)])]
    kept = (item for item in body.input if isinstance(item, (MessageItem, CallItem, OutputItem)))
    return [_kept(item, f"{hexa}_{index}") for index, item in enumerate(kept)]


def response_of(item_id: str) -> str | None:
    """The response that has the item with this id, of its input or output; None for an id that was not given here."""
    found = re.fullmatch(r"(?:msg|fc|fco)_([0-9a-f]{32})(?:_\d+|\d\d+)", item_id)
    return f"resp_{found[1]}" if found else None


def read_items(stored: list[dict[str, Any]]) -> list[AnyItem]:
    """Stored items, of input or output, as a body has them."""
    return _ITEMS.validate_python(stored)


def _kept(item: MessageItem | CallItem | OutputItem, end: str) -> dict[str, Any]:
    head = {"status": item.status or "completed", "type": item.type}
    if isinstance(item, CallItem):
        called = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        return {"id": f"fc_{end}", **head, **called}
    if isinstance(item, OutputItem):
        output = item.output if isinstance(item.output, str) else [_part("user", part) for part in item.output]
        return {"id": f"fco_{end}", **head, "call_id": item.call_id, "output": output}
    content = [_text(item.role, item.content)] if isinstance(item.content, str) else None
    parts = content or [_part(item.role, part) for part in item.content if not isinstance(part, str)]
    return {**_message(f"msg_{end}", item.role, parts), **head}


def _message(id_: str, role: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": id_, "type": "message", "role": role, "status": "completed", "content": parts}


def _part(role: str, part: Part) -> dict[str, Any]:
    return _text(role, "[image]" if isinstance(part, InputImage) else part.text)


def _text(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}
