"""Tasks of known, hidden difficulty for `shoal bench route`: five families of six levels, in a vocabulary of their own.

A level is a number of steps of composition. Everything that levels 1 to 6 are made of stands in every instance, and what is
asked about decides which one it is: so all prompts of a family have one length, and one distribution of words at each place.
Words that stand alone tell nothing of the level. Two that are put together may: the bracket that is asked about stands at its
level's place, the letter as often as its level says, and a line of a program reads further back, the lower its level is.

    family      an instance, and what is asked         the answer                     steps
    lookup      pairs of a table, shuffled; a key      the digit its chain ends in    look-ups on the way
    arithmetic  a nested sum; one of its brackets      the bracket's value modulo 3   operations inside it
    variables   assignments, as code; the last one     the value that it sets         assignments behind it
    parity      marks of six letters; a letter         are its ones odd?              its marks
    order       who stands before whom, shuffled; two  which of the two is before     facts that lead from one to the other

A pair, an assignment, a term and a mark are one token each ("a=b", "a:2+", "a.1"), a question one or two ("?a"): minutes of a
CPU core do not teach a model to put two tokens together first.

Letters: n instances, T tokens of an instance, Q questions about each, q tokens of a question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shoal.inputs.tokenizer import SPECIAL

LEVELS = 6
NAMES, DIGITS = "abcdefghijklmn", "012"  # keys, variables, brackets, letters and people; values
_CHAINS, _LINKS = 2, LEVELS + 1  # nobody asks for a chain's first link, which stands once where the others stand twice
_WORDS = [
    *"LAVPO",
    *(f"?{name}" for name in NAMES),
    *DIGITS,
    *"<>",
    *(f"{name}={value}" for name in NAMES for value in NAMES + DIGITS),
    *(f"{name}:{digit}{sign}" for name in NAMES for digit in DIGITS for sign in "+-"),
    *(f"{name}.{mark}" for name in NAMES for mark in "01"),
]
WORDS = {word: len(SPECIAL) + place for place, word in enumerate(_WORDS)}
VOCAB = len(SPECIAL) + len(WORDS)
_ASK, _DIGIT, _PAIR, _TERM, _MARK = (WORDS[word] for word in ("?a", "0", "a=a", "a:0+", "a.0"))
_N, _D = len(NAMES), len(DIGITS)


@dataclass(frozen=True)
class Asked:
    """Instances with questions about each, as token ids."""

    instances: np.ndarray  # [n, T], first the family's own word
    questions: np.ndarray  # [n, Q, q]
    answers: np.ndarray  # [n, Q], one token each
    levels: np.ndarray  # [n, Q] 1..LEVELS
    # [n, T] what an interpreter would say after each token, -1: nothing; it is taught and never shown
    trace: np.ndarray | None = None


def _shuffled(draws: np.random.Generator, n: int, count: int, of: int | None = None) -> np.ndarray:
    """`count` different numbers below `of` [count] in random order, n times: [n, count]."""
    return draws.random((n, of or count)).argsort(1)[:, :count]


def _chains(draws: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
    """Chains of names that end in different digits: their pairs [n, chains, links], and every level asked once, of a random
    chain, in random order: questions, answers and levels [n, Q]; and the digits [n, chains]."""
    names = _shuffled(draws, n, _CHAINS * _LINKS, _N).reshape(n, _CHAINS, _LINKS)
    ends = _shuffled(draws, n, _CHAINS, _D)
    leads = np.concatenate([names[:, :, 1:], ends[..., None] + _N], axis=2)
    row, levels, chain = (
        np.arange(n)[:, None],
        _shuffled(draws, n, LEVELS) + 1,
        draws.integers(_CHAINS, size=(n, LEVELS)),
    )
    asked, answers = names[row, chain, _LINKS - levels], ends[row, chain] + _DIGIT
    return _PAIR + names * (_N + _D) + leads, asked, answers, levels, ends + _DIGIT


def lookup(draws: np.random.Generator, n: int) -> Asked:
    pairs, asked, answers, levels, _ = _chains(draws, n)
    pairs = pairs.reshape(n, -1)[np.arange(n)[:, None], _shuffled(draws, n, _CHAINS * _LINKS)]
    return _asked("L", pairs, asked[..., None], answers, levels)


def variables(draws: np.random.Generator, n: int) -> Asked:
    """Programs that set two names to digits and then, in `LEVELS` lines, names to names of either chain. The last line is the
    k-th of its chain behind the digit; the others are of the other chain. What it reads is asked, which is what the last line
    sets. The trace is the value that each line sets."""
    pairs, _, _, _, ends = _chains(draws, n)
    levels, row = draws.integers(1, LEVELS + 1, size=(n, 1)), np.arange(n)[:, None]
    which, first = draws.integers(_CHAINS, size=(n, 1)), draws.integers(_CHAINS, size=(n, 1))
    mine = np.arange(LEVELS - 1) < levels - 1  # which of the lines between the digits and the last are of its chain
    mine = mine[row, _shuffled(draws, n, LEVELS - 1)]
    chain = np.concatenate([first, 1 - first, np.where(mine, which, 1 - which), which], axis=1)
    link = np.where(chain == 0, (chain == 0).cumsum(1), (chain == 1).cumsum(1))
    lines = pairs[row, chain, _LINKS - link]
    read = (lines[:, -1:] - _PAIR) % (_N + _D)  # the last line's right side, a name
    found = _asked("V", lines, read[..., None], ends[row, which], levels)
    return replace(found, trace=np.concatenate([np.full((n, 1), -1), ends[row, chain]], axis=1))


def arithmetic(draws: np.random.Generator, n: int) -> Asked:
    """`a:1+ b:0- c:2+ ... 1` is 1 + (0 - (2 + ... 1)): a bracket begins at each name, and all of them end at the end."""
    names = _shuffled(draws, n, LEVELS, _N)
    digits, minus = draws.integers(_D, size=(n, LEVELS + 1)), draws.integers(2, size=(n, LEVELS))
    values: list[np.ndarray] = [digits[:, -1]]
    for place in reversed(range(LEVELS)):  # from the inside out
        values.append((digits[:, place] + np.where(minus[:, place], -1, 1) * values[-1]) % _D)
    terms = np.concatenate([_TERM + (names * _D + digits[:, :-1]) * 2 + minus, _DIGIT + digits[:, -1:]], axis=1)
    levels, row = _shuffled(draws, n, LEVELS) + 1, np.arange(n)[:, None]
    answers = np.stack(values, axis=1)[row, levels] + _DIGIT
    return _asked("A", terms, names[row, LEVELS - levels][..., None], answers, levels)


def parity(draws: np.random.Generator, n: int) -> Asked:
    """Six letters, of which one has one mark, another two, up to `LEVELS`."""
    names, row = _shuffled(draws, n, LEVELS, _N), np.arange(n)[:, None]
    of = np.repeat(np.arange(LEVELS), np.arange(1, LEVELS + 1))  # [marks] whose each is: the k-th letter's k
    ones = draws.integers(2, size=(n, len(of)))
    marks = (_MARK + 2 * names[:, of] + ones)[row, _shuffled(draws, n, len(of))]
    odd = np.stack([ones[:, of == letter].sum(1) % 2 for letter in range(LEVELS)], axis=1)
    which = _shuffled(draws, n, LEVELS)
    return _asked("P", marks, names[row, which][..., None], odd[row, which] + _DIGIT, which + 1)


def order(draws: np.random.Generator, n: int) -> Asked:
    """Neighbours in a row of people; asked are two who have neighbours on both sides."""
    people = 2 * LEVELS + 1
    names, row = _shuffled(draws, n, people, _N), np.arange(n)[:, None]
    facts = (_PAIR + names[:, :-1] * (_N + _D) + names[:, 1:])[row, _shuffled(draws, n, people - 1)]
    levels, turned = _shuffled(draws, n, LEVELS) + 1, draws.integers(2, size=(n, LEVELS))
    first = 1 + (draws.random((n, LEVELS)) * (people - 2 - levels)).astype(int)
    pair = np.stack([names[row, first + levels * turned], names[row, first + levels * (1 - turned)]], axis=-1)
    return _asked("O", facts, pair, np.where(turned, WORDS[">"], WORDS["<"]), levels)


def _asked(family: str, instances: np.ndarray, names: np.ndarray, answers: np.ndarray, levels: np.ndarray) -> Asked:
    """`instances` [n, T - 1] under the family's word, and questions about `names` [n, Q, q]."""
    instances = np.concatenate([np.full((len(instances), 1), WORDS[family]), instances], axis=1)
    return Asked(instances, _ASK + names, answers, levels)


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
    trace = np.full(asked.instances.shape, -1) if asked.trace is None else asked.trace
    return tokens, np.concatenate([trace, goals.reshape(n, -1)], axis=1)


def prompts(family: str, draws: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` instances with one question each: prompts [n, T], all of one length, answers and levels [n]."""
    asked = FAMILIES[family](draws, n)
    ids = asked.instances  # of a program what is asked about is its last line
    if asked.trace is None:
        ids = np.concatenate([ids, asked.questions[:, 0]], axis=1)
    return ids, asked.answers[:, 0], asked.levels[:, 0]
