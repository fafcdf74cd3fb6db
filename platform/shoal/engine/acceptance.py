"""How often drafts stand, learned over answers: what an answer's own drafts have not told yet, those of answers like it have.

Alike are answers of one way (depth, greedy or drawn, guided or not, tolerance), and more so those whose prompts begin alike:
by the first few tokens a task is told, and by some more an application's instructions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

BEGINNINGS = (4, 16)  # tokens of a prompt that tell a kind: of a task, and of an application
KINDS = 1024  # that are remembered, those that were asked for last
START = 0.75  # share of drafts that is thought to stand where nothing is known
# drafts that count as much as all that is known of wider kinds: answers of a task are more alike than few drafts tell, and an
# answer that is given up for a few that failed by chance says nothing more (decision 0009)
SEEN = 8.0
WINDOW = 60.0  # drafts of a kind that are remembered
TRIES = 0.004  # share of the time that a kind's tries lose, each being waited for as long as makes it so
# the same of the time of its own answers alone: of sixteen, one that tries makes a step take half as long again, and of answers
# of five steps, tried whenever they come, that is a tenth
OWN = 0.015
# steps, whose time the answers of a task may lose at most after they have gained more: of two, chance leaves nothing after
# some dozen steps, and what pays would then wait for a hundred
CREDIT = 8.0
SHARED = 1.0  # steps, whose time all others may lose at most of what is gained beyond that


class Stood:
    """Of drafts that were verified, how many stood. The last failed or was the last of its step: of those behind it nothing is
    known."""

    __slots__ = ("good", "tried")

    def __init__(self) -> None:
        self.good = self.tried = 0.0

    def add(self, good: int, tried: int) -> None:
        self.good, self.tried = self.good + good, self.tried + tried

    def share(self, before: float, without: Stood | None = None) -> float:
        """The share that stands, where `before` is what is known beside these, `without` those that are among them."""
        good, tried = self.good, self.tried
        if without is not None:
            tried = max(0.0, tried - without.tried)
            good = min(tried, max(0.0, good - without.good))
        return (good + SEEN * before) / (tried + SEEN)


class Kind(Stood):
    """Drafts of answers that are alike, the last `WINDOW` of them, and what they have gained."""

    __slots__ = ("added", "after", "again", "gained", "left", "step", "time")

    def __init__(self) -> None:
        super().__init__()
        self.added = 0  # times that something was learned of it
        self.left = 0.0  # steps without drafts: what drafting has gained here and may lose again
        self.again = 0  # the step from which on a try may be made ...
        self.time = 0.0  # steps in which its answers could draft, by their share of all answers in each
        self.after = 0.0  # ... and from when on by `time`
        self.step = 0  # the last in which its answers drafted ...
        self.gained = 0.0  # ... and what all of them gained in it

    def add(self, good: int, tried: int) -> None:
        super().add(good, tried)
        self.added += 1
        if self.tried > WINDOW:
            self.good, self.tried = self.good * WINDOW / self.tried, WINDOW

    def wait(self, steps: float, now: int) -> None:
        """Take in that one of its answers gained the time of so many `steps` by its drafts in the step `now`, or lost it: the
        next try waits for what all of them have lost there, in whatever order they are told."""
        if now != self.step:
            self.step, self.gained = now, 0.0
        self.gained += steps
        lost = max(0.0, -self.gained)
        self.again, self.after = now + int(lost / TRIES), self.time + lost / OWN

    def due(self, now: int) -> bool:
        """May a try be made in the step `now`?"""
        return now >= self.again and self.time >= self.after


class Record:
    """What is known of one answer's drafts."""

    __slots__ = ("_found", "_when", "kinds", "most", "own", "task")

    def __init__(self, most: int, kinds: Sequence[Kind]) -> None:
        """`most` tokens are drafted ahead; `kinds`: from the widest to the narrowest, the second being its task's."""
        self.most, self.kinds, self.task, self.own = most, kinds, kinds[1], Stood()
        self._found, self._when = START, -1  # the share, and how much was known of the widest kind then

    def add(self, good: int, tried: int) -> None:
        """Take in a step: of its drafts `tried` were looked at, of which `good` stood."""
        self.own.add(good, tried)
        for kind in self.kinds:
            kind.add(good, tried)

    def earn(self, steps: float, now: int) -> float:
        """Take in that drafts of the step `now` gained the time of so many `steps`, or lost it. Returns what they lost beyond
        what had been gained: a number of steps, at most 0."""
        all_, task = self.kinds[0], self.task
        task.wait(steps, now)
        task.left += steps
        if task.left > CREDIT:
            all_.left = min(SHARED, all_.left + task.left - CREDIT)
            task.left = CREDIT
        elif task.left < 0:
            all_.left, task.left = all_.left + task.left, 0.0
        beyond = min(0.0, all_.left)
        all_.left -= beyond
        return beyond

    @property
    def credit(self) -> bool:
        """May its drafts lose something that has been gained?"""
        return self.task.left > 0 or self.kinds[0].left > 0

    @property
    def share(self) -> float:
        """The share of its drafts that will stand. What is learned of any of its kinds is learned of the widest: until then it
        is as it was, for hundreds of steps where nobody drafts."""
        known = self.kinds[0].added
        if known != self._when:
            share = START
            for kind in self.kinds:
                share = kind.share(share, self.own)
            self._found, self._when = self.own.share(share), known
        return self._found


class Kinds:
    """All kinds that are remembered."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()

    def of(self, way: Hashable, prompt: Sequence[int]) -> list[Kind]:
        """Those of an answer, from the widest to the narrowest: of its `way`, then with more and more of its `prompt`."""
        return [self._kind((way, count, *prompt[:count])) for count in (0, *BEGINNINGS)]

    def _kind(self, key: Hashable) -> Kind:
        if (found := self._kinds.get(key)) is None:
            found = self._kinds[key] = Kind()
            if len(self._kinds) > KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return found
