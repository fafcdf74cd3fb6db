"""A conversation with the API: what the page shows as the API's messages, and its streamed answer as what a page shows.

Notable: what the page shows of an answer is Markdown made of it, with a line of facts below; the answer itself rides along
in the message's metadata, and is what the model is told that it said.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
import math
import mimetypes
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import openai

T = TypeVar("T")

CONNECT_SECONDS, READ_SECONDS = 5.0, 300.0
SHOWN_EVERY = 0.05  # seconds between two states of an answer on their way to the browser
AGAIN_AFTER = 1.0  # seconds: a state without news, since Gradio only then finds out that its tab was closed
CODE = (
    "def ",
    "class ",
    "import ",
    "from ",
    "async def ",
    "@",
)  # what the first line of an answer in Python begins with
FAULT = "fault"  # `id` in the metadata of a message that says why there is no answer

Message = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """What /v1/models says of the model."""

    name: str
    context: int  # tokens of prompt and answer together
    depths: dict[str, int]  # exit name -> layers, shallowest first
    quantization: str

    @property
    def layers(self) -> int:
        return max(self.depths.values())


@dataclass(frozen=True)
class Settings:
    """Of one answer. None: the server decides."""

    depth: str
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    tolerance: float | None = None  # nats a token, with depth "auto" only

    def body(self, model: str, asked: list[Message]) -> dict[str, Any]:
        """The body of the request to /v1/chat/completions."""
        tolerance = self.tolerance if self.depth == "auto" else None
        given = {"seed": self.seed, "quality_tolerance": tolerance, "depth": self.depth}
        return {
            "model": model,
            "messages": asked,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **{name: value for name, value in given.items() if value is not None},
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Said:
    """An answer so far. `below`: its facts, up to here until it is `whole`; `fault`: why there is no more of it."""

    text: str
    below: str = ""
    whole: bool = False
    fault: str = ""


def client(base_url: str) -> openai.AsyncOpenAI:
    """A client for `base_url` (which ends in /v1). A refused request is not sent again: the user decides."""
    timeout = openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=0)


async def read_cards(api: openai.AsyncOpenAI, first: str | None) -> list[Card]:
    """The cards of the server's models, that of `first` before the others; a model is named once, whatever aliases it has.
    Raises openai.OpenAIError."""
    listed = [(card.id, card.model_extra or {}) for card in (await api.models.list()).data]
    cards = [_card(name, said) for name, said in listed if said.get("root", name) == name]
    return sorted(cards, key=lambda card: card.name != first)


async def answer(api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings) -> AsyncIterator[Message]:
    """States of the answer as a message of the page, each instead of the one before; an error is a message as well."""
    async with aclosing(stream(api, card, asked, settings)) as states:
        async for state in states:
            yield said(state) if state.text or not state.fault else faulty(state.fault)


async def stream(
    api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings
) -> AsyncGenerator[Said, None]:
    """States of the answer, each instead of the one before.

    Closing the iterator closes the stream, which cancels the request in the engine.
    """
    text, told, usage, depth, pieces, first, shown, last = "", "", None, "", 0, 0.0, 0.0, Said("")
    began = time.perf_counter()
    try:
        body = settings.body(card.name, asked)
        sent = await api.chat.completions.create(model=card.name, messages=asked, stream=True, extra_body=body)
        async with sent, aclosing(_or_nothing(aiter(sent), SHOWN_EVERY)) as chunks:
            depth = sent.response.headers.get("X-Shoal-Depth", "")
            async for chunk in chunks:
                now = time.perf_counter()
                if chunk is not None:
                    usage = chunk.usage or usage
                    piece = "".join(choice.delta.content or "" for choice in chunk.choices)
                    text, pieces = text + piece, pieces + (piece != "")
                    first = first or now - began
                if text != told and now - shown > SHOWN_EVERY:
                    told, shown = text, now
                    last = Said(text, facts(depth, pieces, card, f"first after {first:.2f} s, stopped", now - began))
                    yield last
                elif told and now - shown > AGAIN_AFTER:
                    shown = now
                    yield last
    except openai.OpenAIError as error:
        yield Said(text, fault=reason(error))
        return
    tokens, depth = (usage.completion_tokens, (usage.model_extra or {}).get("depth", "")) if usage else (pieces, depth)
    below = facts(depth, tokens, card, f"first after {first:.2f} s, last", time.perf_counter() - began)
    yield Said(text, below, whole=True)


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


def messages(history: Iterable[Message], new: Message, system: str = "") -> list[Message]:
    """The API's messages for what the page shows and the textbox's `new` ({"text", "files"}); a question that got no answer
    is left out. `system` comes first, if there is one."""
    told: list[Message] = [{"role": "system", "content": system}] if system else []
    asked: list[Message] = []
    for message in history:
        metadata = message.get("metadata") or {}
        if metadata.get("id") == FAULT:
            del asked[-1:]
        elif message["role"] == "user":
            asked.append({"role": "user", "content": _content(message["content"])})
        else:
            asked.append({"role": "assistant", "content": metadata.get("log", "")})
    return [*told, *asked, {"role": "user", "content": _content(_parts(new))}]


def said(state: Said) -> Message:
    """An answer as a message of the page, with a line of facts below it, or of why there is no more of it."""
    parts = [{"type": "text", "text": markdown(state.text)}]
    if below := beneath(state):
        parts.append({"type": "text", "text": below})
    return {"role": "assistant", "content": parts, "metadata": {"log": state.text}}


def fault(line: str) -> str:
    """Why something is not there, as markup."""
    return f'<div class="fault" role="alert">{html.escape(line)}</div>'


def beneath(state: Said) -> str:
    """The line below an answer as markup; empty for none. While an answer comes its line is hidden, and when it is stopped, it
    stays and is shown (`style.css`)."""
    if state.fault:
        return fault(state.fault)
    kind = "facts" if state.whole else "sofar"
    return f'<div class="{kind}">{html.escape(state.below)}</div>' if state.below else ""


def faulty(why: str) -> Message:
    """Why there is no answer, in one line, as a message of the page."""
    return {"role": "assistant", "content": [{"type": "text", "text": fault(why)}], "metadata": {"id": FAULT}}


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


def reason(error: openai.OpenAIError) -> str:
    """What the API said, or what to do here, where that differs from what a program would do."""
    if isinstance(error, openai.APIConnectionError):
        return "The server does not answer; is it still running?"
    if isinstance(error, openai.AuthenticationError):
        return "This server answers only with one of its API keys: write it in the box for the API key."
    body = error.body if isinstance(error, openai.APIError) and isinstance(error.body, dict) else {}
    return f"{body.get('message', error)}."


def facts(depth: str, tokens: int, card: Card, times: str, total: float) -> str:
    """``depth shallow (2 of 8 layers) · 24 tokens · 240 tokens/s · first after 0.02 s, last after 0.10 s``; `times`: what
    stands before the last time, which is `total`, in seconds.

    The speed is over the whole time: tokens that this side read late, all at once, would make any other look too high.
    """
    layers = f" ({card.depths[depth]} of {card.layers} layers)" if depth in card.depths else ""
    speed = f" · {tokens / total:,.0f} tokens/s" if tokens > 1 else ""
    ran = f"depth {depth}{layers} · " if depth else ""
    return f"{ran}{tokens} token{'s' * (tokens != 1)}{speed} · {times} after {total:.2f} s"


def curl(url: str, body: dict[str, Any], *, key: bool) -> str:
    """The shell command that sends `body` to `url`, which ends in /v1; with `key`, an API key from the environment.

    Pictures would fill the page, so the command reads them from files of this name: picture-1.png, picture-2.jpeg...
    """
    text, pictures = json.dumps(body, ensure_ascii=False, indent=2), []
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                pictures.append(part["image_url"]["url"])
    if pictures:
        text = text.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")  # the shell reads what follows
    for number, picture in enumerate(pictures, 1):
        kind, _, _ = picture.partition(",")
        name = f"picture-{number}.{kind.removeprefix('data:image/').removesuffix(';base64')}"
        text = text.replace(picture, f"{kind},$(base64 -w0 {name})", 1)
    lines = [f"curl --no-buffer {url}/chat/completions", "-H 'Content-Type: application/json'"]
    lines += ['-H "Authorization: Bearer $SHOAL_API_KEY"'] if key else []
    end = "JSON" if pictures else "'JSON'"
    return " \\\n  ".join([*lines, f"--data-binary @- <<{end}"]) + f"\n{text}\nJSON"


def markdown(text: str) -> str:
    """`text` as the page's Markdown: Python gets a fence, and HTML is shown instead of obeyed."""
    if "```" in text:
        return text
    if text.lstrip().startswith(CODE):
        return f"```python\n{text.strip()}\n```"
    return html.escape(text, quote=False)


def _card(name: str, said: dict[str, Any]) -> Card:
    return Card(name, said["max_model_len"], said["depths"], said["quantization"])


def _parts(new: Message) -> list[Any]:
    return [*({"path": file} for file in new.get("files") or []), new.get("text") or ""]


def _content(content: Any) -> str | list[Message]:
    """A user's content in either of Gradio's forms as the API's: plain text, or images as data URLs and then text."""
    items = content if isinstance(content, list) else [content]
    text = "\n".join(filter(None, map(_text, items)))
    images: list[Message] = [
        {"type": "image_url", "image_url": {"url": _data_url(path)}} for path in map(_path, items) if path
    ]
    if not images:
        return text
    return [*images, {"type": "text", "text": text}] if text else images


def _text(item: Any) -> str:
    return item if isinstance(item, str) else item.get("text", "")


def _path(item: Any) -> str:
    """Of a file; empty for text. A string is always text: what somebody types is never opened."""
    return "" if isinstance(item, str) else item.get("path") or item.get("file", {}).get("path", "")


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
