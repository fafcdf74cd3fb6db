"""Tasks of known, hidden difficulty for `shoal bench route`: five families of six levels, in a vocabulary of their own.

A level is a number of steps of composition. Everything that levels 1 to 6 are made of stands in every instance, and what is
asked about decides which one it is: so all prompts of a family have one length, and one distribution of words at each place.
Words that stand alone tell nothing of the level. Two that are put together may: a name that is asked about was said at some
place, and a line of a program reads further back, the lower its level is.

    family      an instance, and what is asked               the answer                  steps
    lookup      pairs of a table; a key                      the digit its chain ends in look-ups on the way
    arithmetic  sums of a digit and an earlier sum; a sum    its value modulo 3          facts on the way to it
    variables   assignments, as code; the last one           the value that it sets      assignments behind it
    parity      items of linked lists; an item               are the ones to it odd?     facts on the way to it
    order       who stands beyond whom; one of either side   which of the two is before  facts from the middle to them

What a fact stands on was said before it, and what it comes to is taught where it stands (the trace) and never shown: with
tables in any order, and taught by questions alone, a quarter of an hour of `mini` on a core learns the first level alone. A
pair, an assignment, a sum and an item are one token each ("a=b", "a:b+1"), a question one or two ("?a"): minutes of a CPU core
do not teach a model to put two tokens together first. Counting is no composition: how many marks of a letter are ones, one
layer learned at every level.

Letters: n instances, T tokens of an instance, Q questions about each, q tokens of a question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.inputs.tokenizer import SPECIAL

LEVELS = 6
NAMES, DIGITS = "abcdefghijklmn", "012"  # keys, sums, variables, items and people; values
SIDES = "<>"
_CHAINS, _LINKS = 2, LEVELS + 1  # nobody asks for a chain's last link, which stands once where the others stand twice
_WORDS = [
    *"LAVPO",
    *(f"?{name}" for name in NAMES),
    *DIGITS,
    *SIDES,
    *(f"{name}={value}" for name in NAMES for value in NAMES + DIGITS + SIDES),
    *(f"{name}:{other}+{digit}" for name in NAMES for other in NAMES for digit in DIGITS),
]
WORDS = {word: len(SPECIAL) + place for place, word in enumerate(_WORDS)}
VOCAB = len(SPECIAL) + len(WORDS)
_ASK, _DIGIT, _SIDE, _PAIR, _SUM = (WORDS[word] for word in ("?a", "0", "<", "a=a", "a:a+0"))
_N, _D, _VALUES = len(NAMES), len(DIGITS), len(NAMES + DIGITS + SIDES)


@dataclass(frozen=True)
class Asked:
    """Instances with questions about each, as token ids."""

    instances: np.ndarray  # [n, T], first the family's own word
    questions: np.ndarray  # [n, Q, q]
    answers: np.ndarray  # [n, Q], one token each
    levels: np.ndarray  # [n, Q] 1..LEVELS
    # [n, T] what an interpreter would say after each token, -1: nothing; it is taught and never shown
    trace: np.ndarray


def _shuffled(draws: np.random.Generator, n: int, count: int, of: int | None = None) -> np.ndarray:
    """`count` different numbers below `of` [count] in random order, n times: [n, count]."""
    return draws.random((n, of or count)).argsort(1)[:, :count]


def _dealt(draws: np.random.Generator, chain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which chain each fact is of, [n, T], as it was given but in random order; and which of its chain it is, 0 first."""
    chain = chain[np.arange(len(chain))[:, None], _shuffled(draws, *chain.shape)]
    places = [(chain == some).cumsum(1) - 1 for some in range(int(chain.max()) + 1)]
    return chain, np.choose(chain, places)


@dataclass(frozen=True)
class _Chains:
    """Two chains of names, each link of which is said after the one before it, and a question about each level."""

    names: np.ndarray  # [n, chains, links], the first link first
    chain: np.ndarray  # [n, T] which chain and which of its links each fact is
    link: np.ndarray
    levels: np.ndarray  # [n, Q]; of which chain each is asked
    of: np.ndarray

    @classmethod
    def draw(cls, draws: np.random.Generator, n: int) -> _Chains:
        names = _shuffled(draws, n, _CHAINS * _LINKS, _N).reshape(n, _CHAINS, _LINKS)
        chain, link = _dealt(draws, np.tile(np.arange(_CHAINS), (n, _LINKS)))
        levels = _shuffled(draws, n, LEVELS) + 1
        return cls(names, chain, link, levels, draws.integers(_CHAINS, size=(n, LEVELS)))

    @property
    def every(self) -> np.ndarray:
        return np.arange(len(self.names))[:, None]

    def said(self, of_links: np.ndarray) -> np.ndarray:
        """What is given of each link [n, chains, links], for each fact [n, T]."""
        return of_links[self.every, self.chain, self.link]

    def asked(self, of_links: np.ndarray, other: bool = False) -> np.ndarray:
        """What is given of each link, for each question [n, Q]; `other`: of the other chain."""
        return of_links[self.every, 1 - self.of if other else self.of, self.levels - 1]

    def pairs(self, first: np.ndarray) -> np.ndarray:
        """Facts that say of each link the one before it, of the first its value: `first` [n, chains], counted from _N on."""
        leads = np.concatenate([_N + first[..., None], self.names[..., :-1]], axis=2)
        return assigned(self.names, leads)


