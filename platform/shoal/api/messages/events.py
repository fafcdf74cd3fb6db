"""Engine events as answers of the Messages API: one JSON object, or its events in Anthropic's order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from shoal.api.answers import measured
from shoal.api.blocks import Block, BlockAnswer, Moment
from shoal.api.messages.bodies import MessagesRequest
from shoal.api.requests import EngineCall
from shoal.api.served import ServedModel
from shoal.api.wire import named_sse

_MOST = sys.float_info.max


class MessageAnswer(BlockAnswer):
    prefix = "msg"

    def __init__(self, call: EngineCall, served: ServedModel, body: MessagesRequest) -> None:
        super().__init__(call, served)
        self._body = body

    def failed(self, envelope: dict[str, Any]) -> bytes:
        return named_sse(envelope)

    def _begin(self) -> Iterator[bytes]:
        yield named_sse({"type": "message_start", "message": self._message([], None, None)})

    def _block(self, moment: Moment, block: Block, text: str) -> Iterator[bytes]:
        at = {"index": block.index}
        if moment == "opened":
            empty = _shown(block) if block.call is None else {**_shown(block), "input": {}}
            yield named_sse({"type": "content_block_start", **at, "content_block": empty})
        elif moment == "more" and block.call is None:
            yield named_sse({"type": "content_block_delta", **at, "delta": {"type": "text_delta", "text": text}})
        elif moment == "more":
            delta = {"type": "input_json_delta", "partial_json": text}
            yield named_sse({"type": "content_block_delta", **at, "delta": delta})
        else:
            yield named_sse({"type": "content_block_stop", **at})

    def _end(self) -> Iterator[bytes]:
        reason, stop = self._reason()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        yield named_sse({"type": "message_delta", "delta": delta, "usage": self._usage()})
        yield named_sse({"type": "message_stop"})

    def _whole(self) -> dict[str, Any]:
        return self._message([_shown(block) for block in self.blocks.all], *self._reason())

    def _message(self, content: list[dict[str, Any]], reason: str | None, stop: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"] if "prompt_tokens_details" in usage else 0
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
            "depth": usage["depth"],
            **measured(usage),
        }

    def _reason(self) -> tuple[str, str | None]:
        """Why the answer ended, and the text that ended it."""
        (choice,) = self.choices
        if choice.reason == "length":
            full = self._call.requests[0].sampling.max_tokens < self._body.max_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        if choice.reason == "tool_calls":
            return "tool_use", None
        behind = self._served.tokenizer.decode(choice.tokens)[len(choice.text) :]
        stop = min((s for s in self._body.stop_sequences if behind.startswith(s)), key=len, default=None)
        return ("end_turn", None) if stop is None else ("stop_sequence", stop)


def _shown(block: Block) -> dict[str, Any]:
    """A block as it stands."""
    if block.call is None:
        return {"type": "text", "text": block.text, "citations": None}
    return {"type": "tool_use", "id": block.call, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> Any:
    """Arguments as a value that can be sent: half of a surrogate pair becomes "?", a number that is too large the largest. What
    was cut in its middle is no JSON, and so no input."""
    try:
        value = json.loads(arguments, parse_float=lambda number: max(-_MOST, min(_MOST, float(number))))
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
