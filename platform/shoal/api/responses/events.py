"""Engine events as answers of the Responses API: one JSON object, or its events in OpenAI's order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from shoal.api.answers import measured
from shoal.api.blocks import Block, BlockAnswer, Moment
from shoal.api.chunks import chat_logprob
from shoal.api.json_text import pieces
from shoal.api.requests import EngineCall
from shoal.api.responses.bodies import FunctionTool, ResponsesRequest
from shoal.api.served import ServedModel
from shoal.api.shapes import ChatLogprob
from shoal.api.wire import Wire, named_sse, named_sse_pieces


class ResponseAnswer(BlockAnswer):
    prefix = "resp"

    def __init__(self, call: EngineCall, served: ServedModel, body: ResponsesRequest) -> None:
        super().__init__(call, served)
        self._created, self._sent_events = int(time.time()), 0
        self._completed: int | None = None
        self._previous, self.stored = body.previous_response_id, body.store  # what may not be stored never comes here
        text = body.text.format if body.text and body.text.format else None
        choice, drawn = body.tool_choice, call.requests[0].sampling
        shape = {"type": "text"} if text is None else text.model_dump(by_alias=True, exclude_none=True)
        asked = {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "temperature": drawn.temperature,
            "text": {"format": shape},
            "tool_choice": choice.model_dump() if isinstance(choice, Wire) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools if isinstance(tool, FunctionTool)],
            "top_logprobs": body.top_logprobs,
            "top_p": drawn.top_p,
            "truncation": body.truncation,
            "user": body.user,
        }
        # what an answer repeats of its request, written once: it may be long, and a stream has it three times
        self._asked = {name: b"".join(pieces(value)) for name, value in asked.items()}

    def failed(self, envelope: dict[str, Any]) -> bytes:
        self.stored = False
        error = {"code": "server_error", "message": envelope["error"]["message"]}
        return b"".join(self._long("response.failed", self._response("failed", error=error)))

    def _begin(self) -> Iterator[bytes]:
        yield from self._long("response.created", self._response("in_progress"))
        yield from self._long("response.in_progress", self._response("in_progress"))

    def _block(self, moment: Moment, block: Block, text: str) -> Iterator[bytes]:
        at: dict[str, Any] = {"item_id": self._item_id(block), "output_index": block.index}
        shown = self._item(block, moment != "closed")
        item = {"output_index": block.index, "item": shown}
        if block.call is not None:
            if moment == "opened":
                yield self._event("response.output_item.added", **item)
            elif moment == "more":
                yield self._event("response.function_call_arguments.delta", **at, delta=text)
            else:
                yield self._event("response.function_call_arguments.done", **at, name=block.name, arguments=block.text)
                yield self._event("response.output_item.done", **item)
            return
        at["content_index"] = 0
        if moment == "opened":
            shown["content"] = []
            yield self._event("response.output_item.added", **item)
            yield self._event("response.content_part.added", **at, part=self._part(Block(0)))
        elif moment == "more":
            yield self._event(
                "response.output_text.delta", **at, delta=text, logprobs=self._logprobs(block, block.told)
            )
            block.told = len(block.logprobs)
        else:
            yield self._event("response.output_text.done", **at, text=block.text, logprobs=self._logprobs(block))
            yield self._event("response.content_part.done", **at, part=self._part(block))
            yield self._event("response.output_item.done", **item)

    def _end(self) -> Iterator[bytes]:
        whole = self._whole()
        yield from self._long(f"response.{whole['status']}", whole)

    def _whole(self) -> dict[str, Any]:
        return self._response("incomplete" if self.choices[0].reason == "length" else "completed")

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sent_events += 1
        return named_sse({"type": kind, "sequence_number": self._sent_events - 1, **fields})

    def _long(self, kind: str, response: dict[str, Any]) -> Iterator[bytes]:
        """An event that has the whole response."""
        self._sent_events += 1
        yield from named_sse_pieces({"type": kind, "sequence_number": self._sent_events - 1, "response": response})

    def _response(self, status: str, *, error: dict[str, Any] | None = None) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        if status == "completed" and self._completed is None:
            self._completed = int(time.time())
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._served.name,
            "output": [self._item(block) for block in self.blocks.all] if ended else [],
            "previous_response_id": self._previous,
            "store": self.stored,
            "background": False,
            "usage": self._usage() if ended else None,
            **self._asked,
        }

    def _item(self, block: Block, running: bool = False) -> dict[str, Any]:
        (choice,) = self.choices
        cut = block is self.blocks.all[-1] and (choice.reader.cut if block.call else choice.reason == "length")
        status = "in_progress" if running else "incomplete" if cut else "completed"
        head = {"id": self._item_id(block), "status": status}
        if block.call is None:
            return {**head, "type": "message", "role": "assistant", "content": [self._part(block)]}
        call = {"call_id": block.call, "name": block.name, "arguments": block.text}
        return {**head, "type": "function_call", **call}

    def _item_id(self, block: Block) -> str:
        return f"{'msg' if block.call is None else 'fc'}_{self.id.removeprefix('resp_')}{block.index:02}"

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"] if "prompt_tokens_details" in usage else 0
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "depth": usage["depth"],
            **measured(usage),
        }

    def _part(self, block: Block) -> dict[str, Any]:
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": self._logprobs(block)}

    def _logprobs(self, block: Block, start: int = 0) -> list[ChatLogprob]:
        return [chat_logprob(self._served.tokenizer, entry) for entry in block.logprobs[start:]]
