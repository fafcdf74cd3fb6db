"""The forms that rows for fine-tuning come in, told apart by their keys, as the one that is learned from: messages in the three
roles of a chat template, or a text.

    {"messages": [{"role", "content"}, ...], "tools": [...]}      OpenAI's, with tool_calls and messages of role tool (before:
                                                                  functions, function_call, role function)
    {"conversations": [{"from", "value"}, ...], "system", "tools"} ShareGPT's: human, gpt, system, function_call, observation
    {"instruction", "input", "output", "system", "history"}        Alpaca's
    {"text"}                                                       learned from everywhere

An answer whose message has ``weight`` 0 is read and not learned.

A preference pair (`pair`) has two answers to the same, ``chosen`` and ``rejected``.

Tools, calls and results are written as a service shows them (`inputs.tools`); `native`: for an open model whose own chat
template knows them (`Tokenizer.calls`) they stay what they are, as OpenAI has them, and the tools are `offered`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.errors import DataError
from shoal.inputs import call_formats, tools
from shoal.inputs.chat import is_learned

PAIRS = "chosen and rejected, with a prompt or as whole chats"
KNOWN = "messages; conversations; instruction and output; or text"
_RESULTS = ("tool", "function")
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "function_call": "call", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


def canonical(row: object, *, native: bool = False) -> dict[str, Any]:
    """A row of any form with its ``messages``, or with a ``text``; its other fields as they are. Raises DataError for one of no
    known form, naming its keys, and for one that is not as its form wants it."""
    if not isinstance(row, dict):
        raise DataError("no known form", got=type(row).__name__, allowed=KNOWN)
    for key, read in _FORMS.items():
        if row.get(key) is not None:
            return {**row, **read(row, native)}
    raise DataError("no known form", got=f"keys {', '.join(map(str, row))}"[:100], allowed=KNOWN)


def to_last_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """A canonical row whose messages end with the last answer that is learned: nothing answers what comes behind it, as a
    system's turn or the result of a call. No messages, where there is no such answer."""
    messages = row.get("messages") or []
    last = max((place for place, message in enumerate(messages, 1) if is_learned(message)), default=0)
    return {**row, "messages": messages[:last]} if messages else dict(row)


