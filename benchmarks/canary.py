"""`shoal bench canary`: how often a canary is taken back that is equal, and one whose answers fail ten points more often.

By simulated traffic, which goes through the gateway's own `Trial` request by request: which conversations are the canary's,
who counts, and what is decided. Of each pattern the same number of trials, each until the canary is taken back or has
passed all steps.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from benchmarks.turns import show
from shoal.api.meter import Meter
from shoal.api.trial import Part, Trial, Weighed
from shoal.errors import ShoalError, UsageError
from shoal.loop.canary import Pace, advanced
from shoal.loop.canary_state import PEOPLE, SHADOWS, Canary
from shoal.machine import cores

WORSE = 0.1  # of answers more that fail
EQUAL_MOST, WORSE_LEAST = 0.05, 0.9  # shares that are taken back
FAILS = 0.05  # share of answers that fail at either version
AT_ONCE = 40  # conversations
DAY = 4_000  # requests on a weekday; a third of them on Saturdays and Sundays
VOTES, DOWN = 0.1, 0.1  # share of answers with a thumb, and of these down
MOST_REQUESTS = 400_000  # of a trial, until it is given up: it counts as not taken back


@dataclass
class Talk:
    """A conversation that is going on."""

    name: bytes
    person: str
    fails: float  # share of its answers
    left: int  # requests


class Traffic:
    """Requests in the order of their time, without a pattern: each a conversation of its own, of another person."""

    def __init__(self, draws: random.Random) -> None:
        self._draws, self._talks, self._count = draws, list[Talk](), 0

    def next(self) -> Talk:
        """The conversation that asks now."""
        if len(self._talks) < AT_ONCE:
            self._count += 1
            self._talks.append(self.begun(self._count))
        at = self._draws.randrange(len(self._talks))
        talk = self._talks[at]
        talk.left -= 1
        if not talk.left:
            self._talks[at] = self._talks[-1]
            self._talks.pop()
        return talk

    def begun(self, number: int) -> Talk:
        return Talk(str(number).encode(), "", FAILS, 1)

    def more_fail(self, request: int, step: int) -> float:
        """Share of all answers that fail now and would not otherwise, at both versions."""
        return 0.0

    def slower(self, step: int) -> float:
        """Times that answers take now, at both versions."""
        return 1.0

    def rating(self, talk: Talk, canary: bool) -> tuple[str, str] | None:
        """Who votes on an answer, and how."""
        if self._draws.random() < VOTES:
            return talk.person or talk.name.decode(), "down" if self._draws.random() < DOWN else "up"
        return None


class Sessions(Traffic):
    """Of one request to many, by people of whom some come again, and whose answers fail from never to nearly always."""

    def begun(self, number: int) -> Talk:
        who = self._draws.randrange(max(1, number - 400), number + 1)
        fails = random.Random(who).betavariate(0.3, 0.3 * (1 - FAILS) / FAILS)
        return Talk(str(number).encode(), str(who), fails, 1 + int(self._draws.expovariate(0.5)))


class Weekends(Sessions):
    """There is a third of the traffic, and three times as much fails."""

    def more_fail(self, request: int, step: int) -> float:
        return 2 * FAILS if request % (5 * DAY + 2 * DAY // 3) >= 5 * DAY else 0.0


class LoadStep(Sessions):
    """From the canary's 25 % on the machine is loaded: three times the time, and a fifth of the answers of both fail."""

    def more_fail(self, request: int, step: int) -> float:
        return 0.2 if step >= 2 else 0.0

    def slower(self, step: int) -> float:
        return 3.0 if step >= 2 else 1.0


class Angry(Sessions):
    """One person has a fifth of all conversations, and gives a thumb down to each answer of the canary, and to no other."""

    def begun(self, number: int) -> Talk:
        talk = super().begun(number)
        return Talk(talk.name, "angry", FAILS, talk.left) if number % 5 == 0 else talk

    def rating(self, talk: Talk, canary: bool) -> tuple[str, str] | None:
        if talk.person == "angry":
            return ("angry", "down") if canary else None
        return super().rating(talk, canary)


PATTERNS: dict[str, type[Traffic]] = {
    "independent": Traffic, "sessions": Sessions, "weekends": Weekends, "load step": LoadStep, "one angry user": Angry,
}  # fmt: skip


