"""Reading tool calls: the text of an answer, as it comes, as OpenAI's deltas. How a call is written: `inputs.call_formats`.

Notable: a delta is never taken back, so text that may still become a call is held until it is one or cannot be.
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal.api.bodies import Function
from shoal.inputs.call_formats import OURS, SPACE, Called, CallFormat, Closing
from shoal.inputs.tools import call

Delta = dict[str, Any]


class Reader(ABC):
    """Turns the text of one answer, as it comes, into OpenAI's deltas: ``content`` or ``tool_calls``."""

    calls = 0  # so far
    cut = False  # the answer ended before the arguments of the last of them did
    opens = ""  # what opens a call that nothing guides

    @abstractmethod
    def push(self, text: str) -> list[Delta]: ...

    def meant(self, said: str) -> bool:
        """Whether a call was meant and is none, since what begins one is in what the answer `said` as text."""
        return bool(self.opens) and self.opens in said

    def finish(self, *, whole: bool) -> list[Delta]:
        """The rest, once the text has ended; `whole`: not cut off by its length. Of a call that was cut off before its name
        nothing is shown: neither what frames it nor a part of its JSON is text."""
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
        self._name, self._inside = name, _Inside()

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._inside.take(text)
        return self._more(text) if self.calls else [self._call(self._name, text)]

    def finish(self, *, whole: bool) -> list[Delta]:
        self.cut = bool(self.calls) and not self._inside.ended
        return []


class Whole(Reader):
    """The whole answer is one call, which a grammar has guided: its arguments pass as they come."""

    def __init__(self, written: CallFormat = OURS) -> None:
        self._held, self._inside = "", _Inside()
        before = rf"(?:{re.escape(written.open)}\s*)?(?:\[\s*)?"  # no white space that two parts could take
        self._head = re.compile(  # names hold no quotes (`bodies.NAME`)
            rf'\s*{before}\{{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"{written.arguments}"\s*:\s*'
        )

    def push(self, text: str) -> list[Delta]:
        if self.calls:
            return self._more(self._inside.take(text))
        self._held += text
        head = self._head.match(self._held)
        if head is None or head.end() == len(self._held):  # more white space may belong to it
            return []
        rest, self._held = self._held[head.end() :], ""
        return [self._call(head[1], ""), *self._more(self._inside.take(rest))]

    def finish(self, *, whole: bool) -> list[Delta]:
        self.cut = bool(self.calls) and not self._inside.ended
        return []


