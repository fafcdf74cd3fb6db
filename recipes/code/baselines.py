"""What a model is held against: the commonest answer, the answer to what was most like it in training
(`recipes/baselines.py` has both), and a rule.

The rule knows the wordings that are learned from, and those alone: it looks for them in what is asked, for the lines of code in
a function, and puts a function or an explanation together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from recipes.code import words
from recipes.code.algorithms import ALGORITHMS
from recipes.code.exercises import code_of, fenced
from recipes.code.tasks import Chain, parts
from recipes.code.words import TRAIN, of_split
from recipes.recipe import Messages

_ASKED = (
    r"function (\w+) that", r"called (\w+):", r"write (\w+), which", r"code for (\w+)\(", r"^(\w+) should",
    r"function (\w+) in", r"^(\w+) is a Python", r"what (\w+) does", r"^Code (\w+) for", r"def (\w+)\(",
)  # fmt: skip


def kind(messages: Messages) -> tuple[bool, bool]:
    """Whether a question has a test, and code: what is to be mended has both, what is to be explained has code."""
    text = str(messages[-1]["content"])
    return "assert" in text, "```" in text


def rule(asked: Sequence[Messages]) -> list[str]:
    """Says what keywords find."""
    return [_ruled(str(messages[-1]["content"])) for messages in asked]


def _ruled(text: str) -> str:
    named = next((one for one in ALGORITHMS if one.title in text), None)
    if named:
        return f"{fenced(named.source)}\n{named.explained}"
    if "assert" in text:
        return fenced(_turned(code_of(text)))
    function = next((found[1] for pattern in _ASKED if (found := re.search(pattern, text))), "function")
    if "```" in text:
        return _explained(code_of(text))
    numbers = [int(one) for one in re.findall(r"\b\d+\b", text)]
    if "For an empty list it returns" in text:
        one = next((some for some in _chains(function, numbers) if some.explained in text), None)
        return fenced(one.source) if one else ""
    said = [
        _found({part: of_split(wordings, TRAIN) for part, wordings in table.items()}, text, default)
        for table, default in ((words.FILTERED, "all"), (words.CHANGED, "self"), (words.MADE, "list"))
    ]
    one = Chain(function, said[0], said[1], said[2], (numbers or [2])[0], (numbers or [2])[-1])
    return f"{fenced(one.source)}\n{one.explained}"


def _found(table: dict[str, Sequence[str]], text: str, default: str) -> str:
    """The part whose longest wording is in a text; a number stands for any."""
    hits = [
        (len(wording), part)
        for part, wordings in table.items()
        for wording in wordings
        if (bare := wording.replace("{what}", "").strip())
        and re.search(re.escape(bare).replace(r"\{n\}", r"\d+").replace(r"\{m\}", r"\d+"), text)
    ]
    return max(hits)[1] if hits else default


def _turned(source: str) -> str:
    """A function with the comparison the other way round, or the `return` that it lacks: the two commonest mistakes."""
    if "return" not in source:
        *before, last = source.splitlines()
        return "\n".join([*before, f"    return {last.strip()}"])
    turned = {" > ": " < ", " < ": " > ", "!=": "==", "+=": "-=", "-=": "+="}
    wrong = next((sign for sign in turned if sign in source), None)
    return source.replace(wrong, turned[wrong], 1) if wrong else source


def _explained(source: str) -> str:
    """The explanation of the function whose source this is."""
    found = re.search(r"def (\w+)\(", source)
    numbers = [int(one) for one in re.findall(r"\b\d+\b", source)]
    some = _chains(found[1] if found else "function", [*numbers, *(numbers[-1:] or [2])])
    return next((one.explained for one in some if one.source == source), "It returns a list.")


def _chains(function: str, numbers: Sequence[int]) -> list[Chain]:
    """All functions with a name and any two of the numbers."""
    some = sorted({*numbers}) or [2]
    return [Chain(function, *three, n, m) for three in parts() for n in some for m in some]
