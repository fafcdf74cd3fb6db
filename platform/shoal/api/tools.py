"""Tools: how they are told to the model, and what guides its calls; `calls` reads them out of its answer.

How they, their calls and their results are written is `inputs.tools`, or what an open model's own chat template teaches
(`inputs.call_formats`), which then is given them as they are.

With tool_choice "auto" calls are looked for in free text, and what is not a whole call of a known tool stays text; where a tool
is strict, a grammar guides what follows ``<tool_call>``. With "required" or a name the whole answer is one call that a grammar
guides. Where it has a format, a grammar allows calls or JSON of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llguidance import StructTag

from shoal.api.bodies import AllowedChoice, ChatRequest, Function, Message, NamedTool, ResponseFormat
from shoal.api.calls import Named, Plain, Reader, Whole, reader
from shoal.engine.events import Guide
from shoal.engine.guided import JSON_OPTIONS
from shoal.errors import RequestError
from shoal.inputs import tools
from shoal.inputs.call_formats import OURS, offered
from shoal.inputs.tokenizer import Tokenizer

# Of a schema of objects, what does not let them have more properties than it names.
_PLAIN = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "title",
    "description",
    "$schema",
}


class Offer:
    """The tools of one chat request, and what its tool_choice makes of them."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: the model's, whose chat template may know tools. Raises RequestError naming the field when the parts of
        `body` contradict each other."""
        # None: tools are told as text; the tokenizer of another engine's model knows nothing of them
        self._taught = getattr(tokenizer, "calls", None)
        self.format, self._tokenizer = self._taught or OURS, tokenizer
        self.tools = {tool.function.name: tool.function for tool in body.tools}
        choice = body.tool_choice
        if len(self.tools) < len(body.tools):
            raise RequestError("tools: a name is given twice", param="tools", do="give each function a name of its own")
        odd = next(
            (name for name, tool in self.tools.items() if tool.parameters.get("type", "object") != "object"), None
        )
        if odd is not None:
            raise RequestError(f"tools: parameters of {odd}", param="tools", allowed="a JSON schema of type object")
        if not self.tools and choice not in (None, "none", "auto"):
            raise RequestError("tool_choice without tools", param="tool_choice", do="give tools, or leave it out")
        self.named = choice.function.name if isinstance(choice, NamedTool) else None
        if self.named is not None and self.named not in self.tools:
            raise RequestError("tool_choice", param="tool_choice", got=self.named[:64], allowed=list(self.tools))
        self.forced = choice == "required" or self.named is not None
        self.told = bool(self.tools) and choice != "none"
        self.single = self.told and not body.parallel_tool_calls
        self.strict = self.told and any(tool.strict for tool in self.tools.values())
        if self.strict and not self.forced and self._may_answer_as_called(body.response_format):
            # What opens a call elsewhere tells one from an answer, which must be no way around a strict tool.
            self.format = replace(self.format, bare=False)

    @property
    def guide(self) -> Guide | None:
        """What a forced answer must be: the arguments of the named tool, or a whole call of one of them. Of a free one with
        strict tools: text, with calls in it."""
        if not self.forced:
            return self._calls_in_text() if self.strict else None
        if self._taught is not None:
            return self._lark("call", strictly=True, names=[] if self.named is None else [self.named])
        if self.named is not None:
            return Guide("json_schema", json.dumps(_arguments(self.tools[self.named])))
        return Guide("json_schema", json.dumps({"anyOf": self._schemas(_arguments)}))

    def _schemas(self, arguments_of: Callable[[Function], dict[str, Any]]) -> list[dict[str, Any]]:
        """A schema for a call of each tool. With an id, "#" in the references of a tool's schema is that schema, and its
        definitions are its own."""
        key = self.format.arguments
        return [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: {"$id": f"/{name}", **arguments_of(tool)}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name, tool in self.tools.items()
        ]

    def or_answer(self, answer: Guide) -> Guide:
        """Of a free answer that has a format: calls, or JSON as `answer` guides it; one call where only one is wanted."""
        schema = json.loads(str(answer.spec)) if answer.spec else {"type": "object"}
        if self.format.bare:  # both are JSON, which one schema tells apart
            answers = [{"$id": "/.answer", **schema}, *self._schemas(_guided)]
            return Guide("json_schema", json.dumps({"anyOf": answers}))
        many = not self.single and not self.format.listed
        calls = r'call ("\n"? call)*' if many else "call"
        return self._lark(f"answer | {calls}", f"answer: %json {_inside(schema)}")

    def _calls_in_text(self) -> Guide:
        """Text, and calls as their tools have them: no text spells what opens one, in whichever tokens."""
        opened = self.format.open
        if self.format.bare or self._is_control(opened):
            begun = r"[ \t\r\n]*([^ \t\r\n{](?s:.*))?" if self.format.bare else "(?s:.*)"
            spelt = re.escape(opened).replace("/", r"\/")
            text = f"TEXT: /{begun}/ & ~/(?s:.*){spelt}(?s:.*)/"
            return self._lark("call | TEXT" if self.format.bare else "TEXT call?", text)
        tags = [
            StructTag(
                trigger=opened,
                begin=self.format.begin(name),
                grammar={**_guided(tool), "x-guidance": JSON_OPTIONS},
                end=self.format.end,
            )
            for name, tool in self.tools.items()
        ]
        return Guide("lark", StructTag.to_grammar(tags, assume_special=False))

    def _lark(self, start: str, *more: str, strictly: bool = False, names: Sequence[str] = ()) -> Guide:
        """A grammar in which ``call`` is one of the tools `names` [all that may be called], `strictly`: with arguments as its
        parameters say."""
        called = [*(names or self.tools)]
        rules = [f"start: {start}", *more, f"call: {' | '.join(f'call_{at}' for at in range(len(called)))}"]
        for at, name in enumerate(called):
            tool = self.tools[name]
            rules.append(
                f"call_{at}: {self._literal(self.format.begin(name))} arguments_{at} {self._literal(self.format.end)}"
            )
            rules.append(f"arguments_{at}: %json {_inside(_arguments(tool) if strictly else _guided(tool))}")
        return Guide("lark", "\n".join(rules))

    def _literal(self, text: str) -> str:
        """`text` as a part of a grammar, control tokens around a call as themselves."""
        pieces = [text]
        for mark in (self.format.open, self.format.close):
            if mark and self._is_control(mark) and self._tokenizer is not None:
                token = f"<[{self._tokenizer.special(mark)}]>"
                pieces = [each for piece in pieces for each in _around(piece, mark, token)]
        return " ".join(each if each.startswith("<[") else json.dumps(each) for each in pieces if each)

    def _is_control(self, mark: str) -> bool:
        return self._taught is not None and self._tokenizer is not None and mark in self._tokenizer.specials

    @property
    def frame(self) -> tuple[str, str] | None:
        """What opens and closes the call that is to end a free answer."""
        return (self.format.open, self.format.close) if self.single and not self.forced and self.format.close else None

    def reader(self, *, formatted: bool = False) -> Reader:
        """What reads one answer; `formatted`: one that is JSON where it is no call."""
        if self.named is not None and self._taught is None:
            return Named(self.named)
        if self.forced:
            return Whole(self.format)
        if not self.told:
            return Plain()
        return reader(self.tools, self.format, formatted=formatted, most=1 if self.single else None)

    def _may_answer_as_called(self, given: ResponseFormat | None) -> bool:
        """May JSON of the format that is `given` be what is read as a call, where nothing stands in front of one?"""
        if not self.format.bare or given is None or given.type == "text":
            return False
        schema = given.json_schema.schema_ if given.json_schema is not None else {}
        kind, named = schema.get("type"), schema.get("properties")
        if isinstance(kind, str) and kind != "object":
            return False
        bounded = schema.get("additionalProperties") is False and _PLAIN.issuperset(schema)
        return not (bounded and isinstance(named, dict) and not {"name", self.format.arguments}.issubset(named))

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """The tools as the model's own chat template is given them; None where it is not."""
        return offered(self._functions()) if self.told and self._taught is not None else None

    def system(self) -> str:
        """What the model is told; empty when there is nothing to tell."""
        return tools.told(self._functions()) if self.told and self._taught is None else ""

    def _functions(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude={"strict"}) for tool in self.tools.values()]


