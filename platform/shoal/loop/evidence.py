"""The evidence of a canary: what people had of it and of the stable version at the same time, one person counted once a step.

    person   who asks, or the conversation where a request names nobody; who votes
    part     of a step: the first conversation that a person begins in it. It alone counts, at the version that it was given to

Which version gets a conversation is drawn, whatever becomes of it. So in each step the canary's part of the people who had
something bad is its part of all, where both versions are equal: with load, weekends and long sessions too, since both have
them at the same time. `log_evidence` is the log of how much more likely the draws are for a worse canary, in the mean over
`ODDS`. It may be looked at after every request: an equal canary reaches 1 / a in at most the share a of all trials (Ville's
inequality; but for the rate of both together, which is estimated).

Votes are what people like to say, and `user` is what a client likes to say. So where several API keys have asked, one key's
votes weigh as those of `caps.most` people, or of `FEW_VOTERS`, who condemn nothing: sixty users of one key are no sixty people.
What the server measures is not weighed: nobody says it, and the version is drawn.

Copies of requests (step 0) are compared with the answers of the stable version to the same requests, and with no others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.loop.canary_state import SHARES
from shoal.loop.caps import Shares, most

KINDS = ("failures", "invalid", "slow", "down", "cut", "unsure", "wrong")
# odds of something bad of worse canaries, times those of the stable version
ODDS = np.array([1.5, 2.2, 4.0, 12.0, 60.0, 1000.0])
MOST_PEOPLE = 20_000  # of a step that one gateway keeps: a thousand of a canary with 5 %; more are not counted
LEAST_PEOPLE = 3  # to whom something bad happened, before a canary is condemned
VOTER = "v"  # what the name of one who votes begins with; no other has the letter
FEW_VOTERS = LEAST_PEOPLE - 1  # whom one key has at least, however few the others' are
DOWN = KINDS.index("down")
OF, FIRST, EVER = range(3)  # people who could have had it; at their first chance; at any
# chance that one who counts is the canary's; of a copy and its original each counts
CHANCE = np.array([0.5, *SHARES[1:]])[:, None]


@dataclass
class Person:
    """What is known of one, in one step."""

    at: float  # seconds since 1970
    canary: bool
    talk: bytes = b""  # the conversation, or the answer that was voted on; known to its gateway alone
    had: int = 0  # bits, by place in `KINDS`: there was a chance
    first: int = 0  # the first one was bad
    ever: int = 0  # any was
    key: str = ""  # hash of the API key; "" without keys

    def see(self, kind: int, bad: bool) -> None:
        bit = 1 << kind
        self.first |= bit * (bad and not self.had & bit)
        self.had |= bit
        self.ever |= bit * bad

    def unsee(self, kind: int) -> None:
        keep = ~(1 << kind)
        self.had, self.first, self.ever = self.had & keep, self.first & keep, self.ever & keep


def none() -> np.ndarray:
    """Counts of nobody: [step, stable or canary, kind, `OF` to `EVER`]."""
    return np.zeros((len(SHARES), 2, len(KINDS), 3), np.int64)


@dataclass
class Evidence:
    """Of one canary, over all its steps, as one gateway knows it. People go by step and hash."""

    own: dict[str, Person] = field(default_factory=dict)  # that this gateway counted
    others: Mapping[str, Person] = field(default_factory=dict)  # that the others did
    counts: np.ndarray = field(default_factory=none)  # of both
    asking: set[str] = field(default_factory=set)  # keys that have asked, at any gateway
    votes: dict[str, np.ndarray] = field(default_factory=dict)  # key -> the part of `counts` that its votes are
    # people of `own`, by step, and apart those who vote
    kept: Counter[tuple[int, bool]] = field(default_factory=Counter)

    def part(self, step: int, who: str, talk: bytes, *, canary: bool, at: float, api_key: str = "") -> str | None:
        """Under which key a request of this person counts; None where another conversation of the person does."""
        key = f"{step}{'cs'[not canary] if not step else ''}{who}"
        known = self.own.get(key)
        if known is not None:
            return key if known.talk == talk and known.canary == canary else None
        votes = who.startswith(VOTER)
        if self.kept[step, votes] >= MOST_PEOPLE:
            return None
        if key in self.others:  # who is known of another gateway counts there, whatever our clock says
            at = max(at, math.nextafter(self.others[key].at, math.inf))
        self.own[key] = Person(at, canary, talk, key=api_key)
        if not votes:
            self.asking.add(api_key)
        self.kept[step, votes] += 1
        return key

    def see(self, key: str, kind: str, bad: bool) -> None:
        """Something that may have been bad was seen of the person `key`."""
        person, place = self.own[key], KINDS.index(kind)
        before = _flags(person, place)
        person.see(place, bad)
        self._count(key, person, place, before)

    def unsee(self, key: str, kind: str) -> None:
        """What was seen of this kind was withdrawn."""
        person, place = self.own[key], KINDS.index(kind)
        before = _flags(person, place)
        person.unsee(place)
        self._count(key, person, place, before)

    def _count(self, key: str, person: Person, place: int, before: tuple[int, int, int]) -> None:
        if key in self.others and self.others[key].at < person.at:  # as in `joined`
            return
        more = np.subtract(_flags(person, place), before)
        self.counts[int(key[0]), int(person.canary), place] += more
        if place == DOWN:
            self.votes.setdefault(person.key, _no_votes())[int(key[0]), int(person.canary)] += more

    def hear(self, others: Mapping[str, Person]) -> None:
        """What all other gateways have counted so far."""
        self.others, self.counts, self.votes = others, none(), {}
        every = joined(self.own, others)
        rows = [(int(key[0]), one.canary, one.had, one.first, one.ever) for key, one in every.items()]
        step, canary, *bits = np.array(rows, np.int64).reshape(-1, 5).T
        each = np.stack(bits, -1)[:, None, :] >> np.arange(len(KINDS))[:, None] & 1
        np.add.at(self.counts, (step, canary), each)
        self.asking = {one.key for key, one in every.items() if key[1:2] != VOTER}
        for key, one in every.items():
            if one.had >> DOWN & 1:
                self.votes.setdefault(one.key, _no_votes())[int(key[0]), int(one.canary)] += _flags(one, DOWN)

    def weighed(self) -> np.ndarray:
        """`counts`, in which no key's votes weigh more than they may."""
        if len(self.asking) < 2 or not self.votes:
            return self.counts
        found, keys = self.counts.astype(np.float64), [*(self.asking | self.votes.keys())]
        every = np.stack([self.votes.get(key, _no_votes()) for key in keys])
        voters = every[..., OF].sum(-1)  # [key, step]
        may = [max(FEW_VOTERS, most(of, Shares.key)) for of in voters.T.tolist()]
        weight = np.minimum(1, np.array(may) / np.maximum(voters, 1))
        found[:, :, DOWN] = (every * weight[:, :, None, None]).sum(0)
        return found

    def people(self, step: int) -> int:
        """The canary's in a step, of whom an answer has ended."""
        return int(self.counts[step, 1, 0, OF])

    def table(self) -> dict[str, dict[str, dict[str, int]]]:
        """For people: of each version and kind how many could have had it, and how many had."""
        whole = self.counts.sum(0)
        return {
            name: {kind: {"of": int(of[OF]), "bad": int(of[EVER])} for kind, of in zip(KINDS, whole[at], strict=True)}
            for at, name in enumerate(("stable", "canary"))
        }


