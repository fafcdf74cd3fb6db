"""How an open model writes calls of tools where its own chat template teaches it, and how a chat is given to that template.

    hermes   <tool_call>, {"name": ..., "arguments": {...}}, </tool_call>    Qwen, SmolLM, Hermes: several, behind text
    llama    {"name": ..., "parameters": {...}}                              Llama 3: an answer that begins so, or what follows
                                                                             <|python_tag|>
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]            Mistral: up to the answer's end
    phi      <|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>  Phi-4

Which one a template teaches is decided here alone, by `format_of`, when a model is imported, and stands in its tokenizer
(`Controls.calls`). A template without tools, or that teaches none of these, is given them as text (`inputs.tools`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import RequestError
from shoal.inputs.templates import EndlessTemplateError, rendered
from shoal.inputs.tools import CLOSE, OPEN, functions, written

Called = tuple[str, str]  # name, and arguments as JSON
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CallFormat:
    """The text around calls, and what a chat template wants of a chat that has some."""

    open: str  # in front of calls
    close: str = ""  # behind them; empty: the answer's end
    gap: str = ""  # between these and the JSON
    arguments: str = "arguments"  # what a call's arguments are called
    listed: bool = False  # is even one call in a list?
    bare: bool = False  # is an answer that begins with JSON a call, with nothing in front of it?
    sign: str = ""  # in the text of a template that teaches it [open]
    one: bool = False  # does the template take one call a message?
    short_ids: bool = False  # does it take ids of nine letters and digits alone?
    as_text: bool = False  # does it show a message's text, and not its calls?

    def begin(self, name: str) -> str:
        """How a call of the function `name` begins, up to its arguments."""
        opened = "" if self.bare else self.open + self.gap
        return f'{opened}{"[" if self.listed else ""}{{"name": {json.dumps(name)}, "{self.arguments}": '

    @property
    def end(self) -> str:
        """And what stands behind its arguments."""
        return "}" + ("]" if self.listed else "") + (self.gap if self.close else "") + self.close

    def read(self, text: str, names: Iterable[str]) -> tuple[list[Called], str] | None:
        """The calls that `text` begins with, a JSON object or several, in a list or not, and what stands behind them. None
        where there are none, or one is of no function of `names`."""
        known, calls, rest = set(names), list[Called](), text.lstrip(SPACE)
        while rest[:1] in ("{", "["):
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
                json.dumps(value, allow_nan=False)  # NaN and 1e999, which Python reads, are no JSON
                found = [self._called(each, known) for each in (value if isinstance(value, list) else [value])]
            except (ValueError, RecursionError):  # of what is written, too: it may be one level too deep for that alone
                return None
            if not found or None in found:
                return None
            calls += [each for each in found if each is not None]
            rest = rest[end:]
            after = rest.lstrip(SPACE + ";,")
            if self.close or after[:1] != "{":
                break
            rest = after
        return (calls, rest) if calls else None

    def _called(self, value: object, known: set[str]) -> Called | None:
        name, arguments = (value.get("name"), value.get(self.arguments)) if isinstance(value, dict) else (None, None)
        if not isinstance(name, str) or name not in known or not isinstance(arguments, dict):
            return None
        return name, written(arguments)

    def turns(self, messages: Messages) -> list[dict[str, Any]]:
        """`messages` as the turns of the template: one with several calls is several where that takes one call a message."""
        return _one_call_each(messages) if self.one else [dict(message) for message in messages]

    def for_template(self, messages: Messages) -> list[dict[str, Any]]:
        """`messages`, in OpenAI's roles with arguments as values, as the template wants them."""
        shown = self.turns(messages)
        for message in shown:
            calls = message.get("tool_calls")
            if calls and self.as_text:
                said = [message["content"]] if message["content"] else []
                message["content"] = "\n".join([*said, *map(self._text, calls)])
                del message["tool_calls"]
            elif calls and self.short_ids:
                message["tool_calls"] = [{**call, "id": _short(str(call.get("id")))} for call in calls]
            if self.short_ids and "tool_call_id" in message:
                message["tool_call_id"] = _short(str(message["tool_call_id"]))
        return shown

    def _text(self, call: Mapping[str, Any]) -> str:
        function = call["function"]
        return self.begin(function["name"]) + written(function["arguments"]) + self.end


SPACE = " \t\r\n"  # of JSON; what else Python strips, as U+001C, is in no grammar's white space
_JSON = re.compile(rf"[{SPACE}]*[{{\[]")
_IN_TEXT = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)  # of JSON, up to where it ends or breaks off


