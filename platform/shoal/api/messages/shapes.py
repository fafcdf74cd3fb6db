"""What answers of the Messages API look like, as far as they are given here."""

from __future__ import annotations

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic reads typing's own only from Python 3.12 on
)

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from shoal.api.shapes import Error, Quality


class MessageUsage(TypedDict):
    input_tokens: int  # of the prompt, without those that were cached
    cache_read_input_tokens: int
    cache_creation_input_tokens: int  # 0: what is cached costs nothing more
    output_tokens: int
    depth: str  # exit name the answer ran with
    mean_depth: NotRequired[float]  # as of a chat, and so is what follows
    quality: NotRequired[Quality]


class TextOut(TypedDict):
    type: Literal["text"]
    text: str
    citations: None


class ToolUseOut(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextOut | ToolUseOut]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"] | None
    stop_sequence: str | None  # the one that ended it
    usage: MessageUsage


@with_config(ConfigDict(extra="allow"))
class MessageEvent(TypedDict):
    """One of a stream: message_start, content_block_start, content_block_delta, content_block_stop, message_delta,
    message_stop."""

    type: str


class TokenCount(TypedDict):
    input_tokens: int


class ErrorDetails(TypedDict):
    error_code: str


class MessageError(Error):
    details: NotRequired[ErrorDetails]  # by which their client tells what it may do


class MessageErrorEnvelope(TypedDict):
    type: Literal["error"]
    error: MessageError
    request_id: str