def _no_votes() -> np.ndarray:
    """[step, stable or canary, `OF` to `EVER`]"""
    return np.zeros((len(SHARES), 2, 3), np.int64)


def _flags(person: Person, place: int) -> tuple[int, int, int]:
    return person.had >> place & 1, person.first >> place & 1, person.ever >> place & 1


def joined(some: Mapping[str, Person], more: Mapping[str, Person]) -> dict[str, Person]:
    """Both together. Who is in both counts as where it was first."""
    found = dict(some)
    for key, person in more.items():
        if key not in found or person.at < found[key].at:
            found[key] = person
    return found


def dumped(people: Mapping[str, Person]) -> dict[str, list[Any]]:
    """As `loaded` reads it; nothing of those who have seen nothing yet."""
    return {
        key: [one.at, int(one.canary), one.had, one.first, one.ever, *filter(None, [one.key])]
        for key, one in people.items()
        if one.had
    }


def loaded(told: Mapping[str, list[Any]]) -> dict[str, Person]:
    """Raises ValueError, KeyError and TypeError for what `dumped` has not written."""
    found = {}
    for key, (at, canary, had, first, ever, *api_key) in told.items():
        had, first, ever = int(had), int(first), int(ever)
        if int(key[:1]) >= len(SHARES) or max(had, first, ever) >= 1 << len(KINDS) or min(had, first, ever) < 0:
            raise ValueError(key)
        found[key] = Person(float(at), bool(canary), b"", had, first, ever, "".join(api_key))
    return found