class _Inside:
    """Where in a JSON object a text is that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._text, self._escaped, self.ended = 0, False, False, False

    def take(self, text: str) -> str:
        """`text` up to where the object ends; nothing of what comes after it."""
        for at, char in enumerate("" if self.ended else text):
            if self._text:
                self._text = self._escaped or char != '"'
                self._escaped = not self._escaped and char == "\\"
                continue
            self._text = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if char in "}]" and self._depth <= 0:
                self.ended = True
                return text[: at + 1]
        return "" if self.ended else text


class Tagged(Reader):
    """Text with calls as the model's format frames them, each sent whole: between ``<tool_call>`` and ``</tool_call>``, or
    behind one tag up to the end. White space before a call is left out."""

    def __init__(self, tools: Mapping[str, Function], written: CallFormat = OURS, *, most: int | None = None) -> None:
        """`most`: calls that are read; the others that come with them are left out."""
        self._tools, self._written, self._most, self._held = tools, written, most, ""
        self.opens = written.open
        self._closing = Closing(written.close)  # of what stands behind the tag that opens

    def push(self, text: str) -> list[Delta]:
        self._held += text
        opened = self._written.open
        deltas = self._closed(ended=False)
        if opened not in self._held:
            sure = self._held[: len(self._held) - _begun(opened, self._held)].rstrip()  # what follows may be a call
            self._held = self._held[len(sure) :]
            deltas += [{"content": sure}] if sure else []
        return deltas

    def finish(self, *, whole: bool) -> list[Delta]:
        deltas, said = self._closed(ended=True), ""
        rest, self._held = self._held, ""
        while self._written.open in rest:
            before, tag, inner = rest.partition(self._written.open)
            found = self._written.read(inner, self._tools)
            if found is None or (self._written.close and found[1].strip()):
                said, rest = said + before + tag, inner
                continue
            deltas += self._made(said + before, found[0])
            said, rest = "", found[1]
        rest = said + rest
        if not whole:
            rest = self._uncut(rest)
        # White space behind a call is no more said than that before one.
        return deltas + ([{"content": rest}] if rest.strip() or (rest and not self.calls) else [])

    def _uncut(self, rest: str) -> str:
        """The `rest` of an answer that was cut off, without a call that is not whole."""
        opened, at = self._written.open, -1
        while (at := rest.find(opened, at + 1)) >= 0:
            if rest[at + len(opened) :].lstrip(SPACE)[:1] in ("", "{", "["):  # else the text is about calls
                return rest[:at].rstrip()
        begun = _begun(opened, rest)
        return rest[: len(rest) - begun].rstrip() if begun > 1 else rest  # one letter may be anything

    def _closed(self, *, ended: bool) -> list[Delta]:
        """What is in front of, and in, the calls in what is held that have come to their end."""
        deltas: list[Delta] = []
        opened, close = self._written.open, self._written.close
        while close:
            before, _, rest = self._held.partition(opened)
            end = self._end(rest, ended)
            if end < 0:
                break
            inner, self._held = rest[:end], rest[end + len(close) :]
            self._closing = Closing(close)
            deltas += self._read(before, inner, close)
        return deltas

    def _end(self, rest: str, ended: bool) -> int:
        """Where in `rest`, behind what opens a call, it is closed: not in a text of its arguments, unless it is no call then
        either. -1 where that is not known yet."""
        close = self._written.close
        end = self._closing.find(rest)
        if (end >= 0 or ended) and (first := rest.find(close)) != end:
            found = self._written.read(rest[:end] if end >= 0 else rest, self._tools)
            return end if found is not None and not found[1].strip() else first
        return end

    def _read(self, before: str, inner: str, behind: str) -> list[Delta]:
        """What is closed, as a call; where it is none, one that is opened once more in it may be."""
        opened, said = self._written.open, before
        while (found := self._written.read(inner, self._tools)) is None or found[1].strip():
            skipped, tag, more = inner.partition(opened)
            said += opened + skipped
            if not tag:
                return [{"content": said + behind}]
            inner = more
        return self._made(said, found[0])

    def _made(self, before: str, calls: Sequence[Called]) -> list[Delta]:
        """`calls`, as many of them as are read, with what is said `before` them."""
        said = before.rstrip()
        left = len(calls) if self._most is None else max(self._most - self.calls, 0)
        return [*([{"content": said}] if said else []), *(self._call(*call) for call in calls[:left])]


class Bare(Tagged):
    """As `Tagged`, and an answer that begins with JSON may be calls with nothing in front of them: it is held until it ends,
    or, `formatted`, until it is other JSON."""

    def __init__(
        self,
        tools: Mapping[str, Function],
        written: CallFormat,
        *,
        most: int | None = None,
        formatted: bool = False,
    ) -> None:
        super().__init__(tools, written, most=most)
        self._begun, self._formatted = "", formatted
        self._bare: bool | None = None  # not known yet
        head = re.compile(rf'\s*\{{\s*"name"\s*:\s*"[^"]*"\s*,\s*"{written.arguments}"\s*:')
        self._head = None if formatted else head  # JSON that was asked for may begin likewise

    def meant(self, said: str) -> bool:
        return super().meant(said) or (self._head is not None and self._head.match(said) is not None)

    def push(self, text: str) -> list[Delta]:
        self._begun += text
        start = self._begun.lstrip(SPACE)
        if self._bare is None and start:
            self._bare = start.startswith("{")
        if self._bare and self._formatted:
            self._bare = self._may_be_call(start)
        if self._bare is not False:
            return []
        text, self._begun = self._begun, ""
        return super().push(text)

    def finish(self, *, whole: bool) -> list[Delta]:
        text, self._begun = self._begun, ""
        called = self._bare and self._written.read(text, self._tools) is not None
        if self._bare and not called and not whole and self._may_be_call(text.lstrip(SPACE)):
            return []
        return [*super().push(self._written.open + text if called else text), *super().finish(whole=whole)]

    def _may_be_call(self, start: str) -> bool:
        tight = re.sub(r"\s", "", start)
        heads = [re.sub(r"\s", "", self._written.begin(name)) for name in self._tools]
        # Once it is one it is not asked again: a long call comes in thousands of pieces.
        self._formatted = not any(tight.startswith(head) for head in heads)
        return not self._formatted or any(head.startswith(tight) for head in heads)


class Either(Reader):
    """Calls, or JSON, in which nothing is a call: how it begins says which."""

    def __init__(self, tools: Mapping[str, Function], written: CallFormat = OURS, *, most: int | None = None) -> None:
        self._tagged = Tagged(tools, written, most=most)
        self._open, self._begun = written.open, ""
        self._inner: Reader | None = None

    def push(self, text: str) -> list[Delta]:
        if self._inner is None:
            self._begun += text
            if not self._begun or (self._begun != self._open and self._open.startswith(self._begun)):
                return []
            self._inner = self._tagged if self._begun.startswith(self._open) else Plain()
            text, self._begun = self._begun, ""
        return self._count(self._inner.push(text))

    def finish(self, *, whole: bool) -> list[Delta]:
        if self._inner is None:
            self._inner = self._tagged
            self._inner.push(self._begun)
        return self._count(self._inner.finish(whole=whole))

    def _count(self, deltas: list[Delta]) -> list[Delta]:
        self.calls = 0 if self._inner is None else self._inner.calls
        return deltas


def _begun(opened: str, text: str) -> int:
    """How many letters at the end of `text` may begin `opened`."""
    return next((k for k in range(len(opened) - 1, 0, -1) if text.endswith(opened[:k])), 0)


def rewritten(text: str, tools: Iterable[Mapping[str, Any]], written: CallFormat) -> str:
    """The whole answer `text` to an offer of `tools` (as a chat has them) with its calls in our words."""
    offered = {one["name"]: Function(**one) for one in (tool["function"] for tool in tools)}
    its = reader(offered, written, formatted=False, most=None)
    deltas = [*its.push(text), *its.finish(whole=True)]
    calls = [one["function"] for delta in deltas for one in delta.get("tool_calls", ())]
    said = "".join(delta.get("content", "") for delta in deltas)
    return said + "".join(call(one["name"], one["arguments"]) for one in calls)


def reader(tools: Mapping[str, Function], written: CallFormat, *, formatted: bool, most: int | None) -> Reader:
    """What reads a free answer of a model that writes calls as `written`; `formatted`: one that is JSON where it is no call."""
    if written.bare:
        return Bare(tools, written, most=most, formatted=formatted)
    return (Either if formatted else Tagged)(tools, written, most=most)