def offered(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of a row as a chat template is given them; None where there are none. Raises DataError."""
    return call_formats.offered(_functions(row.get("tools") or row.get("functions"))) or None


def as_sent(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``messages`` of a row of any form as a client sends them to a service, with the ``tools``, marks and ``strict`` among
    them, and the ``response_format`` that it has; None where it has neither. Raises DataError."""
    functions, format_ = _functions(row.get("tools") or row.get("functions")), row.get("response_format")
    if not functions and format_ is None:
        return None
    messages = [
        {**message, "tool_calls": [_sent(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in canonical(row, native=True).get("messages", ())
    ]
    tools_ = [{"type": "function", "function": function} for function in functions]
    return {"messages": messages, "tools": tools_, "response_format": format_}


def _sent(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments in a text."""
    function = call["function"]
    given = function["arguments"]
    return {**call, "function": {**function, "arguments": given if isinstance(given, str) else json.dumps(given or {})}}


def pair(row: object, *, native: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of a preference pair: with the answer that is preferred, and with the other. ``chosen`` and ``rejected`` are
    an answer each, after a ``prompt`` or what asks in a known form, or whole chats. Raises DataError for a row that is no pair,
    and for one whose two sides do not ask the same."""
    if not isinstance(row, dict) or row.get("chosen") is None or row.get("rejected") is None:
        got = f"keys {', '.join(map(str, row))}"[:100] if isinstance(row, dict) else type(row).__name__
        raise DataError("no preference pair", got=got, allowed=PAIRS)
    asked, told = _asked(row, native), "" if native else _told(row.get("tools"))
    chosen, rejected = (
        tools.with_system(_answered(asked, _answer(row[side], native)), told) for side in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2 or len(chosen) != len(rejected):
        raise DataError("a pair that does not ask the same")
    if chosen[-1].get("role") != "assistant" or rejected[-1].get("role") != "assistant":
        raise DataError("a pair that does not end with answers")
    return chosen, rejected


def _asked(row: Mapping[str, Any], native: bool) -> list[dict[str, Any]]:
    """What both sides of a pair answer; empty where they are whole chats."""
    prompt, plain = row.get("prompt"), {**row, "tools": None}
    if isinstance(prompt, list):
        return list(canonical({"messages": prompt}, native=native)["messages"])
    if isinstance(prompt, str):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [*system, {"role": "user", "content": prompt}]
    if row.get("instruction") is not None:
        return list(canonical({**plain, "messages": None, "conversations": None, "output": ""})["messages"][:-1])
    if row.get("messages") is None and row.get("conversations") is None:
        return []
    return list(canonical(plain, native=native)["messages"])


def _answer(given: object, native: bool) -> list[dict[str, Any]]:
    """One side of a pair."""
    if isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    turns = given if isinstance(given, list) else [given]
    shared = all(isinstance(turn, dict) and "from" in turn for turn in turns)
    return list(canonical({"conversations" if shared else "messages": turns}, native=native)["messages"])


def _answered(asked: Sequence[dict[str, Any]], answer: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked and one side of a pair; some give the prompt and whole chats that begin with it."""
    whole = bool(asked) and asked[-1] in answer
    return [*(message for message in asked if not whole or message not in answer), *answer]


def _of_messages(row: Mapping[str, Any], native: bool) -> dict[str, Any]:
    messages, functions = row["messages"], row.get("tools") or row.get("functions")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError("no messages")
    for message in messages:
        if message.get("weight") not in (None, 0, 1):
            raise DataError("a weight that is neither 0 nor 1")
    if functions or any(
        m.get("tool_calls") or m.get("function_call") or m.get("role") in (*_RESULTS, "developer") for m in messages
    ):
        calls = _calls(messages)
        told = "" if native else _told(functions)
        messages = tools.with_system(calls if native else [_as_text(message) for message in calls], told)
    return {"messages": messages}


def _calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages with calls and results as they are now; ``name`` of a result is its function's."""
    found: list[dict[str, Any]] = []
    asked, count = tools.Asked(), 0
    last: dict[str, str] = {}  # function -> id of its last call
    for message in messages:
        role, content = message.get("role"), message.get("content")
        calls = _list(message.get("tool_calls"), "tool_calls")
        if message.get("function_call"):
            calls = [{"function": message["function_call"]}]
        made = [_call(call, role, count + at) for at, call in enumerate(calls)]
        asked.add((call["id"], call["function"]["name"]) for call in made)
        count += len(made)
        last |= {call["function"]["name"]: call["id"] for call in made}
        more: dict[str, Any] = {"tool_calls": made} if made else {}
        if role in _RESULTS:
            its = str(message.get("tool_call_id"))
            known = asked.answered(its) if its in asked else message.get("name")
            if not isinstance(known, str):
                raise DataError("a result of no call")
            content = _said(content)
            role, more = "tool", {"tool_call_id": its if its in asked else last.get(known, ""), "name": known}
        kept = {"weight": message["weight"]} if "weight" in message else {}
        found.append({"role": "system" if role == "developer" else role, "content": content, **more, **kept})
    return found


def _said(content: object) -> str:
    """What a call gave, a text or parts of it, as a service takes it."""
    parts = tools.parts(content)
    if not parts or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise DataError("a result that is no text")
    return "".join(part["text"] for part in parts)


def _call(call: object, role: object, number: int) -> dict[str, Any]:
    """A call with an id, of its own or by its `number` in the chat."""
    function = call.get("function") if isinstance(call, dict) else None
    if role != "assistant" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError("tool_calls that are none")
    named = call.get("id") if isinstance(call, dict) else None
    called = {"name": function["name"], "arguments": function.get("arguments")}
    return {"id": f"call{number:05}" if named is None else str(named), "type": "function", "function": called}


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the three roles, with its calls, or what a call gave, as text."""
    content: Any = message["content"]
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id", "name")}
    if message["role"] == "tool":
        return {**kept, "role": "user", "content": tools.result(message["name"], content)}
    for call in message.get("tool_calls", ()):
        said = {"type": "text", "text": tools.call(call["function"]["name"], call["function"]["arguments"])}
        content = [*tools.parts(content), said]
    return {**kept, "content": content}


def _told(given: object) -> str:
    """What is told of the tools of a row; "" where there are none."""
    functions = _functions(given)
    return tools.told(functions) if functions else ""


def _functions(given: object) -> list[dict[str, Any]]:
    """The functions among the tools of a row, which may be JSON in a text."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError("tools that are no JSON") from error
    functions = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in _list(given, "tools")]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise DataError("tools without a name")
    return functions


def _of_conversations(row: Mapping[str, Any], native: bool) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": row["system"]})
    name, last = "function", ""
    for number, turn in enumerate(_list(row["conversations"], "conversations")):
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        role = _SHAREGPT.get(str(who).lower())
        if role is None or not isinstance(text, str):
            raise DataError("conversations of an unknown form")
        message: dict[str, Any] = {"role": role, "content": text}
        if role == "call":
            try:
                made = json.loads(text)
                name, function = str(made["name"]), {"name": str(made["name"]), "arguments": made.get("arguments", {})}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise DataError("a function_call that is no JSON") from error
            call = _call({"function": function}, "assistant", number)
            last, message = call["id"], {"role": "assistant", "content": "", "tool_calls": [call]}
        elif role == "tool":
            message |= {"tool_call_id": last, "name": name}
        messages.append(message)
    if not messages:
        raise DataError("no messages")
    if native:
        return {"messages": messages}
    return {"messages": tools.with_system([_as_text(message) for message in messages], _told(row.get("tools")))}


def _of_instruction(row: Mapping[str, Any], native: bool) -> dict[str, Any]:
    instruction, more, output = row["instruction"], row.get("input") or "", row.get("output")
    if not all(isinstance(text, str) for text in (instruction, more, output)):
        raise DataError("an instruction without an output")
    turns = [*_list(row.get("history"), "history"), [f"{instruction}\n{more}" if more else instruction, output]]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError("history of an unknown form")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return {"messages": messages}


def _of_text(row: Mapping[str, Any], native: bool) -> dict[str, Any]:
    if not isinstance(row["text"], str) or not row["text"]:
        raise DataError("no text")
    return {"text": row["text"]}


def _list(given: object, what: str) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise DataError(f"{what} of an unknown form")
    return given


_FORMS: Mapping[str, Callable[[Mapping[str, Any], bool], dict[str, Any]]] = {
    "messages": _of_messages, "conversations": _of_conversations, "instruction": _of_instruction, "text": _of_text,
}  # fmt: skip