class Closing:
    """Looks in text that grows, and stands behind what opens a call, for what closes it: not in a text of its JSON. It goes
    over each letter once: a call that spells its own end thousands of times would hold up all other answers."""

    def __init__(self, close: str) -> None:
        self._close = close
        self._from = 0  # nothing closes it before
        self._at, self._inside = 0, False  # up to where it was read, and whether that is in a text of JSON

    def find(self, text: str) -> int:
        """Where in `text`, which begins as before, the first that closes it begins; -1 where there is none yet."""
        while (end := text.find(self._close, self._from)) >= 0 and self._breaks_off_in_text(text, end):
            self._from = end + len(self._close)
        if end < 0:
            self._from = max(self._from, len(text) - len(self._close) + 1)
        return end

    def _breaks_off_in_text(self, text: str, end: int) -> bool:
        """Does what begins as JSON, up to `end`, break off in a text?"""
        if not self._at and not _JSON.match(text, 0, end):
            return False
        while self._at < end:
            if not self._inside:
                quote = text.find('"', self._at, end)
                self._at, self._inside = (end, False) if quote < 0 else (quote + 1, True)
                continue
            here = _IN_TEXT.match(text, self._at, end)
            assert here is not None
            self._at = here.end()
            if self._at == end - 1 and text[self._at] == "\\":  # what it escapes comes next
                break
            if self._at < end:
                self._at, self._inside = self._at + 1, False
        return self._inside


OURS = CallFormat(OPEN, CLOSE)
_HERMES = replace(OURS, gap="\n")
FORMATS = {
    "mistral": CallFormat("[TOOL_CALLS]", listed=True, short_ids=True),
    "phi": CallFormat("<|tool_call|>", "<|/tool_call|>", listed=True),
    "hermes": _HERMES,
    "hermes-text": replace(_HERMES, as_text=True),  # SmolLM3
    "llama": CallFormat("<|python_tag|>", arguments="parameters", bare=True, sign='"parameters"', one=True),
}


def offered(given: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The functions `given` as a chat template's ``tools``."""
    return [{"type": "function", "function": function} for function in functions(given)]


def format_of(template: str, names: Mapping[str, str]) -> str:
    """The name in `FORMATS` of how `template`, which knows control tokens by `names`, has calls written; empty where it has
    no tools, or where what it makes of a call is not read as that call again. Raises EndlessTemplateError."""
    for name, each in FORMATS.items():
        signed = (each.sign or each.open) in template and not (each.as_text and "tool_calls" in template)
        if signed and _taught(template, names, each):
            return name
    return ""


_ARGUMENTS = {"of": {"caf\u00e9": ["<b> & 'c' \"d\"\n", 1.5, None, True, []]}, "n": 3}
_FUNCTION = {
    "name": "probe_depth",
    "description": "Probes.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}
_CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "probe_depth", "arguments": _ARGUMENTS}}
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "Probe."},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "gave-4711"},
]


def _taught(template: str, names: Mapping[str, str], each: CallFormat) -> bool:
    """Does `template` show tools, a call as `each` reads it, and what the call gave?"""

    def text(count: int) -> str:
        shown = each.for_template(_PROBE[:count])
        given = {"messages": shown, "add_generation_prompt": count != 2, "tools": offered([_FUNCTION])}
        return rendered(template, {"documents": None, **given, **names})

    try:
        asked, called, gave = (text(count) for count in (1, 2, 3))
    except EndlessTemplateError:
        raise
    except RequestError:
        return False
    same = next((at for at, pair in enumerate(zip(asked, called, strict=False)) if pair[0] != pair[1]), len(asked))
    said = called[same:]
    before, opened, inner = said.partition(each.open)
    found = each.read(inner if opened else before if each.bare else "", ["probe_depth"])
    read = found is not None and [(name, json.loads(given)) for name, given in found[0]] == [
        ("probe_depth", _ARGUMENTS)
    ]
    return read and "probe_depth" in asked and "gave-4711" in gave


def _one_call_each(messages: Messages) -> list[dict[str, Any]]:
    """`messages` in which one with several calls is several, each with what its call gave behind it. Of calls with the same id
    the first has the first result, and the last what is left."""
    shown: list[dict[str, Any]] = []
    place = 0
    while place < len(messages):
        message = dict(messages[place])
        place += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            shown.append(message)
            continue
        gave = []
        while place < len(messages) and messages[place].get("role") == "tool":
            gave.append(dict(messages[place]))
            place += 1
        for at, call in enumerate(calls):
            own = [each for each in gave if each.get("tool_call_id") == call.get("id")]
            if any(other.get("id") == call.get("id") for other in calls[at + 1 :]):
                own = own[:1]
            gave = [each for each in gave if all(each is not one for one in own)]
            shown += [{**message, "content": "" if at else message.get("content"), "tool_calls": [call]}, *own]
        shown += gave
    return shown


def _short(name: str) -> str:
    """An id of nine letters and digits: `name` itself, or one that follows from it."""
    return (
        name
        if re.fullmatch(r"[A-Za-z0-9]{9}", name)
        else hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:9]
    )
