"""A conversation with the API: its models, a question as a request, the streamed answer as states, errors in one line. What a
page makes of them: `bubbles`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import openai

T = TypeVar("T")

CONNECT_SECONDS, READ_SECONDS = 5.0, 300.0
SHOWN_EVERY = 0.05  # seconds between two states of an answer on their way to the browser
AGAIN_AFTER = 1.0  # seconds: a state without news, since Gradio only then finds out that its tab was closed
PATIENCE = 3.0  # seconds without a word, from which on the page says for how long
# seconds: of a service that takes no work now, such as one that is being replaced, and of one that is not there, which may be
# this very process on its way out
INSISTED, INSISTED_ON_NOBODY, ASKED_EVERY = 60.0, 10.0, 2.0
TOO_LONG = "context_length_exceeded"  # the API's code

Message = dict[str, Any]


@dataclass(frozen=True)
class Words:
    """What one of the pages says where a model is served that was made for it: the service's policy has them."""

    path: str  # of the page
    system: str  # may be empty
    examples: tuple[str, ...] = ()  # first messages; none: the page's own
    depth: str = "auto"  # of questions that name none


@dataclass(frozen=True)
class Card:
    """What /v1/models says of the model."""

    name: str
    context: int  # tokens of prompt and answer together
    depths: dict[str, int]  # exit name -> layers, shallowest first
    quantization: str
    adapted: Mapping[str, Any] = field(default_factory=dict)  # what its exits are worth, as the API says it
    words: Words | None = None  # of the page that it was made for

    @property
    def layers(self) -> int:
        return max(self.depths.values())


@dataclass(frozen=True)
class Settings:
    """Of one answer. None: the server decides."""

    depth: str  # "": as the service's policy has it
    max_tokens: int | None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    tolerance: float | None = None  # nats a token, where no depth is picked
    store: bool = False  # its texts, where the service may
    tools: tuple[dict[str, Any], ...] = ()  # that the model may call

    def body(self, model: str, asked: list[Message]) -> dict[str, Any]:
        """The body of the request to /v1/chat/completions."""
        tolerance = self.tolerance if self.depth in ("auto", "") else None
        given: Message = {
            "seed": self.seed,
            "quality_tolerance": tolerance,
            "depth": self.depth or None,
            "store": self.store or None,
        }
        given |= {"tools": list(self.tools) or None}
        most = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return {
            "model": model,
            "messages": asked,
            **most,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **{name: value for name, value in given.items() if value is not None},
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Said:
    """An answer so far. `below`: its facts, up to here until it is `whole`; `fault`: why there is no more of it; `waits`:
    seconds without a word, where they are worth telling; `settings`: those that it was asked with in the end."""

    text: str
    below: str = ""
    whole: bool = False
    fault: str = ""
    waits: float | None = None
    settings: Settings | None = None
    refused: bool = False  # the API takes no question now, and is asked again
    id: str = ""  # of the answer, by which the API knows it; "" where it has none yet
    kept: bool = False  # its texts are
    calls: tuple[Message, ...] = ()  # of tools, as the API gives them; of a whole answer
    before: tuple[Message, ...] = ()  # calls before it, and what they gave: messages of the API


@dataclass(frozen=True)
class Later:
    """The API takes no work now; it is asked again."""


@dataclass(frozen=True)
class _Opened:
    """The API has begun to answer: at this depth, if it said so, and with these settings."""

    depth: str
    settings: Settings
    kept: bool  # its texts will be


def client(base_url: str) -> openai.AsyncOpenAI:
    """A client for `base_url` (which ends in /v1). A refused request is not sent again: the user decides."""
    timeout = openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=0)


async def read_cards(api: openai.AsyncOpenAI, first: str | None) -> list[Card]:
    """The cards of the server's models, that of `first` before the others; a model is named once, whatever aliases it has.
    Raises openai.OpenAIError."""
    listed = [(card.id, card.model_extra or {}) for card in (await api.models.list()).data]
    cards = [
        Card(
            name,
            said["max_model_len"],
            said["depths"],
            said["quantization"],
            said.get("adapted") or {},
            _words(said.get("page")),
        )
        for name, said in listed
        if said.get("root", name) == name
    ]
    return sorted(cards, key=lambda card: card.name != first)


