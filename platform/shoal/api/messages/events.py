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
        shown, more = None, {"type": "text_delta", "text": text}
        if block.call is None:
            shown = _shown(block)
        elif moment == "closed":  # it is sent when it is whole: clients run what they have of one that is cut off
            shown = _shown(block)
            more = {"type": "input_json_delta", "partial_json": block.text}
        if shown is None:
            return
        at, whole = {"index": block.index}, block.call is not None
        if moment == "opened" or whole:
            empty = {**shown, "input": {}} if whole else shown
            yield named_sse({"type": "content_block_start", **at, "content_block": empty})
        if moment == "more" or whole:
            yield named_sse({"type": "content_block_delta", **at, "delta": more})
        if moment == "closed":
            yield named_sse({"type": "content_block_stop", **at})

    def _end(self) -> Iterator[bytes]:
        reason, stop = self._reason()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        yield named_sse({"type": "message_delta", "delta": delta, "usage": self._usage()})
        yield named_sse({"type": "message_stop"})

    def _whole(self) -> dict[str, Any]:
        return self._message([shown for block in self.blocks.all if (shown := _shown(block))], *self._reason())

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


def _shown(block: Block) -> dict[str, Any] | None:
    """A block as it stands; None for a call that was cut off, of which there is no input."""
    if block.call is None:
        return {"type": "text", "text": block.text, "citations": None}
    given = _input(block.text)
    return None if given is None else {"type": "tool_use", "id": block.call, "name": block.name, "input": given}


def _input(arguments: str) -> Any:
    """Arguments as a value that can be sent: half of a surrogate pair becomes "?", a number that is too large the largest. None
    for what is no JSON, since it was cut off."""
    try:
        value = json.loads(arguments, parse_float=lambda number: max(-_MOST, min(_MOST, float(number))))
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