def log_evidence(counts: np.ndarray) -> float:
    """For a canary that is worse, of the counts [step, stable or canary, `OF` to `EVER`] of one kind: by the mean of people's
    first chances, the good ones too, and of those who had something bad at any time.

    Examples:
        >>> import numpy as np
        >>> from shoal.loop.evidence import log_evidence
        >>> def halves(stable, canary):
        ...     counts = np.zeros((4, 2, 3))
        ...     counts[3] = [[100, stable, stable], [100, canary, canary]]
        ...     return round(log_evidence(counts))
        >>> halves(10, 10), halves(10, 20), halves(10, 40)
        (-2, 0, 9)
    """
    here = counts[:, :, OF].sum(1) > 0  # steps
    counts, chance = counts[here].astype(np.float64), CHANCE[here]
    return math.log(max(1e-300, (_of_first(counts, chance) + _of_ever(counts, chance)) / 2))


def _of_first(counts: np.ndarray, chance: np.ndarray) -> float:
    bad, all_ = counts[:, :, FIRST], counts[:, :, OF]
    rate = ((bad.sum(1) + 0.5) / (all_.sum(1) + 1))[:, None]  # of both versions together
    # the stable version's rate where the canary has so many times its odds: (1 - c) r t / (1 + r t) + ...
    more = ODDS - 1
    half = (1 + chance * more - rate * more) / 2
    square = (1 - chance) * more
    stable = (np.sqrt(half * half + square * rate) - half) / square
    canary = ODDS * stable / (1 + more * stable)
    # chance that such a one is the canary's
    is_bad, is_good = chance * canary / rate, chance * (1 - canary) / (1 - rate)
    good = all_ - bad
    told = _told(bad, is_bad, chance) + _told(good, is_good, chance)
    return float(np.exp(np.minimum(told.sum(0), 600)).mean())


def _of_ever(counts: np.ndarray, chance: np.ndarray) -> float:
    is_bad = chance * ODDS / (chance * ODDS + 1 - chance)
    return float(np.exp(np.minimum(_told(counts[:, :, EVER], is_bad, chance).sum(0), 600)).mean())


def _told(count: np.ndarray, chance: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Log likelihood ratio of so many [step, stable or canary], by step and odds."""
    stable, canary = count[:, :1], count[:, 1:]
    found: np.ndarray = canary * np.log(chance / drawn) + stable * np.log((1 - chance) / (1 - drawn))
    return found


def differences(counts: np.ndarray) -> np.ndarray:
    """By kind how much larger the canary's share is than the stable version's in the same step, in the mean over steps; 0 where
    the canary answered nobody. `counts`: [step, stable or canary, kind, `OF` to `EVER`]."""
    stable, canary = counts[:, 0].astype(np.float64), counts[:, 1].astype(np.float64)
    of = canary[:, :, OF]
    beside = np.maximum(stable[:, :, OF], 1)
    weight = of * beside / (of + beside)  # as many as can be compared
    apart = canary[:, :, FIRST:] / np.maximum(of, 1)[:, :, None] - stable[:, :, FIRST:] / beside[:, :, None]
    found: np.ndarray = (weight[:, :, None] * apart).sum(0).max(-1) / np.maximum(weight.sum(0), 1e-9)
    return found