@cache
def answers(slower: float) -> list[Meter]:
    """Of some time, some length, and some certainty; to be drawn from."""
    draws, found = random.Random(0), []
    for _ in range(2000):
        first = slower * draws.lognormvariate(-1.5, 0.5)
        last = first + slower * draws.uniform(0.5, 1.5)
        found.append(Meter(0.0, first, last, [1, 2, 3], cut=draws.random() < 0.1, nll=draws.gauss(1.0, 0.5)))
    return found


def trial_of(pattern: str, worse: float, seed: int, shadows: int, people: int) -> tuple[bool, int]:
    """Whether a canary is taken back whose answers fail by `worse` more often, and after how many people that it answered."""
    draws = random.Random(f"{pattern} {seed}")
    traffic = PATTERNS[pattern](draws)
    pace = Pace()
    trial = Trial(cast(Weighed, None), f"{seed}.{pattern}", Canary(2, 0, "now", shadows, people), pace)

    def answer(talk: Talk, part: Part, request: int, *, stable: bool) -> None:
        step = trial.canary.step
        fails = talk.fails + traffic.more_fail(request, step) + (0.0 if stable else worse)
        failed = draws.random() < fails
        meter = draws.choice(answers(traffic.slower(step)))
        trial.count(meter, part, stable=stable, failed=failed)
        if stable and not failed and meter.times is not None:
            pace.observe(*meter.times, meter.nll if part.first else None, len(meter.tokens))
        rating = traffic.rating(talk, not stable)
        if step and rating is not None:
            trial.remember(str(request), "stable" if stable else trial.label, "", part.who)
            trial.vote(str(request), *rating)

    for request in range(MOST_REQUESTS):
        talk = traffic.next()
        if trial.canary.step:
            takes = trial.takes(talk.name)
            answer(talk, trial.part(talk.name, talk.person, canary=takes), request, stable=not takes)
        elif draws.random() < 0.5:  # the canary is answering the copy of another
            answer(talk, Part(None, trial.begins(talk.name)), request, stable=True)
        else:
            first = trial.part(talk.name, talk.person, canary=False)
            copied = trial.part(talk.name, talk.person, canary=True)
            answer(talk, first, request, stable=True)
            answer(talk, Part(copied.key, first.first), request, stable=False)
        decision = trial.decided[0]
        if decision == "next":
            trial.go_on(advanced(trial.canary, "now"))
        elif decision != "wait":
            break
    seen = trial.evidence.table()["canary"]["failures"]["of"]
    return trial.decided[0] == "back", seen


def _one(of: tuple[str, float, int, int, int]) -> tuple[bool, int]:
    return trial_of(*of)


def canary(
    console: Console,
    *,
    runs: int = 100,
    shadows: int = SHADOWS,
    people: int = PEOPLE,
    patterns: Sequence[str] = tuple(PATTERNS),
) -> dict[str, Any]:
    """Simulate `runs` equal and `runs` worse canaries of each pattern, and print the shares that are taken back. Returns them
    by pattern. Raises UsageError for a pattern that there is not, and ShoalError where a share is not as it is to be."""
    if not patterns or set(patterns) - set(PATTERNS):
        raise UsageError("--patterns", got=list(patterns), allowed=[*PATTERNS])
    table = Table("traffic", "equal, taken back", "worse by 10 points, taken back", "after people (median)")
    found = dict[str, Any]()
    with ProcessPoolExecutor(cores()) as pool:
        for pattern in patterns:
            of = [(pattern, worse, seed, shadows, people) for worse in (0.0, WORSE) for seed in range(runs)]
            ends = list(pool.map(_one, of, chunksize=5))
            equal, worse = ends[:runs], ends[runs:]
            after = [seen for back, seen in worse if back]
            found[pattern] = {
                "equal_taken_back": sum(back for back, _ in equal) / runs,
                "worse_taken_back": sum(back for back, _ in worse) / runs,
                "after_people": statistics.median(after) if after else None,
            }
            one = found[pattern]
            shares = (f"{one['equal_taken_back']:.1%}", f"{one['worse_taken_back']:.1%}")
            table.add_row(pattern, *shares, str(one["after_people"]))
    table.add_row("target", f"{EQUAL_MOST:.0%} or less", f"{WORSE_LEAST:.0%} or more", "", style="bold")
    show(console, [table], {"runs": runs, "shadows": shadows, "people": people, "patterns": found})
    missed = [
        name
        for name, one in found.items()
        if one["equal_taken_back"] > EQUAL_MOST or one["worse_taken_back"] < WORSE_LEAST
    ]
    if missed:
        raise ShoalError("a share is not as it is to be", got=", ".join(missed), do="see the table")
    return found
