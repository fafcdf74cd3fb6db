"""How tools, their calls and their results are written for a model in whose chat template there are three roles and no tools,
ours among them; `call_formats` has those of open models that know tools:

    system     <tools> and one line of JSON a function, after the caller's own system text
    assistant  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, after what it says
    user       <tool_response>{"name": ..., "content": ...}</tool_response>     (a message of role "tool")

A service shows them so, and fine-tuning rows are written so: what a model learns from is what it will be shown.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NO_PARAMETERS = {"type": "object", "properties": {}}  # of a function that says nothing of them
_INTRO = f"""You can call functions. To call one, write
{OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE}
with arguments that follow its parameters, which are a JSON schema.
<tools>
"""


def told(given: Iterable[Mapping[str, Any]]) -> str:
    """What a model is told of the functions `given`."""
    return _INTRO + "\n".join(json.dumps(each, ensure_ascii=False) for each in functions(given)) + "\n</tools>"


def functions(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a model may know of functions: ``name``, ``parameters``, and ``description`` where there is one."""
    shown = []
    for function in given:
        values = {"name": function["name"], "description": function.get("description")}
        values["parameters"] = NO_PARAMETERS if function.get("parameters") is None else function["parameters"]
        shown.append({key: value for key, value in values.items() if value is not None})
    return shown


def call(name: str, arguments: Any) -> str:
    """A call as the model writes one."""
    return OPEN + written({"name": name, "arguments": parsed(arguments)}) + CLOSE


def parsed(arguments: Any) -> Any:
    """The arguments of a call, which may be JSON in a text, as values: none where nothing is said, as some clients do for none.
    Text that is no JSON stays it."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(arguments)
    return arguments


class Asked:
    """Which function a result is of, by the id of its call. Of calls of one message with the same id the first has the first
    result, and the last what is left."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, calls: Iterable[tuple[str, str]]) -> None:
        """The calls of one message: id, and name of the function."""
        new: dict[str, list[str]] = {}
        for its, name in calls:
            new.setdefault(its, []).append(name)
        self._names |= new

    def __contains__(self, its: object) -> bool:
        return its in self._names

    def answered(self, its: str) -> str:
        """The function that the next result with this id is of. Raises KeyError for an id of no call."""
        names = self._names[its]
        return names.pop(0) if len(names) > 1 else names[0]


def written(value: Any) -> str:
    """`value` as JSON with its letters as they are; all as escapes where it has half of a surrogate pair, which a model may
    have written as an escape and no UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def result(name: str, content: str) -> str:
    """What a call of the function `name` gave, as the model reads it."""
    return f"<tool_response>{json.dumps({'name': name, 'content': content}, ensure_ascii=False)}</tool_response>"


def parts(content: Any) -> list[dict[str, Any]]:
    """The content of a message, a text or a list of parts, as parts. What is neither stays what it is, to be refused as one."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, list) else [content]


def with_system(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """`messages` with `text` behind their system text, or as one."""
    if not text:
        return list(messages)
    if messages and messages[0].get("role") == "system":
        more = {"type": "text", "text": "\n\n" + text}
        return [{**messages[0], "content": [*parts(messages[0].get("content")), more]}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
