"""Reading tool calls: the text of an answer, as it comes, as OpenAI's deltas. How a call is written: `inputs.tools`.

Notable: a delta is never taken back, so text that may still become a call is held until it is one or cannot be.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from shoal.api.bodies import Function
from shoal.inputs.tools import CLOSE, OPEN, written

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*')  # names hold no quotes (`bodies.NAME`)

Delta = dict[str, Any]


class Reader(ABC):
    """Turns the text of one answer, as it comes, into OpenAI's deltas: ``content`` or ``tool_calls``."""

    calls = 0  # so far

    @abstractmethod
    def push(self, text: str) -> list[Delta]: ...

    def finish(self, *, whole: bool) -> list[Delta]:
        """The rest, once the text has ended; `whole`: not cut off by its length."""
        return []

    def _call(self, name: str, arguments: str) -> Delta:
        function = {"name": name, "arguments": arguments}
        call = {"index": self.calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.calls += 1
        return {"tool_calls": [call]}

    def _more(self, arguments: str) -> list[Delta]:
        return [{"tool_calls": [{"index": self.calls - 1, "function": {"arguments": arguments}}]}] if arguments else []


class Plain(Reader):
    """An answer without tools."""

    def push(self, text: str) -> list[Delta]:
        return [{"content": text}] if text else []


class Named(Reader):
    """The whole answer is the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        return self._more(text) if self.calls else [self._call(self._name, text)]


class Whole(Reader):
    """The whole answer is ``{"name": ..., "arguments": ...}``: the arguments pass, but for the brace after them."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        opened: list[Delta] = []
        if not self.calls:
            head = _HEAD.match(self._held)
            if head is None or head.end() == len(self._held):  # more white space may belong to it
                return []
            self._held = self._held[head.end() :]
            opened = [self._call(json.loads(head[1]), "")]
        sure = self._held.rstrip("} \t\r\n")
        self._held = self._held[len(sure) :]
        return opened + self._more(sure)

    def finish(self, *, whole: bool) -> list[Delta]:
        if not self.calls:  # cut off before its name was whole: nothing that was written is lost
            return [{"content": self._held}] if self._held else []
        return self._more(self._held.rstrip().removesuffix("}").rstrip() if whole else self._held)


class Tagged(Reader):
    """Text with calls between ``<tool_call>`` and ``</tool_call>``, each sent whole. White space before a call is left out."""

    def __init__(self, tools: Mapping[str, Function]) -> None:
        self._tools, self._held = tools, ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while True:
            before, _, rest = self._held.partition(OPEN)
            inner, closed, behind = rest.partition(CLOSE)
            if not closed:
                break
            self._held = behind
            deltas += self._read(before, inner, OPEN + inner + CLOSE)
        if OPEN not in self._held:
            kept = next((k for k in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:k])), 0)
            sure = self._held[: len(self._held) - kept].rstrip()  # what follows may be a call
            self._held = self._held[len(sure) :]
            deltas += [{"content": sure}] if sure else []
        return deltas

    def finish(self, *, whole: bool) -> list[Delta]:
        before, tag, inner = self._held.partition(OPEN)
        return self._read(before, inner if tag else None, tag + inner)

    def _read(self, before: str, inner: str | None, spelt: str) -> list[Delta]:
        call = None if inner is None else _parsed(inner, self._tools)
        if call is None:
            return [{"content": before + spelt}] if before + spelt else []
        said = before.rstrip()
        return [*([{"content": said}] if said else []), self._call(*call)]


class Either(Reader):
    """Calls as of `Tagged`, or JSON, in which nothing is a call: how it begins says which."""

    def __init__(self, tools: Mapping[str, Function]) -> None:
        self._tools = tools
        self._inner: Reader | None = None

    def push(self, text: str) -> list[Delta]:
        if self._inner is None:
            if not text:
                return []
            self._inner = Tagged(self._tools) if text.startswith("<") else Plain()
        return self._count(self._inner.push(text))

    def finish(self, *, whole: bool) -> list[Delta]:
        return [] if self._inner is None else self._count(self._inner.finish(whole=whole))

    def _count(self, deltas: list[Delta]) -> list[Delta]:
        self.calls = 0 if self._inner is None else self._inner.calls
        return deltas


def _parsed(text: str, tools: Mapping[str, Function]) -> tuple[str, str] | None:
    """(name, arguments) of a call, or None when it is no call of one of `tools`."""
    try:
        call = json.loads(text)
        json.dumps(call, allow_nan=False)  # NaN and 1e999, which Python reads, are no JSON
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in tools or not isinstance(call.get("arguments"), dict):
        return None
    return call["name"], written(call["arguments"])
