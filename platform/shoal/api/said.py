"""Arguments of tools that must have been said: `x-said` in the schema of a tool's parameter.

    {"order": {"type": "string", "x-said": "[A-Z][0-9]{4}"}}

Its value is a regular expression (RE2's, which takes time in proportion to the text, whatever a client writes). What a call may
have there is what it matches, as a word of its own, in the conversation's messages of system, user and tools: what the model
itself has said is no evidence. Where nothing was said an argument cannot be given, and no tool called that needs it.

    {"product": {"type": "string", "x-said": {"words": 4}}}

In place of an expression: any run of so many words at most, of what has no form that could be told. A letter of a script that
puts no spaces between words is a word here.

A word of its own is one that goes on at neither end: a letter of the English alphabet, a digit or "_" at an end of it has none
beside it. At an end that is another letter, as of "#1234", "12%" or "单1234", anything may stand.

    {"order": {"type": "string", "x-said": "[A-Z][0-9]{4}", "x-said-in-text": "[A-Z][0-9]+"}}

The second holds for the words of an answer too: what it matches at the beginning of a word goes on as something that it matches
in those messages, and there the word ends. A match that grows with each digit is stopped at the first that nobody said.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoal.api.bodies import Function, Message
from shoal.errors import RequestError
from shoal.inputs.tools import SAID, SAID_IN_TEXT, marked, parts, unmarked

MOST = 1000  # different values of one argument; of more the last said
LONGEST = 200  # letters of a value that overlaps another, and of a run of words
WORDS, MOST_WORDS = "words", 8  # of a run
TAIL = 4000  # letters, the last that were said, that runs are looked for in
_SPLIT = "\0"
# Thai, Lao, Burmese, Khmer, kana, and Chinese letters
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD = re.compile("sm*|w[wm]*(?:jw[wm]*)*")  # in the kinds of a text's letters
_EDGE, _NO_EDGE = r"\b", r"\B"  # between a letter of words (RE2's: English, digits, "_") and any other; elsewhere


def may_be_called(tools: Mapping[str, Function], messages: Sequence[Message]) -> dict[str, Function]:
    """`tools` with the values that were said as the `enum` of each argument that is marked, and without those that need one of
    which none was said. Beside such a tool no strict one has other arguments than it names, unless its parameters say so.
    Raises RequestError (param ``tools``) for a mark that cannot be followed."""
    every = {name: marked(tool.parameters) for name, tool in tools.items()}
    for name, tool in tools.items():
        _check(name, tool.parameters, every[name])
    if not any(every.values()):
        return dict(tools)
    texts = _said_by_others(messages)
    said = {json.dumps(mark[SAID]): _choices(mark[SAID], texts) for marks in every.values() for mark in marks.values()}
    filled = {name: _filled(tool, every[name], said) for name, tool in tools.items()}
    return {name: tool for name, tool in filled.items() if tool is not None}


def unsaid(tools: Mapping[str, Function], messages: Sequence[Message]) -> dict[str, str]:
    """Terminals of a grammar that no text of an answer may be, by name, each with the lines that define it; none without such
    marks, which `may_be_called` has checked. Raises RequestError (param ``tools``)."""
    marks = [mark for tool in tools.values() for mark in marked(tool.parameters).values()]
    patterns = dict.fromkeys(str(mark[SAID_IN_TEXT]) for mark in marks if SAID_IN_TEXT in mark)
    texts, found = _said_by_others(messages) if patterns else [], dict[str, str]()
    for at, pattern in enumerate(patterns):
        values = " | ".join(map(_whole, _found(SAID_IN_TEXT, pattern, texts)))
        lines = [
            f"UNSAID_{at}: /((?s:.*)[^0-9A-Za-z_])?/ BEGUN_{at} | /(?s:.*)/ INNER_{at}",
            f"INNER_{at}: BEGUN_{at} & /[^0-9A-Za-z_](?s:.*)/",
            f"BEGUN_{at}: /(?:{_on_a_line(pattern)})(?s:.*)/" + (f" & ~WHOLE_{at}" if values else ""),
            *([f"WHOLE_{at}: {values}"] if values else []),
        ]
        found[f"UNSAID_{at}"] = "\n".join(lines)
    return found


def _whole(value: str) -> str:
    """A terminal of what was said and of what may stand behind it."""
    behind = "/([^0-9A-Za-z_](?s:.*))?/" if _in_words(value[-1]) else "/(?s:.*)/"
    return f"{json.dumps(value, ensure_ascii=False)} {behind}"


def _in_words(letter: str) -> bool:
    return letter.isascii() and (letter.isalnum() or letter == "_")


def _on_a_line(pattern: str) -> str:
    """A regular expression as it may stand between slashes, on one line."""
    spelt = {"/": r"\x2F", r"\/": r"\x2F", "\n": r"\n", "\\\n": r"\n", "\r": r"\r", "\\\r": r"\r"}
    return re.sub(r"\\.|[/\n\r]", lambda found: spelt.get(found[0], found[0]), pattern, flags=re.DOTALL)


def _said_by_others(messages: Sequence[Message]) -> list[str]:
    return [text for message in messages if message.role != "assistant" for text in _texts(message)]


def _filled(
    tool: Function, marks: Mapping[str, Mapping[str, Any]], said: Mapping[str, Sequence[str]]
) -> Function | None:
    """A tool as it may be called; None where it may not."""
    if not marks and not tool.strict:
        return tool
    schema = tool.parameters
    properties = dict(schema.get("properties", {}))
    for argument, mark in marks.items():
        rest = unmarked(mark)
        values = _values(rest, said[json.dumps(mark[SAID])])
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


def _matches_nothing(pattern: str) -> bool:
    """May it match no letter at all, of which each text has some? One that is none says no."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return bool(pc.match_substring_regex(pa.scalar(""), pattern).as_py())
    except pa.ArrowInvalid:
        return False


