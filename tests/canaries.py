"""Evidence of canaries, as people would have made it."""

from __future__ import annotations

from itertools import count

from shoal.loop.evidence import Evidence

NAMES = count()
SIDES = ("stable", "canary")


def add(evidence: Evidence, side: str, people: int, step: int = 3, **bad: int | tuple[int, int]) -> Evidence:
    """`people` more had answers of `side` in a step, and so many of them something `bad` of a kind (or so many of so many who
    could); returns the evidence."""
    keys = []
    for _ in range(people):
        key = evidence.part(step, str(next(NAMES)), b"", canary=side == "canary", at=0.0)
        assert key is not None
        keys.append(key)
    told = {"failures": 0, "invalid": 0, "slow": 0, **bad}
    for kind, how_many in told.items():
        some, of = how_many if isinstance(how_many, tuple) else (how_many, people)
        for place, key in enumerate(keys[:of]):
            evidence.see(key, kind, place < some)
    return evidence


def both(people: tuple[int, int], step: int = 3, **bad: tuple[int, int]) -> Evidence:
    """So many people of a canary and of the stable version, and how many of each had something `bad` of a kind."""
    found = Evidence()
    for at, side in enumerate(("canary", "stable")):
        add(found, side, people[at], step, **{kind: each[at] for kind, each in bad.items()})
    return found


def seen(evidence: Evidence, side: str, kind: str = "failures") -> tuple[int, int]:
    """How many people could have had something bad of that kind, and how many had."""
    found = evidence.table()[side][kind]
    return found["of"], found["bad"]
