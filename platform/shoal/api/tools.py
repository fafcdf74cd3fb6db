"""Tools: how they are told to the model, and what guides its calls; `calls` reads them out of its answer.

How they, their calls and their results are written is `inputs.tools`.

With tool_choice "auto" calls are looked for in free text, and what is not a whole call of a known tool stays text; where a tool
is strict, a grammar guides what follows ``<tool_call>``. With "required", or a name, the whole answer is one call that a
grammar guides. Where the answer has a format, a grammar allows calls or JSON of that format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import StructTag

from shoal.api.bodies import ChatRequest, Function, Message, NamedTool
from shoal.api.calls import Either, Named, Plain, Reader, Tagged, Whole
from shoal.engine.events import Guide
from shoal.engine.guided import JSON_OPTIONS
from shoal.errors import RequestError
from shoal.inputs import tools
from shoal.inputs.tools import CLOSE, OPEN


class Offer:
    """The tools of one chat request, and what its tool_choice makes of them."""

    def __init__(self, body: ChatRequest) -> None:
        """Raises RequestError naming the field when the parts of `body` contradict each other."""
        self.tools = {tool.function.name: tool.function for tool in body.tools}
        choice = body.tool_choice
        if len(self.tools) < len(body.tools):
            raise RequestError("tools: a name is given twice", param="tools", do="give each function a name of its own")
        odd = next(
            (name for name, tool in self.tools.items() if tool.parameters.get("type", "object") != "object"), None
        )
        if odd is not None:
            raise RequestError(f"tools: parameters of {odd}", param="tools", allowed="a JSON schema of type object")
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
            return Guide("json_schema", json.dumps(_arguments(self.tools[self.named])))
        calls = [  # with an id, "#" in the references of a tool's schema is that schema, and its definitions are its own
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"$id": f"/{name}", **_arguments(tool)}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, tool in self.tools.items()
        ]
        return Guide("json_schema", json.dumps({"anyOf": calls}))

    def or_answer(self, answer: Guide) -> Guide:
        """Of a free answer that has a format: calls, or JSON as `answer` guides it; one call where only one is wanted."""
        schema = json.loads(str(answer.spec)) if answer.spec else {"type": "object"}
        calls = "call" if self.single else r'call ("\n"? call)*'
        rules = [f"start: answer | {calls}", f"answer: %json {_inside(schema)}"]
        rules += [f"call: {' | '.join(f'call_{at}' for at in range(len(self.tools)))}"]
        for at, (name, tool) in enumerate(self.tools.items()):
            rules.append(f"call_{at}: {json.dumps(_opening(name))} arguments_{at} {json.dumps('}' + CLOSE)}")
            rules.append(f"arguments_{at}: %json {_inside(_guided(tool))}")
        return Guide("lark", "\n".join(rules))

    def _calls_in_text(self) -> Guide:
        tags = [
            StructTag(
                trigger=OPEN,
                begin=_opening(name),
                grammar={**_guided(tool), "x-guidance": JSON_OPTIONS},
                end="}" + CLOSE,
            )
            for name, tool in self.tools.items()
        ]
        return Guide("lark", StructTag.to_grammar(tags, assume_special=False))

    def reader(self, *, formatted: bool = False) -> Reader:
        """What reads one answer; `formatted`: one that is JSON where it is no call."""
        if self.named is not None:
            return Named(self.named)
        if self.forced:
            return Whole()
        if self.told and formatted:
            return Either(self.tools)
        return Tagged(self.tools) if self.told else Plain()

    def system(self) -> str:
        """What the model is told; empty when there is nothing to tell."""
        if not self.told:
            return ""
        return tools.told(tool.model_dump(exclude={"strict"}) for tool in self.tools.values())


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
            content = tools.result(calls[message.tool_call_id or ""], _text(content, f"messages[{index}]"))
        elif message.tool_calls:
            said = "".join(tools.call(call.function.name, call.function.arguments) for call in message.tool_calls)
            content = [*tools.parts(content), {"type": "text", "text": said}]
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        plain.append({"role": role, "content": content})
    return tools.with_system(plain, system)


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


def _text(content: Any, where: str) -> str:
    parts = tools.parts(content)
    if any(part["type"] != "text" for part in parts):
        raise RequestError(
            f"{where}.content", param="messages", got="image_url", allowed="text in a message of role tool"
        )
    return "".join(part["text"] for part in parts)


def _opening(name: str) -> str:
    """How a call of the tool `name` begins, up to its arguments."""
    return f'{OPEN}{{"name": "{name}", "arguments": '


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