def _choices(mark: Any, texts: Sequence[str]) -> list[str]:
    """What may be given where `mark` is an argument's `x-said`, each once, the last said last. Raises RequestError."""
    if isinstance(mark, str):
        return _found(SAID, mark, texts)
    return [*reversed([*itertools.islice(dict.fromkeys(_runs(mark[WORDS], "\n".join(texts))), MOST)])]


def _runs(most: int, text: str) -> Iterator[str]:
    """Runs of `most` words or fewer with spaces alone between them, in the end of a text, from the last on."""
    end = text[-TAIL:]
    words = [found.span() for found in _WORD.finditer("".join(map(_kind, end)))]
    for last in range(len(words) - 1, -1, -1):
        for first in range(last, max(-1, last - most), -1):
            start, stop = words[first][0], words[last][1]
            apart = first < last and end[words[first][1] : words[first + 1][0]].strip(" ")
            if apart or stop - start > LONGEST:
                break
            if start or len(end) == len(text):  # else it may be half a word
                yield end[start:stop]


def _kind(letter: str) -> str:
    """A letter of `_WORD`: "s" of a script without spaces, "w" of others, "m" a mark on it, "j" what joins, "-" else."""
    kind = unicodedata.category(letter)[0]
    if kind in "LN":
        return "s" if _SPACELESS.match(letter) else "w"
    return "m" if kind == "M" else "j" if letter in "'\u2019-" else "-"


def _found(keyword: str, pattern: str, texts: Sequence[str]) -> list[str]:
    """What `pattern` matches in `texts`, each once, the last said last. Raises RequestError."""
    import pyarrow as pa  # not by a service that is never asked
    import pyarrow.compute as pc

    whole, found = "\n".join(texts).replace(_SPLIT, " ").encode("utf-8", "replace").decode(), list[tuple[int, str]]()
    for left, right in itertools.product((_EDGE, _NO_EDGE), repeat=2):
        marks = rf"{left}({pattern}){right}", rf"{_SPLIT}\1{_SPLIT}"
        try:
            cut = pc.replace_substring_regex(pa.scalar(whole), *marks).as_py().split(_SPLIT)
        except pa.ArrowInvalid as error:
            got = f"{pattern[:80]}: {str(error).rpartition(': ')[2][:120]}"
            raise RequestError(
                f"tools: {keyword}", param="tools", got=got, allowed="a regular expression of RE2"
            ) from error
        starts = itertools.accumulate(map(len, cut), initial=0)
        one_by_one = [each for each in [*zip(starts, cut, strict=False)][1::2] if each[1]]
        every = [*one_by_one, *_overlapping(whole, pattern, (left, right), one_by_one)]
        found += [each for each in every if _apart(each[1], left, right)]
    return [*reversed(dict.fromkeys(one for _, one in sorted(found, reverse=True)))][-MOST:]