def with_allowed(body: ChatRequest) -> ChatRequest:
    """`body` with those of its tools alone that its tool_choice allows. Raises RequestError for one that it does not have."""
    choice = body.tool_choice
    if not isinstance(choice, AllowedChoice):
        return body
    allowed = {tool.function.name for tool in choice.allowed_tools.tools}
    odd = allowed - {tool.function.name for tool in body.tools}
    if odd:
        known = [tool.function.name for tool in body.tools]
        raise RequestError("tool_choice", param="tool_choice", got=min(odd)[:64], allowed=known or "one of tools")
    tools = [tool for tool in body.tools if tool.function.name in allowed]
    return body.model_copy(update={"tools": tools, "tool_choice": choice.allowed_tools.mode})


def as_native(messages: Sequence[Message], system: str = "") -> list[dict[str, Any]]:
    """As `as_plain`, for a chat template that knows tools: calls and their results stay what they are."""
    native: list[dict[str, Any]] = []
    known = tools.Asked()
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]", known)
        known.add((call.id, call.function.name) for call in message.tool_calls)
        one = message.model_dump(include={"content", "tool_calls", "tool_call_id"})
        if message.role == "tool":
            one["content"] = _text(one["content"], f"messages[{index}]")
        one = {name: value for name, value in one.items() if value or name == "content"}
        native.append({**one, "role": "system" if message.role == "developer" else message.role})
    return tools.with_system(native, system)


