"""``shoal chat``: a conversation in the terminal with any server of the OpenAI protocol, over streaming HTTP.

Ctrl-C while an answer comes stops that answer (closing the stream cancels it in the engine); at the prompt it leaves.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx

from shoal.config import AUTO
from shoal.errors import ResourceError, ShoalError, UsageError, did_you_mean

HELP = """\
/image PATH   show the model a PNG, JPEG or WebP with your next message
/depth NAME   how deep it thinks: auto, or an exit of the model (shallow, middle, full)
/new          start a new conversation
/help         this text
/quit         leave (also Ctrl-D)"""
COMMANDS = ("/image", "/depth", "/new", "/help", "/quit")
CONNECT_SECONDS, READ_SECONDS = 5.0, 300.0

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def chat(url: str, model: str | None = None, api_key: str | None = None) -> None:
    """Talks with `model` (default: the server's first) at `url` (which ends in /v1) until the user leaves.

    Raises ResourceError when the server cannot be reached, UsageError when it refuses the key or the model.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    with httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout) as http:
        talk = Conversation(http, model or _first_model(http))
        print(f"{talk.model} at {url}   /help for commands")
        while not talk.over:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            try:
                talk.turn(line)
            except ShoalError as error:
                print(error.message, file=sys.stderr)


@dataclass
class Conversation:
    """The messages so far, and what the next one will carry."""

    http: httpx.Client
    model: str
    out: TextIO = field(default_factory=lambda: sys.stdout)
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # data URLs for the next message
    depth: str = AUTO
    over: bool = False

    def turn(self, line: str) -> None:
        """Obeys a command or answers a message. A message that fails is forgotten, so it can be sent again."""
        if not line:
            return
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
            return
        parts = [{"type": "image_url", "image_url": {"url": image}} for image in self.images]
        content = [*parts, {"type": "text", "text": line}] if parts else line
        self.messages.append({"role": "user", "content": content})
        try:
            answer = self._answer()
        except ShoalError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        self.images.clear()

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/image":
            self.images.append(data_url(rest))
            print(f"{len(self.images)} image(s) will go with your next message", file=self.out)
        elif name == "/depth":
            self.depth = rest or AUTO
            print(f"depth: {self.depth}", file=self.out)
        elif name == "/new":
            self.messages.clear()
            self.images.clear()
        elif name == "/help":
            print(HELP, file=self.out)
        elif name == "/quit":
            self.over = True
        else:
            raise UsageError("unknown command", got=name, allowed=COMMANDS, do=did_you_mean(name, COMMANDS))

    def _answer(self) -> str:
        """Prints the answer as it comes and then its figures; what was received when the user stops it counts."""
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.depth != AUTO:
            body["depth"] = self.depth
        text, usage = "", None
        first = None
        began = time.perf_counter()
        try:
            with closing(_stream(self.http, body)) as chunks:
                for chunk in chunks:
                    piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                    if piece and first is None:
                        first = time.perf_counter()
                    text += piece
                    print(piece, end="", file=self.out, flush=True)
                    usage = chunk.get("usage") or usage
        except KeyboardInterrupt:
            print("\n(stopped)", end="", file=self.out)
        print(f"\n{figures(usage, began, first, time.perf_counter())}", file=self.out, flush=True)
        return text


def figures(usage: dict[str, Any] | None, began: float, first: float | None, ended: float) -> str:
    """``in 12 · out 87 · 41 tok/s · first 0.09 s · depth full``; a stopped answer has no usage."""
    parts = []
    if usage:
        count = usage["completion_tokens"]
        parts += [f"in {usage['prompt_tokens']}", f"out {count}"]
        if first is not None and count > 1:
            parts.append(f"{(count - 1) / max(ended - first, 1e-9):.0f} tok/s")
    if first is not None:
        parts.append(f"first {first - began:.2f} s")
    if usage and usage.get("depth"):
        parts.append(f"depth {usage['depth']}")
    return "[" + " · ".join(parts or [f"{ended - began:.2f} s"]) + "]"


def data_url(path: str) -> str:
    """An image file as a ``data:`` URL. Raises UsageError when it is no readable image file by its suffix."""
    file = Path(path.strip()).expanduser()
    kind = _MEDIA.get(file.suffix.lower())
    if kind is None:
        raise UsageError("image", got=path, allowed=sorted(_MEDIA))
    try:
        return f"data:{kind};base64," + base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"cannot read image {file}", got=error.strerror) from error


def _stream(http: httpx.Client, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Chunks of one answer. Closing the generator closes the connection."""
    with _reaching(http), http.stream("POST", "chat/completions", json=body) as reply:
        if reply.status_code != 200:
            reply.read()
            raise _refused(reply)
        for line in reply.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise ShoalError(chunk["error"]["message"])
            yield chunk


def _first_model(http: httpx.Client) -> str:
    with _reaching(http):
        reply = http.get("models")
    if reply.status_code != 200:
        raise _refused(reply)
    models = reply.json()["data"]
    if not models:
        raise ResourceError(f"{http.base_url} serves no model")
    return str(models[0]["id"])


@contextmanager
def _reaching(http: httpx.Client) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        got = str(error) or type(error).__name__
        raise ResourceError(f"no answer from {http.base_url}", got=got, do="start it with shoal serve") from error


def _refused(reply: httpx.Response) -> ShoalError:
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = reply.text[:200]
    return UsageError(f"the server answered {reply.status_code}", got=message)
