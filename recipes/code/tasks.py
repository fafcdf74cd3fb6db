"""Functions over a list of numbers, put together from parts: which numbers are kept, what is done with each, what is made of
them. Which split one is of follows from its parts, and of a name from its letters, so nothing that is asked was learned from.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.code import words
from recipes.code.words import DEV, SUITE, TRAIN, of_split

# how many of ten of a kind are of a split
_SHARES = (TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, DEV, SUITE, SUITE)
_CONDITIONS = {
    "all": "", "even": "number % 2 == 0", "odd": "number % 2 == 1", "positive": "number > 0", "negative": "number < 0",
    "over": "number > {n}", "under": "number < {n}", "divisible": "number % {n} == 0",
}  # fmt: skip
_VALUES = {
    "self": "number", "square": "number * number", "times": "number * {m}", "plus": "number + {m}", "minus": "number - {m}",
    "negated": "-number",
}  # fmt: skip
# what is made -> its name, what it begins with, and what a number does to it
_MADE = {
    "sum": ("total", "0", "total += {value}"),
    "product": ("product", "1", "product *= {value}"),
    "list": ("result", "[]", "result.append({value})"),
    "last": ("last", "None", "last = {value}"),
    "count": ("count", "0", "count += 1"),
    "any": ("found", "False", "found = True"),
}
_KEEPS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda x, n: True, "even": lambda x, n: x % 2 == 0, "odd": lambda x, n: x % 2 == 1, "positive": lambda x, n: x > 0,
    "negative": lambda x, n: x < 0, "over": lambda x, n: x > n, "under": lambda x, n: x < n,
    "divisible": lambda x, n: x % n == 0,
}  # fmt: skip
_CHANGES: dict[str, Callable[[int, int], int]] = {
    "self": lambda x, m: x, "square": lambda x, m: x * x, "times": lambda x, m: x * m, "plus": lambda x, m: x + m,
    "minus": lambda x, m: x - m, "negated": lambda x, m: -x,
}  # fmt: skip
CONSTANTS = range(2, 10)
LISTS = 6  # that a function is tried with, the empty one among them
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Chain:
    """A function: `keep`, then `change`, then `make`, with the numbers `n` and `m` where they have some."""

    name: str
    keep: str
    change: str
    make: str
    n: int
    m: int

    @property
    def key(self) -> str:
        return f"{self.keep} {self.change} {self.make}"

    @property
    def source(self) -> str:
        made, begin, step = _MADE[self.make]
        step, condition = self._put(step.format(value=_VALUES[self.change])), self._put(_CONDITIONS[self.keep])
        inner = [f"        if {condition}:", f"            {step}"] if condition else [f"        {step}"]
        head = [f"def {self.name}(numbers):", f"    {made} = {begin}", "    for number in numbers:"]
        return "\n".join([*head, *inner, f"    return {made}"])

    @property
    def explained(self) -> str:
        return words.EXPLAINED.format(
            kept=self.slots[0], does=self.slots[1], ends=self.slots[2], empty=_MADE[self.make][1]
        )

    @property
    def slots(self) -> tuple[str, ...]:
        """What an explanation has to say."""
        parts = (words.KEPT[self.keep], words.DOES[self.change], words.ENDS[self.make])
        return (*(self._put(part) for part in parts), f"it returns {_MADE[self.make][1]}")

    def what(self, split: str, draws: random.Random) -> str:
        """What it returns, in a wording of a split."""
        kept, changed, made = (
            draws.choice(of_split(table[part], split))
            for table, part in ((words.FILTERED, self.keep), (words.CHANGED, self.change), (words.MADE, self.make))
        )
        return self._put(made.format(what=kept + changed))

    def right(self, numbers: Sequence[int]) -> Any:
        """What it gives, by definition and not by its source."""
        kept = [_CHANGES[self.change](one, self.m) for one in numbers if _KEEPS[self.keep](one, self.n)]
        if self.make in ("count", "any"):
            return len(kept) if self.make == "count" else bool(kept)
        if self.make in ("list", "last"):
            return kept if self.make == "list" else (kept[-1] if kept else None)
        product = 1
        for one in kept:
            product *= one
        return sum(kept) if self.make == "sum" else product

    @property
    def given(self) -> list[list[int]]:
        """Lists to try it with, always the same: at the edges of its condition, and on both sides of it."""
        draws = random.Random(f"{self.key} {self.n} {self.m}")
        edges = [self.n - 1, self.n, self.n + 1, 0, -1, 2 * self.n, 1]
        drawn = [[draws.randrange(-9, 20) for _ in range(draws.randrange(2, 6))] for _ in range(LISTS - 2)]
        return [draws.sample(edges, 5), *drawn, []]

    def _put(self, text: str) -> str:
        return text.replace("{n}", str(self.n)).replace("{m}", str(self.m))


def parts() -> Iterator[tuple[str, str, str]]:
    """All that can be put together; to be counted or noticed, numbers need no change."""
    for keep in _CONDITIONS:
        for make in _MADE:
            yield from ((keep, change, make) for change in (("self",) if make in ("count", "any") else _VALUES))


def split_of(text: str) -> str:
    """Which split parts, or a name, are of."""
    return _SHARES[zlib.crc32(text.encode()) % len(_SHARES)]


def name(split: str, draws: random.Random) -> str:
    """A function's name that means nothing, so that it cannot be known by heart."""
    while True:
        drawn = "_".join(
            "".join(draws.choices(_SYLLABLES, k=draws.randrange(1, 4))) for _ in range(draws.randrange(1, 3))
        )
        if len(drawn) > 3 and split_of(drawn) == split:
            return drawn


def chain(split: str, draws: random.Random) -> Chain:
    """A function of a split, with a name of its own."""
    keep, change, make = draws.choice(_of_split(split))
    n = draws.choice(CONSTANTS[1:] if keep == "divisible" else CONSTANTS)  # by 2: that is "even", of a split of its own
    return Chain(name(split, draws), keep, change, make, n, draws.choice(CONSTANTS))


@functools.cache
def _of_split(split: str) -> list[tuple[str, str, str]]:
    return [some for some in parts() if split_of(" ".join(some)) == split]
