"""A version on trial, as a release keeps it. What judges it (`canary`) needs numpy, which `shoal --help` does not load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.errors import UsageError

SHARES = (0.0, 0.05, 0.25, 0.5)  # of the conversations, by step; step 0: copies
SHADOWS, PEOPLE = 200, 300  # that a step takes at least
# that it may take: of those that a gateway keeps (`evidence`) so many surely are a canary's
MOST_SHADOWS, MOST = 9_000, 900


@dataclass(frozen=True)
class Canary:
    """A version on trial, as ``release.json`` keeps it."""

    version: int
    step: int  # index into `SHARES`
    since: str  # time of the step, ISO 8601
    shadows: int = SHADOWS
    people: int = PEOPLE
    began: int = 0  # number of the change that it began with: what tells it from a trial of the same version before

    def __post_init__(self) -> None:
        least = min(self.shadows, self.people)
        if least < 1:
            raise UsageError("people that a step of a canary takes", got=least, allowed="1 or more")

    def same(self, other: Canary | None) -> bool:
        """Whether that is a step of the same trial."""
        return other is not None and (self.version, self.began) == (other.version, other.began)

    @property
    def share(self) -> float:
        return SHARES[self.step]

    @property
    def enough(self) -> int:
        """People that its step takes at least."""
        return self.people if self.step else self.shadows


def need_few(shadows: int, people: int) -> None:
    """Raises UsageError for a step of more people than are kept of it, which would never end."""
    for what, got, most in (("shadows", shadows, MOST_SHADOWS), ("people", people, MOST)):
        if got > most:
            raise UsageError(f"{what} that a step of a canary takes", got=got, allowed=f"1 to {most}")


def with_people(state: dict[str, Any]) -> dict[str, Any]:
    """What a release's file says, by the names of now: until people were counted a step took so many requests."""
    canary = state.get("canary") or {}
    if "requests" not in canary:
        return state
    return {**state, "canary": {"people": canary["requests"], **{n: v for n, v in canary.items() if n != "requests"}}}