def _words(page: Mapping[str, Any] | None) -> Words | None:
    return None if page is None else Words(page["path"], page["system"], tuple(page["examples"]), str(page["depth"]))


async def stream(
    api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings
) -> AsyncGenerator[Said, None]:
    """States of the answer, each instead of the one before. Where fewer tokens fit than `settings` ask for, as many as fit.

    Closing the iterator closes the stream, which cancels the request in the engine.
    """
    text, told, usage, depth, pieces, first, end = "", "", None, "", 0, 0.0, ""
    calls: dict[int, Message] = {}
    last, began, given = Said(""), time.perf_counter(), settings
    shown = moved = began  # when a state was told, and when a word came
    try:
        async with (
            aclosing(_chunks(api, card, asked, settings)) as coming,
            aclosing(_or_nothing(coming, SHOWN_EVERY)) as chunks,
        ):
            async for chunk in chunks:
                now = time.perf_counter()
                if isinstance(chunk, Later):
                    last = replace(last, refused=True)
                elif isinstance(chunk, _Opened):
                    depth, given, last = chunk.depth, chunk.settings, Said("", kept=chunk.kept)
                elif chunk is not None:
                    usage, last = chunk.usage or usage, replace(last, id=chunk.id or last.id)
                    piece = "".join(choice.delta.content or "" for choice in chunk.choices)
                    _take_calls(calls, chunk)
                    end = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), end)
                    text, pieces = text + piece, pieces + (piece != "")
                    first, moved = first or now - began, now if piece else moved
                waits = now - moved if now - moved > PATIENCE else None
                if text != told and (not told or now - shown > SHOWN_EVERY):
                    told, shown = text, now
                    below = facts(depth, pieces, card, f"first after {first:.2f} s, stopped", now - began)
                    last = replace(last, text=text, below=below, settings=given, refused=False)
                    yield last
                elif (told or waits) and now - shown > AGAIN_AFTER:
                    shown = now
                    yield last if waits is None else replace(last, waits=waits)
    except openai.OpenAIError as error:
        yield Said(text, fault=reason(error, card), id=last.id)
        return
    more = (usage.model_extra or {}) if usage else {}
    tokens, depth = (usage.completion_tokens, more.get("depth", "")) if usage else (pieces, depth)
    below = facts(depth, tokens, card, f"first after {first:.2f} s, last", time.perf_counter() - began, more)
    if end == "length":
        full = (
            f": the conversation fills the {card.context} tokens of context" if given != settings else " at Most tokens"
        )
        below += f" \N{MIDDLE DOT} cut off{full}"
    made = tuple(calls[at] for at in sorted(calls))
    yield Said(text, below, whole=True, settings=given, id=last.id, kept=last.kept, calls=made)


