"""Answers of chat and completions: one JSON object, or a stream of chunks.

Notable: the stream's order is the protocol: the role first, `finish_reason` on the last chunk of a choice, the usage in a
chunk without choices, then ``[DONE]``. A whole answer is put together from what a stream would have sent.
"""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from itertools import chain
from typing import Any, cast

from shoal import __version__
from shoal.api.answers import Answer, Choice
from shoal.api.bodies import NO_OPTIONS, StreamOptions
from shoal.api.calls import Delta
from shoal.api.client import Events
from shoal.api.json_text import paced, spread
from shoal.api.requests import EngineCall
from shoal.api.served import ServedModel
from shoal.api.shapes import ChatLogprob, TopLogprob
from shoal.api.wire import DONE, sse, sse_pieces
from shoal.engine.events import Event, Finished, TokenLogprob
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -Infinity
Row = tuple[int, TokenLogprob | None]  # a token, and what is known of it


class ChunkAnswer(Answer):
    """OpenAI's older form: chunks of one shape, each of a choice."""

    def __init__(
        self, call: EngineCall, served: ServedModel, *, logprobs: bool, options: StreamOptions | None = None
    ) -> None:
        super().__init__(call, served)
        self._with_logprobs, self._options = logprobs, options or NO_OPTIONS
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {
            "id": self.id,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"shoal-{__version__}",
        }

    async def chunks(self, events: Events) -> AsyncGenerator[bytes, None]:
        """As of `Answer`, then the usage, where it is asked for, and the end mark."""
        started: set[int] = set()
        async with aclosing(events):
            async for index, ready in events:
                self.choices[index].depth = ready[0].depth
                ready = self._due(index, ready)
                opening = () if index in started or not ready else self._opening(index, ready[-1])
                started |= {index} if ready else set()
                sent = [part async for part in paced(self._sent(index, opening, ready))]
                await self.ended()
                async for part in spread(sent):  # none: part of a character, or of a call
                    yield part
        usage = {**self._head, "object": self._chunk_object, "choices": [], "usage": self.usage()}
        yield (sse(usage) if self._options.include_usage else b"") + DONE

    def _sent(self, index: int, opening: Iterable[dict[str, Any]], ready: Iterable[Event]) -> Iterator[bytes]:
        for chunk in opening:
            yield from sse_pieces(self._chunk_of(chunk))
        for event in ready:
            for chunk in self._chunks(index, event):
                yield sse(self._chunk_of(chunk))

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
            yield self._with_ids(self._piece(index, delta, logprobs))
            logprobs = None
        if isinstance(event, Finished):
            yield self._with_ids(self._end(index))

    def _with_ids(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """A choice of a chunk, with the ids that no chunk before has told, where they are asked for."""
        if not self._call.token_ids:
            return chunk
        choice = self.choices[chunk["index"]]
        ids, choice.told = choice.tokens[choice.told :], len(choice.tokens)
        return {**chunk, "token_ids": ids}

    def _prompt(self, index: int) -> dict[str, Any]:
        """What is told of the prompt of choice `index` beside its text, where it is asked for."""
        found: dict[str, Any] = {}
        ids, finished = cast(Encoded, self._call.requests[index].prompt).ids, self.choices[index].finished
        if self._call.token_ids:
            found["prompt_token_ids"] = ids
        if self._call.prompt_logprobs and finished is not None:
            entries = finished.prompt_logprobs
            found["prompt_logprobs"] = (entry and self._ranked(entry) for entry in entries)
        return found

    def _ranked(self, entry: TokenLogprob) -> dict[str, Any]:
        """vLLM's shape: token id -> what is known of it. Beyond the alternatives a rank is not known."""
        known: dict[int, tuple[float, int | None]] = {
            token: (value, rank) for rank, (token, value) in enumerate(entry.top, 1)
        }
        known.setdefault(entry.token, (entry.logprob, None))
        return {
            str(token): {
                "logprob": max(value, LEAST_LOGPROB),
                "rank": rank,
                "decoded_token": token_name(self._served.tokenizer, token),
            }
            for token, (value, rank) in known.items()
        }

    def _chunk_of(self, choice: dict[str, Any], **beside: Any) -> dict[str, Any]:
        chunk = {**self._head, "object": self._chunk_object, **beside, "choices": [choice]}
        if self._options.continuous_usage_stats:
            return {**chunk, "usage": self.usage()}
        return {**chunk, "usage": None} if self._options.include_usage else chunk

    _chunk_object: str

    def _due(self, index: int, ready: list[Event]) -> list[Event]:
        """What of choice `index` may be sent, now that `ready` has come."""
        return ready

    @abstractmethod
    def _opening(self, index: int, last: Event) -> list[dict[str, Any]]:
        """Choices to send before the first piece of choice `index`, of which all up to `last` has come."""

    @abstractmethod
    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]: ...

    @abstractmethod
    def _end(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Any: ...


class ChatAnswer(ChunkAnswer):
    prefix = "chatcmpl"
    _chunk_object = "chat.completion.chunk"

    def _whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice.logprobs, index) if self._with_logprobs else None,
                "finish_reason": choice.reason,
                **({"token_ids": choice.tokens} if self._call.token_ids else {}),
            }
            for index, choice in enumerate(self.choices)
        ]
        head = {**self._head, "object": "chat.completion", **self._prompt(0)}
        return {**head, "choices": choices, "usage": self.usage()}

    def _opening(self, index: int, last: Event) -> list[dict[str, Any]]:
        return [{**self._chunk(index, {"role": "assistant", "content": ""}), **self._prompt(index)}]

    def _chunk_of(self, choice: dict[str, Any], **beside: Any) -> dict[str, Any]:
        beside = {"prompt_token_ids": choice.pop("prompt_token_ids")} if "prompt_token_ids" in choice else {}
        return super()._chunk_of(choice, **beside)

    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return self._chunk(index, delta, logprobs)

    def _end(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {}, None, self.choices[index].reason)

    def _message(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.content, "refusal": None}
        if not choice.calls:
            return message
        return {**message, "content": choice.content or None, "tool_calls": choice.calls}

    def _chunk(self, index: int, delta: Delta, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Any:
        """`ChatLogprobs`, whose list is made as it is written."""
        return {"content": (chat_logprob(self._served.tokenizer, entry) for entry, _ in tokens), "refusal": None}


class TextAnswer(ChunkAnswer):
    prefix = "cmpl"
    _chunk_object = "text_completion"

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._held: dict[int, list[Event]] = {}  # of choices whose beginning is not known yet

    def _whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._call.echo[index] + choice.content,
                "logprobs": self._all_logprobs(index) if self._with_logprobs else None,
                "finish_reason": choice.reason,
                **({"token_ids": choice.tokens} if self._call.token_ids else {}),
                **self._prompt(index),
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": self.usage()}

    def _due(self, index: int, ready: list[Event]) -> list[Event]:
        """All at its end where logprobs of the prompt come first: the engine tells them last."""
        if not (self._with_logprobs and self._call.echo[index]):
            return ready
        held = self._held.setdefault(index, [])
        held += ready
        return held if isinstance(held[-1], Finished) else []

    def _opening(self, index: int, last: Event) -> list[dict[str, Any]]:
        echo = self._call.echo[index]
        known = self._prompt_logprobs(index, last) if isinstance(last, Finished) and self._with_logprobs else None
        if not echo and not self._call.token_ids:
            return []
        return [{**self._piece(index, {"content": echo}, known), **self._prompt(index)}]

    def _piece(self, index: int, delta: Delta, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": delta["content"], "logprobs": logprobs, "finish_reason": None}

    def _end(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": self.choices[index].reason}

    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Any:
        """`TextLogprobs`, whose lists are made as they are written."""
        return self._columns([(entry.token, entry) for entry, _ in tokens], self._offsets(tokens, index))

    def _offsets(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Iterator[int]:
        choice = self.choices[index]
        # what a policy put before the answer has no tokens
        at = len(self._call.echo[index]) + max(0, len(choice.content) - len(choice.text))
        return (at + offset for _, offset in tokens)

    def _all_logprobs(self, index: int) -> Any:
        """Of the echoed prompt, where there is one, and of the answer."""
        tokens, finished = self.choices[index].logprobs, self.choices[index].finished
        rows: list[Row] = [(entry.token, entry) for entry, _ in tokens]
        offsets = self._offsets(tokens, index)
        if finished is None or not self._call.echo[index] or not finished.prompt_logprobs:
            return self._columns(rows, offsets)
        prompt = self._prompt_rows(index, finished)
        return self._columns(prompt + rows, chain(self._prompt_offsets(prompt), offsets))

    def _prompt_logprobs(self, index: int, finished: Finished) -> Any:
        """Of the prompt of choice `index`, where they were asked for."""
        if not finished.prompt_logprobs:
            return None
        rows = self._prompt_rows(index, finished)
        return self._columns(rows, self._prompt_offsets(rows))

    def _prompt_rows(self, index: int, finished: Finished) -> list[Row]:
        ids = cast(Encoded, self._call.requests[index].prompt).ids
        return list(zip(ids, finished.prompt_logprobs, strict=True))

    def _prompt_offsets(self, rows: list[Row]) -> Iterator[int]:
        decoder, at = self._served.tokenizer.stream(), 0
        for token, _ in rows:
            yield at
            at += len(decoder.push(token))

    def _columns(self, rows: list[Row], offsets: Iterator[int]) -> dict[str, Iterator[Any]]:
        name = partial(token_name, self._served.tokenizer)
        return {
            "tokens": (name(token) for token, _ in rows),
            "token_logprobs": (None if e is None else max(e.logprob, LEAST_LOGPROB) for _, e in rows),
            "top_logprobs": (
                None
                if e is None
                else {name(token): max(logprob, LEAST_LOGPROB) for token, logprob in (*e.top, *_own(e))}
                for _, e in rows
            ),
            "text_offset": offsets,
        }


def _own(entry: TokenLogprob) -> list[tuple[int, float]]:
    """The token itself, where it is none of its likeliest alternatives."""
    return [] if any(token == entry.token for token, _ in entry.top) else [(entry.token, entry.logprob)]


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatLogprob:
    """What is known of a token, as OpenAI has it in a chat and in a response."""

    def top(token: int, logprob: float) -> TopLogprob:
        data, name = tokenizer.token_bytes(token), token_name(tokenizer, token)
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    alternatives = [top(token, logprob) for token, logprob in entry.top]
    return {**top(entry.token, entry.logprob), "top_logprobs": alternatives}


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: its characters, its name for a control token, or ``bytes:\\xe2\\x80`` for part of a character."""
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.control(token) or f"<unused:{token}>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
