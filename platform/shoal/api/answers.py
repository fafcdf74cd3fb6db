"""Engine events as OpenAI answers: one JSON object, or a stream of SSE chunks.

Notable: the stream's order is the protocol: the role first, `finish_reason` on the last chunk of a choice, the usage in a
chunk without choices, then ``[DONE]``. A whole answer is put together from what a stream would have sent.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from shoal import __version__
from shoal.api.calls import Delta, Reader
from shoal.api.client import Events
from shoal.api.requests import Work
from shoal.api.served import ServedModel
from shoal.api.shapes import ChatLogprob, ChatLogprobs, TextLogprobs, TopLogprob, Usage
from shoal.api.wire import DONE, sse
from shoal.engine.events import Event, Finished, TokenLogprob
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -Infinity


@dataclass
class _Choice:
    """What has been received of one choice."""

    reader: Reader
    silent: bool  # tokens are not shown: they were made only to run the prompt
    text: str = ""
    content: str = ""  # the text without the calls in it
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)  # with the text's length before the token
    depth: int | None = None  # layers, once an event has told them
    finished: Finished | None = None

    def take(self, event: Event) -> list[Delta]:
        """What a stream sends of `event`."""
        self.depth = event.depth
        if isinstance(event, Finished):
            self.finished = event
        elif event.logprob is not None and not self.silent:
            self.logprobs.append((event.logprob, len(self.text)))
        text = "" if self.silent else event.text
        self.text += text
        deltas = self.reader.push(text)
        if isinstance(event, Finished):
            deltas += self.reader.finish(whole=event.reason == "stop")
        for delta in deltas:
            self._add(delta)
        return deltas

    @property
    def reason(self) -> str | None:
        """OpenAI's finish_reason."""
        if self.finished is None:
            return None
        if self.silent:
            return "length"
        return "tool_calls" if self.reader.calls and self.finished.reason == "stop" else self.finished.reason

    def _add(self, delta: Delta) -> None:
        self.content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self.calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                self.calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


