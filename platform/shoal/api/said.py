"""Arguments of tools that must have been said: `x-said` in the schema of a tool's parameter.

    {"order": {"type": "string", "x-said": "[A-Z][0-9]{4}"}}

Its value is a regular expression (RE2's, which takes time in proportion to the text, whatever a client writes). What a call may
have there is what it matches, as a word of its own, in the conversation's messages of system, user and tools: what the model
itself has said is no evidence. Where nothing was said an argument cannot be given, and no tool called that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.api.bodies import Function, Message
from shoal.errors import RequestError
from shoal.inputs.tools import SAID, marked, parts

MOST = 1000  # different values of one argument; of more the last said
_SPLIT = "\0"


def may_be_called(tools: Mapping[str, Function], messages: Sequence[Message]) -> dict[str, Function]:
    """`tools` with the values that were said as the `enum` of each argument that is marked, and without those that need one of
    which none was said. Beside such a tool no strict one has other arguments than it names, unless its parameters say so.
    Raises RequestError (param ``tools``) for a mark that cannot be followed."""
    every = {name: marked(tool.parameters) for name, tool in tools.items()}
    for name, tool in tools.items():
        _check(name, tool.parameters, every[name])
    if not any(every.values()):
        return dict(tools)
    texts = [text for message in messages if message.role != "assistant" for text in _texts(message)]
    said = {mark[SAID]: _found(str(mark[SAID]), texts) for marks in every.values() for mark in marks.values()}
    filled = {name: _filled(tool, every[name], said) for name, tool in tools.items()}
    return {name: tool for name, tool in filled.items() if tool is not None}


def _filled(
    tool: Function, marks: Mapping[str, Mapping[str, Any]], said: Mapping[str, Sequence[str]]
) -> Function | None:
    """A tool as it may be called; None where it may not."""
    if not marks and not tool.strict:
        return tool
    schema = tool.parameters
    properties = dict(schema.get("properties", {}))
    for argument, mark in marks.items():
        rest = {key: value for key, value in mark.items() if key != SAID}
        values = _values(rest, said[mark[SAID]])
        if values:
            properties[argument] = {**rest, "enum": values}
        elif argument in schema.get("required", ()):
            return None
        else:
            properties[argument] = False
    return tool.model_copy(
        update={"strict": True, "parameters": {"additionalProperties": False, **schema, "properties": properties}}
    )


def _values(schema: Mapping[str, Any], said: Sequence[str]) -> list[Any]:
    """Of what was said, as JSON, what a schema's own ``type`` and ``enum`` allow."""
    values: list[Any] = [*said]
    if schema["type"] == "integer":
        values = [int(one) for one in said if one.isdecimal() and len(one) < 19]
    return [one for one in dict.fromkeys(values) if one in schema.get("enum", (one,))]


def _found(pattern: str, texts: Sequence[str]) -> list[str]:
    """What `pattern` matches in `texts`, each once, the last said last. Raises RequestError."""
    import pyarrow as pa  # not by a service that is never asked
    import pyarrow.compute as pc

    whole = "\n".join(texts).replace(_SPLIT, " ").encode("utf-8", "replace").decode()
    try:
        cut = pc.replace_substring_regex(pa.scalar(whole), rf"\b({pattern})\b", rf"{_SPLIT}\1{_SPLIT}").as_py()
    except pa.ArrowInvalid as error:
        got = f"{pattern[:80]}: {str(error).rpartition(': ')[2][:120]}"
        raise RequestError(f"tools: {SAID}", param="tools", got=got, allowed="a regular expression of RE2") from error
    found = [one for one in cut.split(_SPLIT)[1::2] if one]
    return [*reversed(dict.fromkeys(reversed(found)))][-MOST:]


def _check(name: str, parameters: Mapping[str, Any], marks: Mapping[str, Mapping[str, Any]]) -> None:
    where = f"tools: {SAID} of {name}"
    for mark in marks.values():
        if mark.get("type") not in ("string", "integer") or not isinstance(mark[SAID], str) or not mark[SAID]:
            allowed = "a regular expression beside type string or integer"
            raise RequestError(where, param="tools", got=str(mark)[:120], allowed=allowed)
    if _count(parameters) > len(marks):
        raise RequestError(where, param="tools", got="within an argument", allowed="at a property of parameters itself")


def _count(value: Any) -> int:
    """How often a schema has the mark, at any depth, which may be more than Python calls functions in."""
    found, left = 0, [value]
    while left:
        one = left.pop()
        found += isinstance(one, Mapping) and SAID in one
        left += one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
    return found


def _texts(message: Message) -> list[str]:
    content = message.model_dump(include={"content"})["content"]
    return [part["text"] for part in parts(content) if part["type"] == "text"]
