"""Engine events as an answer: what has been received of each choice, and what all forms of an answer share.

`chunks` has the forms of chat and completions, `blocks` what those of the other protocols have in common.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shoal.api.calls import Delta, Reader
from shoal.api.client import Events
from shoal.api.json_text import value_of
from shoal.api.requests import EngineCall
from shoal.api.served import ServedModel
from shoal.api.shapes import Usage
from shoal.api.wire import sse
from shoal.engine.events import Event, Finished, Sampling, Token, TokenLogprob
from shoal.inputs.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Choice:
    """What has been received of one choice."""

    reader: Reader
    silent: bool  # tokens are not shown: they were made only to run the prompt
    decoder: StreamDecoder  # of all its tokens: what it has decoded may still be held back for a stop string
    text: str = ""
    content: str = ""  # the text without the calls in it
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)  # with the characters before the token
    decoded: int = 0  # characters
    tokens: list[int] = field(default_factory=list)
    told: int = 0  # of them, to a stream
    count: int = 0  # tokens
    first: int | None = None  # layers, once an event has told them
    depth: int | None = None  # those of the last event
    spent: float | None = None  # nats of its tolerance, where that is known
    finished: Finished | None = None
    exact: int | None = None  # layers at which it loses nothing by itself: those asked for, or all
    stopped: Callable[[Sequence[int]], bool] = lambda tokens: False  # whether what a client stops at ended these tokens

    def take(self, event: Event) -> list[Delta]:
        """What a stream sends of `event`."""
        self.first = event.depth if self.first is None else self.first
        self.depth, self.spent = event.depth, self._lost(event)
        if isinstance(event, Finished):
            self.finished, self.count = event, event.completion_tokens
        else:
            self.count += 1
        if isinstance(event, Token) and not self.silent:
            self.tokens.append(event.token)
        if isinstance(event, Token) and event.logprob is not None and not self.silent:
            self.logprobs.append((event.logprob, self.decoded))
            self.decoded += len(self.decoder.push(event.token))
        text = "" if self.silent else event.text
        self.text += text
        deltas = self.reader.push(text)
        if isinstance(event, Finished):
            deltas += self.reader.finish(whole=event.reason == "stop" and not self.stopped(self.tokens))
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
        called = self.reader.calls and not self.reader.cut and self.finished.reason == "stop"
        return "tool_calls" if called else self.finished.reason

    def _lost(self, event: Event) -> float | None:
        """Nats of its tolerance after `event`. Where the engine measured none, it is as before at a depth that loses nothing:
        nothing, unless a shallower one began the answer, or another engine measured some."""
        if event.spent is not None:
            return event.spent
        before = self.spent if self.count else 0.0
        return before if event.depth == self.exact else None

    def _add(self, delta: Delta) -> None:
        self.content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self.calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                self.calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


Store = Callable[["Answer"], Awaitable[bool]]  # keeps the texts of an answer that is complete; whether it did


class Answer(ABC):
    """The answer to one HTTP request, filled from `events`. A streamed one and a whole one differ only in packing."""

    prefix: str
    id: str
    store: Store | None = None
    stored = False

    def __init__(self, call: EngineCall, served: ServedModel) -> None:
        exact = served.config.asked(call.requests[0].depth) or served.config.layers
        self.choices = [
            Choice(
                call.read_by(each),
                call.silent,
                served.tokenizer.stream(),
                exact=exact,
                stopped=partial(_is_stopped, served.tokenizer, request.sampling),
            )
            for each, request in enumerate(call.requests)
        ]
        self._call, self._served = call, served

    @property
    def served(self) -> ServedModel:
        """The model that gives it."""
        return self._served

    async def whole(self, events: Events) -> dict[str, Any]:
        """The complete answer, as `json_text.pieces` takes it."""
        async with aclosing(events):
            async for index, ready in events:
                for event in ready:
                    self.choices[index].take(event)
        await self.ended()
        return self._whole()

    async def ended(self) -> None:
        """Stores it, where that is wanted and all of it has come: before its end is told, so that who has read it finds it."""
        if self.store is not None and all(choice.finished is not None for choice in self.choices):
            store, self.store = self.store, None
            self.stored = await store(self)

    @abstractmethod
    def chunks(self, events: Events) -> AsyncGenerator[bytes, None]:
        """SSE events, joined as they are to be sent: those of events that were ready together go together, since a send costs
        every process on the way to the client as much as a long one. The first comes with the engine's first event."""

    def calls_valid(self) -> bool | None:
        """Whether each call in it names a tool that was offered, with an object of arguments, and none was begun that is no
        call, which is text then; None without one."""
        offered = self._call.offered
        if not offered:
            return None
        # one that was cut off tells nothing of who wrote it
        calls = [each for choice in self.choices for each in (choice.calls[:-1] if choice.reader.cut else choice.calls)]
        is_text = any(choice.reader.meant(choice.content) for choice in self.choices)
        if not calls and not is_text:
            return None
        return not is_text and all(_is_valid(each, offered) for each in calls)

    def complete(self) -> dict[str, Any]:
        """The complete answer, once all of it has come, streamed or not."""
        found: dict[str, Any] = value_of(self._whole())
        return found

    def failed(self, envelope: dict[str, Any]) -> bytes:
        """The event that ends a stream in which an error came: its `envelope` as it is."""
        return sse(envelope)

    def depth(self) -> str:
        """Exit name the choices run with; the names, comma-separated, when they differ."""
        return self._named(choice.depth for choice in self.choices)

    def _named(self, depths: Iterable[int | None]) -> str:
        return ",".join(
            self._served.depth_name(layers) for layers in sorted({each for each in depths if each is not None})
        )

    def early_depth(self) -> str | None:
        """The depth that the choices begin with, where that is known already: of one that was asked for at once, of one that
        the router decides after the first token of each choice, however many have come with it."""
        fixed = self._served.fixed_depth(self._call.requests[0].depth)
        if fixed is None and all(choice.first is not None for choice in self.choices):
            return self._named(choice.first for choice in self.choices)
        return fixed

    def usage(self) -> Usage:
        """Tokens of all choices so far; a prompt shared by n choices counts once. What was cached is told at the ends."""
        prompt, completion = self._call.prompt_tokens, sum(choice.count for choice in self.choices)
        completion = 0 if self._call.silent else completion
        found: Usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "depth": self.depth(),
        }
        ends = [choice.finished for choice in self.choices[:: self._call.n]]
        if None not in ends:
            found["prompt_tokens_details"] = {"cached_tokens": sum(end.cached_tokens for end in ends if end)}
        allowed = self._call.requests[0].quality_tolerance
        if allowed is not None:
            found["quality"] = {"spent": self._spent(), "allowed": allowed}
        done = [choice.finished for choice in self.choices if choice.finished is not None]
        deeper = any(end.first_depth < end.depth for end in done if end.first_depth)  # by a second look
        if (deeper or allowed is not None) and len(done) == len(self.choices) and all(end.mean_depth for end in done):
            # the end of an empty answer took its time, too
            tokens = [max(1, end.completion_tokens) for end in done]
            layers = sum(end.mean_depth * count for end, count in zip(done, tokens, strict=True))
            found["mean_depth"] = layers / sum(tokens)
        return found

    def _spent(self) -> float | None:
        """Nats a token that all choices lost so far; None where that of one is not known."""
        spent = [choice.spent for choice in self.choices]
        if None in spent:
            return None
        return sum(nats for nats in spent if nats) / max(1, sum(choice.count for choice in self.choices))

    @abstractmethod
    def _whole(self) -> dict[str, Any]: ...


def _is_stopped(tokenizer: Tokenizer, sampling: Sampling, tokens: Sequence[int]) -> bool:
    """Whether a text, or a token, that the client stops at has ended an answer, which may be in the middle of a call. The token
    is not among those of the answer, so it may have been."""
    if sampling.stop_token_ids or not sampling.stop:
        return bool(sampling.stop_token_ids)
    most = 4 * max(map(len, sampling.stop))  # a letter has four bytes at most, a token one at least
    end = tokenizer.decode(tokens[-most:])
    return any(stop in end for stop in sampling.stop)


def _is_valid(call: Mapping[str, Any], offered: Sequence[str]) -> bool:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    return function["name"] in offered and isinstance(arguments, dict)


def measured(usage: Usage) -> dict[str, Any]:
    """What `usage` tells of an answer with a tolerance, for other forms of it."""
    return {name: usage[name] for name in ("mean_depth", "quality") if name in usage}
