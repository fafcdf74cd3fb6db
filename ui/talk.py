"""A conversation with the API: what the page shows as the API's messages, and its streamed answer as what the page shows.

Notable: what the page shows of an answer is Markdown made of it, with a line of facts below; the answer itself rides along
in the message's metadata, and is what the model is told that it said.
"""

from __future__ import annotations

import base64
import html
import mimetypes
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

CONNECT_SECONDS, READ_SECONDS = 5.0, 300.0
SHOWN_EVERY = 0.05  # seconds between two states of an answer on their way to the browser
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
    depth: str
    max_tokens: int
    temperature: float


def client(base_url: str) -> openai.AsyncOpenAI:
    """A client for `base_url` (which ends in /v1). A refused request is not sent again: the user decides."""
    timeout = openai.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=0)


async def read_card(api: openai.AsyncOpenAI, name: str | None) -> Card:
    """The card of the model `name`, or of the server's first. Raises openai.OpenAIError."""
    cards = {card.id: card for card in (await api.models.list()).data}
    card = cards.get(name or "") or next(iter(cards.values()))
    said = card.model_extra or {}
    return Card(card.id, said["max_model_len"], said["depths"], said["quantization"])


async def answer(api: openai.AsyncOpenAI, card: Card, asked: list[Any], settings: Settings) -> AsyncIterator[Message]:
    """States of the answer as a message of the page, each instead of the one before; an error is a message as well.

    Closing the iterator closes the stream, which cancels the request in the engine.
    """
    text, usage, began, first, shown = "", None, time.perf_counter(), 0.0, 0.0
    try:
        stream = await api.chat.completions.create(
            model=card.name,
            messages=asked,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"depth": settings.depth},
        )
        async with stream:
            async for chunk in stream:
                usage = chunk.usage or usage
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                now = time.perf_counter()
                first = first or now - began
                if text and now - shown > SHOWN_EVERY:
                    shown = now
                    yield said(text)
    except openai.OpenAIError as error:
        yield fault(error)
        return
    yield said(text, facts(usage, card, first, time.perf_counter() - began))


def messages(history: Iterable[Message], new: Message) -> list[Message]:
    """The API's messages for what the page shows and the textbox's `new` ({"text", "files"}); a question that got no answer
    is left out."""
    asked: list[Message] = []
    for message in history:
        metadata = message.get("metadata") or {}
        if metadata.get("id") == FAULT:
            asked.pop()
        elif message["role"] == "user":
            asked.append({"role": "user", "content": _content(message["content"])})
        else:
            asked.append({"role": "assistant", "content": metadata.get("log", "")})
    return [*asked, {"role": "user", "content": _content(_parts(new))}]


def said(text: str, below: str = "") -> Message:
    """An answer as a message of the page, with a line of facts below it."""
    parts = [{"type": "text", "text": markdown(text)}]
    if below:
        parts.append({"type": "text", "text": f'<div class="facts">{html.escape(below)}</div>'})
    return {"role": "assistant", "content": parts, "metadata": {"log": text}}


def fault(error: openai.OpenAIError) -> Message:
    """Why there is no answer, in one line, as a message of the page."""
    line = f'<div class="fault" role="alert">{html.escape(reason(error))}</div>'
    return {"role": "assistant", "content": [{"type": "text", "text": line}], "metadata": {"id": FAULT}}


def reason(error: openai.OpenAIError) -> str:
    """What the API said, with what to do about it here where that differs."""
    if isinstance(error, openai.APIConnectionError):
        return "The server does not answer; is it still running?"
    if not isinstance(error, openai.APIError):
        return str(error)
    hints = {
        "context_length_exceeded": "Clear the chat to start anew, or ask for fewer tokens.",
        "invalid_api_key": "Give this server's API key in the settings.",
    }
    hint = hints.get(str(error.code), "")
    body = error.body if isinstance(error.body, dict) else {}
    return f"{body.get('message', error.message)}. {hint}".strip()


def facts(usage: Any, card: Card, first: float, total: float) -> str:
    """``depth shallow (2 of 8 layers) · 24 tokens · 310 tokens/s · first after 0.02 s``; times in seconds."""
    if usage is None:
        return ""
    depth = (usage.model_extra or {}).get("depth", "")
    layers = f" ({card.depths[depth]} of {card.layers} layers)" if depth in card.depths else ""
    tokens = usage.completion_tokens
    speed = f" · {(tokens - 1) / (total - first):.0f} tokens/s" if tokens > 1 and total > first else ""
    return f"depth {depth}{layers} · {tokens} token{'s' * (tokens != 1)}{speed} · first after {first:.2f} s"


def markdown(text: str) -> str:
    """`text` as the page's Markdown: Python gets a fence, and HTML is shown instead of obeyed."""
    if "```" in text:
        return text
    if text.lstrip().startswith(CODE):
        return f"```python\n{text.strip()}\n```"
    return html.escape(text, quote=False)


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