def _take_calls(calls: dict[int, Message], chunk: Any) -> None:
    """Put what a chunk says of calls to what is known of them, by their numbers."""
    for choice in chunk.choices:
        for part in choice.delta.tool_calls or ():
            one = calls.setdefault(
                part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            one["id"] = part.id or one["id"]
            if part.function is not None:
                one["function"]["name"] += part.function.name or ""
                one["function"]["arguments"] += part.function.arguments or ""


async def _chunks(
    api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings
) -> AsyncGenerator[Any, None]:
    """`_Opened`, and then what the API sends."""

    async def opened() -> tuple[Any, Settings]:
        # by which the API gives all that the context has left
        for given in (settings, replace(settings, max_tokens=None)):
            body = given.body(card.name, asked)
            try:
                create = api.chat.completions.create
                return await create(model=card.name, messages=asked, stream=True, extra_body=body), given
            except openai.BadRequestError as error:
                if given.max_tokens is None or error.code != TOO_LONG or error.param != "max_tokens":
                    raise
        raise AssertionError("the second has no max_tokens")

    async for found in insist(opened):
        if isinstance(found, Later):
            yield found
        else:
            sent, settings = found
    async with sent:
        unused = sent.response.headers.get("X-Shoal-Unused", "").split(",")
        kept = settings.store and "store" not in map(str.strip, unused)
        yield _Opened(sent.response.headers.get("X-Shoal-Depth", ""), settings, kept)
        async for chunk in sent:
            yield chunk


async def insist(call: Callable[[], Awaitable[T]]) -> AsyncGenerator[T | Later, None]:
    """What `call` gives, after a `Later` for each time that the API took no work. Raises what `call` raises, in the end also
    that."""
    began = time.perf_counter()
    while True:
        try:
            found = await call()
        except openai.APITimeoutError:
            raise
        except openai.APIConnectionError:
            if time.perf_counter() - began > INSISTED_ON_NOBODY:
                raise
        except openai.APIStatusError as error:
            if error.status_code != 503 or time.perf_counter() - began > INSISTED:
                raise
        else:
            yield found
            return
        yield Later()
        await asyncio.sleep(ASKED_EVERY)


async def _or_nothing(chunks: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None, None]:
    """`chunks`, and None where none has come for `seconds`: what came before is then shown, however long the next one takes."""
    coming = asyncio.ensure_future(_next(chunks))
    try:
        while True:
            if not (await asyncio.wait({coming}, timeout=seconds))[0]:
                yield None
                continue
            if (chunk := coming.result()) is None:
                return
            yield chunk
            coming = asyncio.ensure_future(_next(chunks))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _next(chunks: AsyncIterator[T]) -> T | None:
    return await anext(chunks, None)


def number(name: str, text: str, *, whole: bool = False) -> Any:
    """What was typed for a setting; None for nothing. Raises ValueError with a line for the page."""
    if not text.strip():
        return None
    try:
        value = int(text) if whole else float(text)
        if 0 <= value < math.inf:
            return value
    except ValueError:
        pass
    kind = "a whole number" if whole else "a number"
    raise ValueError(f"{name} is {text[:40]!r}, but must be {kind} from 0, or empty.")


def reason(error: openai.OpenAIError, card: Card | None = None) -> str:
    """What the API said, or what to do here, where that differs from what a program would do."""
    if isinstance(error, openai.APIConnectionError):
        return "The server does not answer; is it still running?"
    if isinstance(error, openai.AuthenticationError):
        return "This server answers only with one of its API keys: load the page anew, and log in."
    body = error.body if isinstance(error, openai.APIError) and isinstance(error.body, dict) else {}
    if card and body.get("code") == TOO_LONG:
        return f"The conversation does not fit the model's {card.context} tokens of context: begin a new one, or shorten it."
    return f"{body.get('message', error)}."


def facts(depth: str, tokens: int, card: Card, times: str, total: float, usage: dict[str, Any] | None = None) -> str:
    """``depth shallow (2 of 8 layers) · 24 tokens · 240 tokens/s · first after 0.02 s, last after 0.10 s``; `times`: what
    stands before the last time, which is `total`, in seconds. Of an answer with a tolerance `usage` also tells the mean depth
    and what it lost: ``depth full (8 of 8 layers, 4.1 in the mean) · lost 0.03 of 0.1 nats a token``.

    The speed is over the whole time: tokens that this side read late, all at once, would make any other look too high.
    """
    mean, quality = (usage or {}).get("mean_depth"), (usage or {}).get("quality") or {}
    in_mean = f", {mean:.1f} in the mean" if mean and depth in card.depths and mean != card.depths[depth] else ""
    layers = f" ({card.depths[depth]} of {card.layers} layers{in_mean})" if depth in card.depths else ""
    speed = f" · {tokens / total:,.0f} tokens/s" if tokens > 1 else ""
    ran = f"depth {depth}{layers} · " if depth else ""
    lost = (
        f" · lost {quality['spent']:.2g} of {quality['allowed']:g} nats a token"
        if quality.get("spent") is not None
        else ""
    )
    return f"{ran}{tokens} token{'s' * (tokens != 1)}{speed}{lost} · {times} after {total:.2f} s"
