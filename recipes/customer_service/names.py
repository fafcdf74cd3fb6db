"""Names of products and places that nobody ever read, for the shops that are learned from.

Who reads thirty products over and over knows them by heart, each as a token or two, and has never copied a name letter by
letter: the first that is new becomes one of the thirty. So each shop that is learned from has names of its own, most of
them made up: of syllables in English, in Chinese of two of the 3,755 commonest characters (level 1 of GB 2312).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from recipes.splits import TRAIN

MADE_UP = 0.7  # of the names that are learned from
_FIRST = (*"bcdfghjklmnprstvwyz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "qu", "sc", "sp", "st", "str", "tr")
_MIDDLE = (*"aeiou", "ai", "ea", "ee", "oa", "oo", "ou")
_LAST = ("", *"dfglmnprstx", "ll", "lt", "nd", "rf", "rt", "st")
_LEVEL_1 = range(0xB0, 0xD8), range(0xA1, 0xFF)  # first and second bytes of GB 2312
_COMMON = [
    letter
    for row in _LEVEL_1[0]
    for column in _LEVEL_1[1]
    if (letter := bytes((row, column)).decode("gb2312", "ignore"))
]

Table = Mapping[str, Mapping[str, tuple[str, ...]]]  # language -> split -> names


def named(table: Table, language: str, split: str, draws: random.Random) -> str:
    """A name of `split`: one of its own in `table`, or of what is learned from mostly one that is made up."""
    own = table[language]
    if split != TRAIN or draws.random() >= MADE_UP:
        return draws.choice(own[split])
    others = [name for other, names in own.items() if other != TRAIN for name in names]
    while True:
        made = _made_up(language, draws)
        made = made.capitalize() if others[0][0].isupper() else made
        if not any(name in made for name in others):
            return made


def some_named(table: Table, language: str, split: str, count: int, draws: random.Random) -> Sequence[str]:
    """So many different ones; of what is not learned from all there are."""
    if split != TRAIN:
        return table[language][split]
    found: dict[str, None] = {}
    while len(found) < count:
        found[named(table, language, split, draws)] = None
    return [*found]


def _made_up(language: str, draws: random.Random) -> str:
    if language == "zh":
        return "".join(draws.choices(_COMMON, k=2))
    first, second = (draws.choice(_FIRST) + draws.choice(_MIDDLE) for _ in range(2))
    return first + (draws.choice(_LAST) if draws.random() < 0.3 else "") + second + draws.choice(_LAST)
