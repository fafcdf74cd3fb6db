"""Engine events as OpenAI answers: one JSON object, or a stream of SSE chunks.

Notable: the stream's order is the protocol: the role first, `finish_reason` on the last chunk of a choice, the usage in a
chunk without choices, then ``[DONE]``. Answers are plain dicts whose shapes the TypedDicts below state.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from shoal import __version__
from shoal.api.requests import Work
from shoal.api.served import ServedModel
from shoal.api.wire import DONE, sse
from shoal.engine.events import Event, Finished, Token, TokenLogprob
from shoal.inputs.tokenizer import SPECIAL, Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -Infinity

Events = AsyncGenerator[tuple[int, Event], None]  # (choice, event), of `client.gather`


class PromptTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    depth: str  # exit name the answer ran with; several, comma-separated, when the choices differ


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # characters from the start of the choice's text


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class _Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]  # there when include_usage is set: null until the last


class TextCompletion(_Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # tokens of prompt and answer together
    depths: dict[str, int]  # exit name -> layers, shallowest first
    quantization: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@dataclass
class _Choice:
    """What has been received of one choice."""

    text: str = ""
    logprobs: list[tuple[TokenLogprob, int]] = field(default_factory=list)  # with the text's length before the token
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.finished = event
        elif event.logprob is not None:
            self.logprobs.append((event.logprob, len(self.text)))
        self.text += event.text


class Answer(ABC):
    """The answer to one HTTP request, filled from `events`. A streamed one and a whole one differ only in packing."""

    prefix: str

    def __init__(self, work: Work, served: ServedModel, *, logprobs: bool, include_usage: bool = False) -> None:
        self.choices = [_Choice() for _ in work.requests]
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
            async for index, event in events:
                self.choices[index].take(event)
        return self._whole()

    async def chunks(self, events: Events) -> AsyncGenerator[bytes, None]:
        """SSE events, each ready to be sent; the first comes with the engine's first event."""
        started: set[int] = set()
        async with aclosing(events):
            async for index, event in events:
                if index not in started:
                    started.add(index)
                    for opening in self._opening(index):
                        yield self._sse(opening)
                choice = self.choices[index]
                at = len(choice.text)
                choice.take(event)
                logprobs = None
                if self._with_logprobs and isinstance(event, Token) and event.logprob is not None:
                    logprobs = self._logprobs([(event.logprob, at)], index)
                if event.text or logprobs:
                    yield self._sse(self._piece(index, event.text, logprobs))
                if isinstance(event, Finished):
                    yield self._sse(self._end(index, event.reason))
        if self._include_usage:
            yield sse({**self._head, "object": self._chunk_object, "choices": [], "usage": self.usage()})
        yield DONE

    def depth(self) -> str:
        """Exit name the choices ran with; the names, comma-separated, when they differ."""
        depths = {choice.finished.depth for choice in self.choices if choice.finished is not None}
        return ",".join(self._served.depth_name(layers) for layers in sorted(depths))

    def usage(self) -> Usage:
        """Tokens of all choices; a prompt shared by n choices counts once."""
        ends = [choice.finished for choice in self.choices if choice.finished is not None]
        prompts = ends[:: self._work.n]
        prompt, completion = sum(e.prompt_tokens for e in prompts), sum(e.completion_tokens for e in ends)
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
    def _piece(self, index: int, text: str, logprobs: Any) -> dict[str, Any]: ...

    @abstractmethod
    def _end(self, index: int, reason: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> Any: ...


class ChatAnswer(Answer):
    prefix = "chatcmpl"
    _chunk_object = "chat.completion.chunk"

    def _whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs, index) if self._with_logprobs else None,
                "finish_reason": choice.finished.reason if choice.finished else None,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def _piece(self, index: int, text: str, logprobs: Any) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, logprobs)

    def _end(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {}, None, reason)

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
                "logprobs": self._logprobs(choice.logprobs, index) if self._with_logprobs else None,
                "finish_reason": choice.finished.reason if choice.finished else None,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": self.usage()}

    def _opening(self, index: int) -> list[dict[str, Any]]:
        return [self._piece(index, self._work.echo[index], None)] if self._work.echo[index] else []

    def _piece(self, index: int, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _end(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, tokens: list[tuple[TokenLogprob, int]], index: int) -> TextLogprobs:
        name = self._served.tokenizer
        return {
            "tokens": [token_name(name, entry.token) for entry, _ in tokens],
            "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry, _ in tokens],
            "top_logprobs": [
                {token_name(name, token): max(logprob, LEAST_LOGPROB) for token, logprob in entry.top}
                for entry, _ in tokens
            ],
            "text_offset": [len(self._work.echo[index]) + at for _, at in tokens],
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: its characters, its name for a control token, or ``bytes:\\xe2\\x80`` for part of a character."""
    data = tokenizer.token_bytes(token)
    if not data:
        return SPECIAL[token] if token < len(SPECIAL) else f"<unused:{token}>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
