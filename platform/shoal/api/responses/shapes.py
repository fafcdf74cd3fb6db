"""What answers of the Responses API look like, as far as they are given here."""

from __future__ import annotations

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic reads typing's own only from Python 3.12 on
)

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from shoal.api.shapes import ChatLogprob, Quality


class OutputTextOut(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]  # empty
    logprobs: list[ChatLogprob]  # where they are asked for


class MessageItemOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: str
    content: list[OutputTextOut]


class CallItemOut(TypedDict):
    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str  # JSON


class CachedTokens(TypedDict):
    cached_tokens: int
    cache_write_tokens: int  # 0: what is cached costs nothing more


class ReasoningTokens(TypedDict):
    reasoning_tokens: int  # 0: the model thinks in its layers


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    depth: str  # exit name the answer ran with
    mean_depth: NotRequired[float]  # as of a chat, and so is what follows
    quality: NotRequired[Quality]


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseOut(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    error: dict[str, Any] | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageItemOut | CallItemOut]
    previous_response_id: str | None
    store: bool  # whether it is kept; in the first events of a stream, whether it is to be
    background: Literal[False]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class InputTextOut(TypedDict):
    type: Literal["input_text"]
    text: str  # "[image]" for an image


class InputMessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["user", "system", "developer"]
    status: str
    content: list[InputTextOut]


class CallOutputOut(TypedDict):
    id: str
    type: Literal["function_call_output"]
    status: str
    call_id: str
    output: str | list[InputTextOut]


class InputItems(TypedDict):
    object: Literal["list"]
    data: list[InputMessageOut | MessageItemOut | CallItemOut | CallOutputOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


@with_config(ConfigDict(extra="allow"))
class ResponseEvent(TypedDict):
    """One of a stream, by OpenAI's types: response.created to response.completed, response.incomplete or response.failed."""

    type: str
    sequence_number: int