def _overlapping(
    whole: str, pattern: str, edges: tuple[str, str], matches: Sequence[tuple[int, str]]
) -> list[tuple[int, str]]:
    """Matches that begin in one of `matches`, which were found one after the other, and end behind it: in "Dear Anna Smith",
    of two names at most, "Anna Smith" was said as well. The last `MOST` places are looked at, `LONGEST` letters of each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    left, right = edges
    places = [
        (start + at, start + len(value))
        for start, value in matches
        for at in range(1, len(value))
        if _begins(value[at - 1], value[at], left)
    ][-MOST:]
    # the letter before says whether a line begins there, and one more than a match may have whether a word ends
    around = pa.array([whole[at - 1 : at + LONGEST + 1] for at, _ in places], pa.string())
    behind = rf"\A(?s:.){left}({pattern}){right}(?s:.*)"
    marked = pc.replace_substring_regex(around, behind, rf"{_SPLIT}\1").to_pylist()
    said = [(at, one[1:], end) for (at, end), one in zip(places, marked, strict=True) if one.startswith(_SPLIT)]
    return [(at, one) for at, one, end in said if at + len(one) > end and len(one) <= LONGEST]


def _begins(before: str, letter: str, left: str) -> bool:
    """Whether what begins with `letter`, behind `before`, may be a word of its own whose left end is of that kind."""
    inside = _in_words(letter)
    return _in_words(before) != inside if left == _EDGE else not (inside or _in_words(before))


def _apart(value: str, left: str, right: str) -> bool:
    """Whether a match is a word of its own: where it ends in a letter of words, that is an edge of one."""
    ends = (left, value[0]), (right, value[-1])
    return all(side == _EDGE or not _in_words(letter) for side, letter in ends)


def _is_mark(mark: Any) -> bool:
    if isinstance(mark, Mapping):
        most = mark.get(WORDS)
        return len(mark) == 1 and type(most) is int and 1 <= most <= MOST_WORDS
    return isinstance(mark, str) and bool(mark)


def _check(name: str, parameters: Mapping[str, Any], marks: Mapping[str, Mapping[str, Any]]) -> None:
    where = f"tools: {SAID} of {name}"
    for mark in marks.values():
        if mark.get("type") not in ("string", "integer") or not _is_mark(mark[SAID]):
            allowed = f'a regular expression, or {{"{WORDS}": 1 to {MOST_WORDS}}}, beside type string or integer'
            raise RequestError(where, param="tools", got=str(mark)[:120], allowed=allowed)
        in_text = mark.get(SAID_IN_TEXT, "-")
        if not isinstance(in_text, str) or not in_text or _matches_nothing(in_text):
            where = f"tools: {SAID_IN_TEXT} of {name}"
            allowed = "a regular expression that matches one letter or more"
            raise RequestError(where, param="tools", got=str(mark)[:120], allowed=allowed)
    if _count(parameters, SAID) > len(marks):
        raise RequestError(where, param="tools", got="within an argument", allowed="at a property of parameters itself")
    if _count(parameters, SAID_IN_TEXT) > sum(SAID_IN_TEXT in mark for mark in marks.values()):
        raise RequestError(f"tools: {SAID_IN_TEXT} of {name}", param="tools", got="alone", allowed=f"beside {SAID}")


def _count(value: Any, keyword: str) -> int:
    """How often a schema has a mark, at any depth, which may be more than Python calls functions in."""
    found, left = 0, [value]
    while left:
        one = left.pop()
        found += isinstance(one, Mapping) and keyword in one
        left += one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
    return found


def _texts(message: Message) -> list[str]:
    content = message.model_dump(include={"content"})["content"]
    return [part["text"] for part in parts(content) if part["type"] == "text"]