class Answer(ABC):
    """The answer to one HTTP request, filled from `events`. A streamed one and a whole one differ only in packing."""

    prefix: str

    def __init__(self, work: Work, served: ServedModel, *, logprobs: bool, include_usage: bool = False) -> None:
        self.choices = [_Choice(work.reader(), work.silent) for _ in work.requests]
        self._work, self._served = work, served
        self._with_logprobs, self._include_usage = logprobs, include_usage
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"shoal-{__version__}",
        }

    async def whole(self, events: Events) -> dict[str, Any]:
        """The complete answer."""
        async with aclosing(events):
            async for index, ready in events:
                for event in ready:
                    self.choices[index].take(event)
        return self._whole()

    async def chunks(self, events: Events) -> AsyncGenerator[bytes, None]:
        """SSE events, joined as they are to be sent: those of events that were ready together go together, since a send costs
        every process on the way to the client as much as a long one. The first comes with the engine's first event."""
        started: set[int] = set()
        async with aclosing(events):
            async for index, ready in events:
                opening = () if index in started else self._opening(index)
                started.add(index)
                chunks = [*opening, *(chunk for event in ready for chunk in self._chunks(index, event))]
                if chunks:  # else part of a character, or of a call
                    yield b"".join(map(self._sse, chunks))
        usage = {**self._head, "object": self._chunk_object, "choices": [], "usage": self.usage()}
        yield (sse(usage) if self._include_usage else b"") + DONE

    def _chunks(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream sends of `event`, as the choice of a chunk each."""
        choice = self.choices[index]
        known = len(choice.logprobs)
        deltas = choice.take(event)
        logprobs = None
        if self._with_logprobs and choice.logprobs[known:]:
            logprobs = self._logprobs(choice.logprobs[known:], index)
            deltas = deltas or [{"content": ""}]
        for delta in deltas:
            yield self._piece(index, delta, logprobs)
            logprobs = None
        if isinstance(event, Finished):
            yield self._end(index)

    def depth(self) -> str:
        """Exit name the choices run with; the names, comma-separated, when they differ."""
        depths = {choice.depth for choice in self.choices if choice.depth is not None}
        return ",".join(self._served.depth_name(layers) for layers in sorted(depths))

    def early_depth(self) -> str | None:
        """What `depth` will say at the end, where that is known already: of a depth that was asked for at once, of one that the
        router decides after the first token of each choice."""
        fixed = self._served.fixed_depth(self._work.requests[0].depth)
        if fixed is None and all(choice.depth is not None for choice in self.choices):
            return self.depth()
        return fixed

    def usage(self) -> Usage:
        """Tokens of all choices; a prompt shared by n choices counts once."""
        ends = [choice.finished for choice in self.choices if choice.finished is not None]
        prompts = ends[:: self._work.n]
        prompt, completion = sum(e.prompt_tokens for e in prompts), sum(e.completion_tokens for e in ends)
        completion = 0 if self._work.silent else completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(e.cached_tokens for e in prompts)},
            "depth": self.depth(),
        }

    def _sse(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._head, "object": self._chunk_object, "choices": [choice]}
        return sse({**chunk, "usage": None} if self._include_usage else chunk)

    _chunk_object: str

    @abstractmethod
    def _whole(self) -> dict[str, Any]: ...

    @abstractmethod
    def _opening(self, index: int) -> list[dict[str, Any]]:
        """Choices to send before the first piece of choice `index`."""

    @abstractmethod
    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]: ...

    @abstractmethod
    def _end(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Any: ...


class ChatAnswer(Answer):
    prefix = "chatcmpl"
    _chunk_object = "chat.completion.chunk"

    def _whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice.logprobs, index) if self._with_logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return self._chunk(index, delta, logprobs)

    def _end(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {}, None, self.choices[index].reason)

    def _message(self, choice: _Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.content, "refusal": None}
        if not choice.calls:
            return message
        return {**message, "content": choice.content or None, "tool_calls": choice.calls}

    def _chunk(self, index: int, delta: Delta, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> ChatLogprobs:
        return {"content": [self._token(entry) for entry, _ in tokens], "refusal": None}

    def _token(self, entry: TokenLogprob) -> ChatLogprob:
        top = [self._top(token, logprob) for token, logprob in entry.top]
        return {**self._top(entry.token, entry.logprob), "top_logprobs": top}

    def _top(self, token: int, logprob: float) -> TopLogprob:
        data = self._served.tokenizer.token_bytes(token)
        name = token_name(self._served.tokenizer, token)
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}


class TextAnswer(Answer):
    prefix = "cmpl"
    _chunk_object = "text_completion"

    def _whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._work.echo[index] + choice.text,
                "logprobs": self._all_logprobs(index) if self._with_logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": self.usage()}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        echo = self._work.echo[index]
        return [self._piece(index, {"content": echo}, None)] if echo else []

    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": delta["content"], "logprobs": logprobs, "finish_reason": None}

    def _end(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": self.choices[index].reason}

    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> TextLogprobs:
        at = len(self._work.echo[index])
        return self._columns([(entry.token, entry, at + offset) for entry, offset in tokens])

    def _all_logprobs(self, index: int) -> TextLogprobs:
        """Of the echoed prompt, where there is one, and of the answer."""
        answer, finished = self._logprobs(self.choices[index].logprobs, index), self.choices[index].finished
        entries = finished.prompt_logprobs if finished else ()
        if not entries:
            return answer
        ids = cast(Encoded, self._work.requests[index].prompt).ids
        decoder, at, rows = self._served.tokenizer.stream(), 0, list[tuple[int, TokenLogprob | None, int]]()
        for token, entry in zip(ids, entries, strict=True):
            rows.append((token, entry, at))
            at += len(decoder.push(token))
        prompt = self._columns(rows)
        return {
            "tokens": prompt["tokens"] + answer["tokens"],
            "token_logprobs": prompt["token_logprobs"] + answer["token_logprobs"],
            "top_logprobs": prompt["top_logprobs"] + answer["top_logprobs"],
            "text_offset": prompt["text_offset"] + answer["text_offset"],
        }

    def _columns(self, rows: list[tuple[int, TokenLogprob | None, int]]) -> TextLogprobs:
        """Rows of (token, what is known of it, characters before it)."""
        name = partial(token_name, self._served.tokenizer)
        entries = [entry for _, entry, _ in rows]
        return {
            "tokens": [name(token) for token, _, _ in rows],
            "token_logprobs": [None if e is None else max(e.logprob, LEAST_LOGPROB) for e in entries],
            "top_logprobs": [
                None if e is None else {name(token): max(logprob, LEAST_LOGPROB) for token, logprob in e.top}
                for e in entries
            ],
            "text_offset": [at for _, _, at in rows],
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: its characters, its name for a control token, or ``bytes:\\xe2\\x80`` for part of a character."""
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.control(token) or f"<unused:{token}>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