def as_plain(messages: Sequence[Message], system: str = "") -> list[dict[str, Any]]:
    """`messages` in the roles that a chat template knows, with `system` put after the first system text. Raises RequestError
    (param ``messages``) for a message that lacks what its role needs or has what it must not have."""
    plain: list[dict[str, Any]] = []
    calls = tools.Asked()
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]", calls)
        calls.add((call.id, call.function.name) for call in message.tool_calls)
        content: Any = message.model_dump(include={"content"})["content"]
        if message.role == "tool":
            content = tools.result(calls.answered(message.tool_call_id or ""), _text(content, f"messages[{index}]"))
        elif message.tool_calls:
            said = "".join(tools.call(call.function.name, call.function.arguments) for call in message.tool_calls)
            content = [*tools.parts(content), {"type": "text", "text": said}]
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        plain.append({"role": role, "content": content})
    return tools.with_system(plain, system)


# ---- messages --------------------------------------------------------------------------------------------------------


def _check(message: Message, where: str, calls: tools.Asked) -> None:
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


def _text(content: Any, where: str) -> str:
    parts = tools.parts(content)
    if any(part["type"] != "text" for part in parts):
        raise RequestError(
            f"{where}.content", param="messages", got="image_url", allowed="text in a message of role tool"
        )
    return "".join(part["text"] for part in parts)


def _around(text: str, mark: str, token: str) -> list[str]:
    """`text` in pieces, with `token` where it has the `mark`."""
    before, found, behind = text.partition(mark)
    return [before, token, behind] if found else [text]


def _inside(schema: Mapping[str, Any]) -> str:
    """`schema` as a part of a grammar."""
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _guided(tool: Function) -> dict[str, Any]:
    """The schema of a free call's arguments. Of a tool that is not strict it is any object: its own schema may be one that no
    grammar can follow."""
    return _arguments(tool) if tool.strict else {"type": "object"}


def _arguments(tool: Function) -> dict[str, Any]:
    """What a call's arguments must be: an object, even where `parameters` say nothing."""
    return {"type": "object", **tool.parameters}
