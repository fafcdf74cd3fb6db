"""Rows: what is asked of the assistant, what it should say, and what that is judged by.

    write     a description -> the function in a block of code, and how it works
    explain   a function -> how it works
    repair    a function with a mistake, and a test that fails -> the function
    again     how a function works -> the function: the second half of a round trip; only learned from

Beside its messages a row of a suite has ``function`` (its name), ``cases`` (arguments, and what they give as `sandbox.written`
has it), ``slots`` (what an explanation says) and ``wrong`` (the function with the mistake).
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from recipes.code import words
from recipes.code.algorithms import ALGORITHMS, Algorithm
from recipes.code.mistakes import mistaken
from recipes.code.tasks import CONSTANTS, Chain, chain, name
from recipes.code.words import of_split
from shoal.sandbox import written

WRITE, EXPLAIN, REPAIR, AGAIN = KINDS = ("write", "explain", "repair", "again")
NAMED_SHARE = 0.2  # of what is written: functions that have a name of their own
TRIES = 50  # mistakes that are made until one is noticed
_BLOCK = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)
Row = dict[str, Any]


def fenced(source: str) -> str:
    return f"```python\n{source}\n```"


def code_of(answer: str) -> str:
    """The program in an answer: its first block of code, or all of it where there is none."""
    found = _BLOCK.search(answer)
    return (found[1] if found else answer).strip("\n")


def exercises(
    split: str,
    wordings: str,
    count: int,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    *,
    named_share: float = NAMED_SHARE,
) -> Iterator[Row]:
    """So many rows of functions of a split, asked for in the wordings of a split, each kind by turns."""
    draws = random.Random(f"exercises {split} {wordings} {seed}")
    makers: dict[str, Callable[[str, str, random.Random], Row]] = {
        WRITE: functools.partial(_write, named_share=named_share), EXPLAIN: _explain, REPAIR: _repair, AGAIN: _again,
    }  # fmt: skip
    for at in range(count):
        yield makers[kinds[at % len(kinds)]](split, wordings, draws)


def named(name: str) -> Row:
    """What an answer to the named function's description is judged by: a row without messages."""
    known = next(one for one in ALGORITHMS if one.name == name)
    row = _row(WRITE, "", "", known)
    return {key: row[key] for key in ("task", "function", "cases", "slots")}


def said_again(split: str, count: int, seed: int = 0) -> Iterator[Row]:
    """Rows in which the assistant says names, numbers and lines of code again (decision 0033)."""
    draws = random.Random(f"said again {split} {seed}")
    for at in range(count):
        some = [_said(split, draws) for _ in range(draws.randrange(2, 8))]
        text = draws.choice((", ", " ", "\n")).join(some)
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        yield {"messages": turns, "task": "said again", "group": f"again-{split}-{seed}-{at}", "synthetic": True}


def _said(split: str, draws: random.Random) -> str:
    kind = draws.randrange(4)
    if kind < 2:
        return name(split, draws)
    return str(draws.choice(CONSTANTS)) if kind == 2 else draws.choice(chain(split, draws).source.splitlines()[1:])


def _write(split: str, wordings: str, draws: random.Random, *, named_share: float) -> Row:
    if draws.random() < named_share:
        known = draws.choice(ALGORITHMS)
        asked = draws.choice(of_split(words.NAMED, wordings)).format(title=known.title)
        return _row(WRITE, asked, f"{fenced(known.source)}\n{known.explained}", known)
    one = chain(split, draws)
    asked = draws.choice(of_split(words.WRITE, wordings)).format(name=one.name, what=one.what(wordings, draws))
    return _row(WRITE, asked, f"{fenced(one.source)}\n{one.explained}", one)


def _explain(split: str, wordings: str, draws: random.Random) -> Row:
    one = chain(split, draws)
    asked = draws.choice(of_split(words.EXPLAIN, wordings)).format(code=fenced(one.source))
    return _row(EXPLAIN, asked, one.explained, one)


def _again(split: str, wordings: str, draws: random.Random) -> Row:
    one = chain(split, draws)
    return _row(AGAIN, again(one.name, one.explained, wordings, draws), fenced(one.source), one)


def again(function: str, explained: str, wordings: str, draws: random.Random) -> str:
    """A function asked for by how it works."""
    return draws.choice(of_split(words.AGAIN, wordings)).format(name=function, explained=explained)


def _repair(split: str, wordings: str, draws: random.Random) -> Row:
    for _ in range(TRIES):
        one = chain(split, draws)
        wrong = mistaken(one.source, draws)
        for given in one.given:
            right, got = written(one.right(given)), _gives(wrong, one.name, given)
            if got != f"gives {right}":
                test = f"assert {one.name}({given}) == {right}"
                asked = draws.choice(of_split(words.REPAIR, wordings)).format(code=fenced(wrong), test=test, got=got)
                return {**_row(REPAIR, asked, fenced(one.source), one), "wrong": wrong}
    raise AssertionError("no mistake is noticed by any list")  # one in ten is not


def _gives(source: str, function: str, given: list[int]) -> str:
    """What our own function, with our own mistake in it, gives: a loop over a short list, which ends."""
    found: dict[str, Any] = {}
    exec(compile(source, "<mistaken>", "exec"), found)
    try:
        return f"gives {written(found[function](list(given)))}"
    except Exception as error:
        return f"raises {type(error).__name__}"


def _row(kind: str, asked: str, answer: str, one: Chain | Algorithm) -> Row:
    if isinstance(one, Chain):
        function, group = one.name, one.key
        cases = [[[given], written(one.right(given))] for given in one.given]
    else:
        function = group = one.name
        cases = [[list(given), written(one.right(*given))] for given in one.given]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {
        "messages": turns, "task": kind, "group": group, "synthetic": True, "function": function, "cases": cases,
        "slots": list(one.slots),
    }  # fmt: skip
