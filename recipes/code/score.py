"""What answers are worth. Programs are run in the sandbox, a process each, and what their functions give is compared here.

pass@1        write: all of the cases come out, at the first and only try
runs          write: the block of code is a program, and has the function
repair rate   repair: all cases come out, and at most two lines differ from what was to be mended
unchanged     repair: the function as it was; the less the better
explained     write and explain: of what an explanation has to say, the share that is said
round trip    explain: written anew from the answer's words alone, without code in them, all cases come out
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from recipes.code.exercises import EXPLAIN, REPAIR, WRITE, again, code_of
from recipes.code.words import TRAIN
from recipes.recipe import Answerer
from shoal.evaluate.intervals import Figure, of_share
from shoal.sandbox import Call, Limits, Ran, run
from shoal.sandbox.limits import MOST_PROGRAM

MEASURES = ("pass@1", "runs", "repair rate", "unchanged", "explained", "round trip")
LEAST_IS_BEST = ("unchanged",)
_OF_KIND = {WRITE: "pass@1", REPAIR: "repair rate", EXPLAIN: "explained"}
MOST_LINES = 2  # that mending may change
AT_ONCE = 2  # programs
LIMITS = Limits(seconds=1, wall=20, memory=128 * 2**20, output=16 * 2**10)

Row = Mapping[str, Any]
Program = tuple[str, str]  # its text, and the row's function
# a block of code, and a line of a function that stands in none
_CODE = re.compile(r"```.*?(?:```|\Z)|^(?:def |[ \t])[^\n]*$", re.DOTALL | re.MULTILINE)
_NONE = Ran("failed", 1, "", "", (), 0.0)


def ran(rows: Sequence[Row], programs: Sequence[str]) -> list[Ran]:
    """What became of programs, each with its row's cases; those that are the same are run once, also of answers that are
    asked about again: by workload, and at other depths. Raises ResourceError where there is no sandbox."""
    asked = [(row["function"], json.dumps([given for given, _ in row["cases"]])) for row in rows]
    wanted = [(program, *each) for each, program in zip(asked, programs, strict=True)]
    different = [*dict.fromkeys(wanted)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(different, pool.map(lambda each: _tried(*each), different), strict=True))
    return [found[each] for each in wanted]


@lru_cache(maxsize=4096)
def _tried(program: str, function: str, cases: str) -> Ran:
    """What became of a program whose function is called with each of the `cases`, a JSON list of arguments."""
    if f"def {function}(" not in program:
        return _NONE  # nothing to call: not run at all
    whole = f"{program}\n\n{function}\n"  # fails where no such function is there, as in a comment or a class
    if len(whole) > MOST_PROGRAM:
        return _NONE
    return run(whole, [Call(function, given) for given in json.loads(cases)], LIMITS)


def passed(row: Row, became: Ran) -> bool:
    """Did every case come out? Nothing that a program prints or exits with is asked."""
    return became.values == tuple(right for _, right in row["cases"])


def differing(one: str, other: str) -> int:
    """Lines that must be changed, added or taken out to make `other` of `one`."""
    changes = difflib.SequenceMatcher(None, one.splitlines(), other.splitlines(), autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for kind, a, b, c, d in changes if kind != "equal")


def prose(answer: str) -> str:
    """What an answer says outside of code."""
    return _CODE.sub("", answer.strip()).strip()


def explained(row: Row, answer: str) -> float:
    """The share of what has to be said that is said outside of code."""
    words = prose(answer)
    return sum(slot in words for slot in row["slots"]) / len(row["slots"])


def scored(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
    """The measures of answers to rows of a suite, by name; of those that no row is for there is none."""
    hits: dict[str, list[tuple[float, str]]] = {}
    for row, found in zip(rows, _judged(rows, answers), strict=True):
        for name, value in found.items():
            hits.setdefault(name, []).append((value, row["group"]))
    return {name: _figure(some) for name, some in hits.items()}


def rights(rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
    """Of each answer whether it is right: the program passes, or all is said that an explanation has to say."""
    return [found[_OF_KIND[row["task"]]] == 1 for row, found in zip(rows, _judged(rows, answers), strict=True)]


def _judged(rows: Sequence[Row], answers: Sequence[str]) -> list[dict[str, float]]:
    """The measures of each answer, by name."""
    written = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row["task"] != EXPLAIN]
    became = iter(ran([row for row, _ in written], [code_of(answer) for _, answer in written]))
    judged = []
    for row, answer in zip(rows, answers, strict=True):
        found: dict[str, float] = {}
        if row["task"] == WRITE:
            one = next(became)
            found = {"pass@1": passed(row, one), "runs": one.how == "ended", "explained": explained(row, answer)}
        elif row["task"] == REPAIR:
            one, lines = next(became), differing(row["wrong"], code_of(answer))
            found = {"repair rate": passed(row, one) and lines <= MOST_LINES, "unchanged": not lines}
        elif row["task"] == EXPLAIN:
            found = {"explained": explained(row, answer)}
        judged.append(found)
    return judged


def _figure(some: Sequence[tuple[float, str]]) -> Figure:
    places = {group: at for at, group in enumerate(dict.fromkeys(group for _, group in some))}
    values, groups = [value for value, _ in some], [places[group] for _, group in some]
    return of_share(values, groups)


def round_trip(rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
    """Explained by who answers, then written by the same from those words alone, and tried."""
    some = [row for row in rows if row["task"] == EXPLAIN]
    if not some:
        return {}
    draws = random.Random(seed)
    told = answerer([row["messages"][:-1] for row in some])
    asked = [again(row["function"], prose(said), TRAIN, draws) for row, said in zip(some, told, strict=True)]
    answers = answerer([[{"role": "user", "content": text}] for text in asked])
    became = ran(some, [code_of(answer) for answer in answers])
    right = [(float(passed(row, one)), row["group"]) for row, one in zip(some, became, strict=True)]
    return {"round trip": _figure(right)}
