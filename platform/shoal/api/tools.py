"""Tools: how they are told to the model, and how its calls are read out of its answer.

The chat template knows nothing of tools. They, their calls and their results are text inside its three roles:

    system     <tools> and one line of JSON a function, after the caller's own system text
    assistant  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, after what it says
    user       <tool_response>{"name": ..., "content": ...}</tool_response>     (a message of role "tool")

With tool_choice "auto" calls are looked for in free text, and what is not a whole call of a known tool stays text; where a
tool is strict, a grammar guides what follows ``<tool_call>``. With "required", or a name, the whole answer is one call that
a grammar guides.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import StructTag

from shoal.api.bodies import ChatRequest, Function, Message, NamedTool
from shoal.engine.events import Guide
from shoal.errors import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INTRO = f"""You can call functions. To call one, write
{OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}
with arguments that follow its parameters, which are a JSON schema.
<tools>
"""
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*')  # names hold no quotes (`bodies.NAME`)

Delta = dict[str, Any]


class Offer:
    """The tools of one chat request, and what its tool_choice makes of them."""

    def __init__(self, body: ChatRequest) -> None:
        """Raises RequestError naming the field when the parts of `body` contradict each other."""
        self.tools = {tool.function.name: tool.function for tool in body.tools}
        choice = body.tool_choice
        if len(self.tools) < len(body.tools):
            raise RequestError("tools: a name is given twice", param="tools", do="give each function a name of its own")
        if not self.tools and choice not in (None, "none"):
            raise RequestError("tool_choice without tools", param="tool_choice", do="give tools, or leave it out")
        self.named = choice.function.name if isinstance(choice, NamedTool) else None
        if self.named is not None and self.named not in self.tools:
            raise RequestError("tool_choice", param="tool_choice", got=self.named[:64], allowed=list(self.tools))
        self.forced = choice == "required" or self.named is not None
        self.told = bool(self.tools) and choice != "none"
        self.single = self.told and not body.parallel_tool_calls
        self.strict = self.told and any(tool.strict for tool in self.tools.values())

    @property
    def guide(self) -> Guide | None:
        """What a forced answer must be: the arguments of the named tool, or a whole call of one of them. Of a free one with
        strict tools: text, with calls in it."""
        if not self.forced:
            return self._calls_in_text() if self.strict else None
        if self.named is not None:
            return Guide("json_schema", json.dumps(self.tools[self.named].parameters))
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": tool.parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, tool in self.tools.items()
        ]
        return Guide("json_schema", json.dumps(_hoisted(calls)))

    def _calls_in_text(self) -> Guide:
        anything = {"type": "object"}  # of a tool that is not strict: its schema may be one that no grammar knows
        tags = [
            StructTag(
                trigger=OPEN,
                begin=f'{OPEN}{{"name": "{name}", "arguments": ',
                grammar=tool.parameters if tool.strict else anything,
                end="}" + CLOSE,
            )
            for name, tool in self.tools.items()
        ]
        return Guide("lark", StructTag.to_grammar(tags, assume_special=False))

    def reader(self) -> Reader:
        """What reads one answer."""
        if self.named is not None:
            return _Named(self.named)
        if self.forced:
            return _Whole()
        return _Tagged(self.tools) if self.told else Plain()

    def system(self) -> str:
        """What the model is told; empty when there is nothing to tell."""
        if not self.told:
            return ""
        return (
            _INTRO
            + "\n".join(json.dumps(_shown(tool), ensure_ascii=False) for tool in self.tools.values())
            + "\n</tools>"
        )


def as_plain(messages: Sequence[Message], system: str = "") -> list[dict[str, Any]]:
    """`messages` in the roles that a chat template knows, with `system` put after the first system text. Raises RequestError
    (param ``messages``) for a message that lacks what its role needs or has what it must not have."""
    plain: list[dict[str, Any]] = []
    calls: dict[str, str] = {}  # id -> name of the function
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]", calls)
        calls |= {call.id: call.function.name for call in message.tool_calls}
        content: Any = message.model_dump(include={"content"})["content"]
        if message.role == "tool":
            result = {"name": calls[message.tool_call_id or ""], "content": _text(content, f"messages[{index}]")}
            content = f"<tool_response>{json.dumps(result, ensure_ascii=False)}</tool_response>"
        elif message.tool_calls:
            said = "".join(_call_text(call.function.name, call.function.arguments) for call in message.tool_calls)
            content = [*_parts(content), {"type": "text", "text": said}]
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        plain.append({"role": role, "content": content})
    if not system:
        return plain
    if plain[0]["role"] == "system":
        return [
            {**plain[0], "content": [*_parts(plain[0]["content"]), {"type": "text", "text": "\n\n" + system}]},
            *plain[1:],
        ]
    return [{"role": "system", "content": system}, *plain]


# ---- reading calls ---------------------------------------------------------------------------------------------------


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


class _Named(Reader):
    """The whole answer is the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name

    def push(self, text: str) -> list[Delta]:
        if not text:
            return []
        return self._more(text) if self.calls else [self._call(self._name, text)]


class _Whole(Reader):
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


class _Tagged(Reader):
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


def _parsed(text: str, tools: Mapping[str, Function]) -> tuple[str, str] | None:
    """(name, arguments) of a call, or None when it is no call of one of `tools`."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in tools or not isinstance(call.get("arguments"), dict):
        return None
    return call["name"], json.dumps(call["arguments"], ensure_ascii=False)


# ---- messages --------------------------------------------------------------------------------------------------------


def _check(message: Message, where: str, calls: Mapping[str, str]) -> None:
    if message.tool_calls and message.role != "assistant":
        raise RequestError(
            f"{where}.tool_calls", param="messages", got=f"role {message.role}", allowed="role assistant"
        )
    if (message.tool_call_id is not None) != (message.role == "tool"):
        do = "give it in messages of role tool, and only there"
        raise RequestError(f"{where}.tool_call_id", param="messages", got=f"role {message.role}", do=do)
    if message.tool_call_id is not None and message.tool_call_id not in calls:
        got = message.tool_call_id[:64]
        raise RequestError(f"{where}.tool_call_id", param="messages", got=got, allowed="the id of a call before it")
    if message.content is None and not message.tool_calls:
        raise RequestError(f"{where}.content", param="messages", got="nothing", allowed="text, or a list of parts")


def _call_text(name: str, arguments: str) -> str:
    """A call of the history as the model writes one. Arguments that are no JSON are kept as the text that they are."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = arguments
    return OPEN + json.dumps({"name": name, "arguments": values}, ensure_ascii=False) + CLOSE


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(content: Any, where: str) -> str:
    parts = _parts(content)
    if any(part["type"] != "text" for part in parts):
        raise RequestError(
            f"{where}.content", param="messages", got="image_url", allowed="text in a message of role tool"
        )
    return "".join(part["text"] for part in parts)


def _shown(tool: Function) -> dict[str, Any]:
    return {key: value for key, value in tool.model_dump(exclude={"strict"}).items() if value is not None}


def _hoisted(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """One of `calls`. ``$defs`` inside a tool's own schema are found by references from the root, so they move there."""
    defs: dict[str, Any] = {}
    for call in calls:
        arguments = call["properties"]["arguments"]
        for key in ("$defs", "definitions"):
            if key in arguments:
                defs.setdefault(key, {}).update(arguments[key])
    return {"anyOf": calls, **defs} if len(calls) > 1 else {**calls[0], **defs}