def assigned(names: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """The tokens that give names others or, from `len(NAMES)` on, digits and then sides."""
    return _PAIR + names * _VALUES + leads


def lookup(draws: np.random.Generator, n: int) -> Asked:
    made, ends = _Chains.draw(draws, n), _shuffled(draws, n, _CHAINS, _D)
    values = np.repeat(_DIGIT + ends[..., None], _LINKS, axis=2)
    return _asked(
        "L",
        made.said(made.pairs(ends)),
        made.asked(made.names)[..., None],
        made.asked(values),
        made.levels,
        made.said(values),
    )


def arithmetic(draws: np.random.Generator, n: int) -> Asked:
    """`b:a+2` is a + 2, modulo 3; of the first of a chain its value is said."""
    return _along(draws, n, "A", lambda digits: digits.cumsum(2) % _D)


def parity(draws: np.random.Generator, n: int) -> Asked:
    """`b:a+2` is a list's item 2, behind item a. Asked is whether the ones up to an item are odd; others are filtered out."""
    return _along(draws, n, "P", lambda digits: (digits == 1).cumsum(2) % 2)


def _along(draws: np.random.Generator, n: int, family: str, come_to: Callable[[np.ndarray], np.ndarray]) -> Asked:
    """Chains with a digit at each link, and what these come to up to there, [n, chains, links] both."""
    made, digits = _Chains.draw(draws, n), draws.integers(_D, size=(n, _CHAINS, _LINKS))
    sums = _SUM + (made.names[..., 1:] * _N + made.names[..., :-1]) * _D + digits[..., 1:]
    facts = np.concatenate([made.pairs(digits[..., 0])[..., :1], sums], axis=2)
    values, names = _DIGIT + come_to(digits), made.asked(made.names)[..., None]
    return _asked(family, made.said(facts), names, made.asked(values), made.levels, made.said(values))


def order(draws: np.random.Generator, n: int) -> Asked:
    """`a=<` stands before the middle, `b=a` further out than a, on its side. Asked are two of different sides, as far out."""
    made, ends = _Chains.draw(draws, n), _shuffled(draws, n, _CHAINS)
    sides = np.repeat(_SIDE + ends[..., None], _LINKS, axis=2)
    pair = np.stack([made.asked(made.names), made.asked(made.names, other=True)], axis=-1)
    return _asked("O", made.said(made.pairs(_D + ends)), pair, made.asked(sides), made.levels, made.said(sides))


def variables(draws: np.random.Generator, n: int) -> Asked:
    """Programs that set three names to digits and then names to names. The last line is the k-th of its chain behind the digit;
    before it a second chain has as many lines as its own, and a third all others: how many lines a chain has tells which two it
    may be, at every level, and no more. What the last line reads is asked, which is what it sets. The trace is the value that
    each line sets."""
    lines, levels = 2 * (LEVELS - 1), draws.integers(1, LEVELS + 1, size=(n, 1))
    which = _shuffled(draws, n, 3)  # the chain that is asked, its like, and the third
    kind = np.where(np.arange(lines) < levels - 1, 0, np.where(np.arange(lines) < 2 * (levels - 1), 1, 2))
    row = np.arange(n)[:, None]
    kind = kind[row, _shuffled(draws, n, lines)]
    chain = np.concatenate([_shuffled(draws, n, 3), which[row, kind], which[:, :1]], axis=1)  # [n, T]
    names, ends = _shuffled(draws, n, chain.shape[1], _N), _shuffled(draws, n, 3, _D)
    values, leads, last = ends[row, chain], np.empty_like(chain), np.tile(_N + ends, 1)
    for place in range(chain.shape[1]):  # what was last set of its chain, or its digit
        of = row[:, 0], chain[:, place]
        leads[:, place], last[of] = last[of], names[:, place]
    return _asked("V", assigned(names, leads), leads[:, -1:, None], _DIGIT + values[:, -1:], levels, _DIGIT + values)


def _asked(
    family: str, facts: np.ndarray, names: np.ndarray, answers: np.ndarray, levels: np.ndarray, trace: np.ndarray
) -> Asked:
    """`facts` [n, T - 1] under the family's word, and questions about `names` [n, Q, q]."""
    first = np.full((len(facts), 1), WORDS[family])
    return Asked(
        np.concatenate([first, facts], axis=1),
        _ASK + names,
        answers,
        levels,
        np.concatenate([np.full_like(first, -1), trace], axis=1),
    )


FAMILIES: dict[str, Callable[[np.random.Generator, int], Asked]] = {
    "lookup": lookup,
    "arithmetic": arithmetic,
    "variables": variables,
    "parity": parity,
    "order": order,
}


def rows(asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """Training rows, all questions about an instance one after the other: tokens and targets [n, T + Q q]. A question's last
    token has its answer as a target, an instance's have its trace, all others none (-1). Answers are not written, so that no
    question tells of another."""
    n = len(asked.instances)
    goals = np.full(asked.questions.shape, -1)
    goals[..., -1] = asked.answers
    tokens = np.concatenate([asked.instances, asked.questions.reshape(n, -1)], axis=1)
    return tokens, np.concatenate([asked.trace, goals.reshape(n, -1)], axis=1)


def prompts(family: str, draws: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` instances with one question each: prompts [n, T], all of one length, answers and levels [n]."""
    asked = FAMILIES[family](draws, n)
    ids = asked.instances  # of a program what is asked about is its last line
    if family != "variables":
        ids = np.concatenate([ids, asked.questions[:, 0]], axis=1)
    return ids, asked.answers[:, 0], asked.levels[:, 0]
