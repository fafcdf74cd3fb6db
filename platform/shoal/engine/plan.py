"""What passes between the scheduler and the runner: a `Plan` of `Work` goes down, an `Outcome` comes up.

Nobody changes a `Work` or a `Sampled` once made. They are not declared frozen because of what that costs: 2.7 us to make one in
place of 0.5, and every row of every step makes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.engine.events import Signals, TokenLogprob
from shoal.engine.running import Running
from shoal.errors import RequestError

Span = tuple[int, int, int]  # layers of an exit, and from which row on, and up to which, it gave an answer its tokens


@dataclass(eq=False)
class Work:
    """Rows `start` .. `start + count` - 1 of one request, run through layer groups `first` .. `last` - 1. With `first` = 1
    the rows' states after group 1 are taken from `running.holding.states`; `first` = `last` = 1 only reads the head."""

    running: Running
    start: int
    count: int
    first: int
    last: int
    hold: bool = False  # keep the states after group 1: the depth is not decided yet
    decide: bool = False  # these rows are the prompt's last, so the router decides now
    sample: bool = False  # the last row gives the next token
    score: bool = False  # each row of the prompt but its last gives the logprob of the token after it
    drafts: int = 0  # tokens to draft ahead of this one row at most (`speculative.py`)
    verify: bool = False  # the rows are a token and the drafts after it, and each gives a token
    audit: bool = False  # of an answer that was told already, which full depth looks at (`audits.py`) ...
    spans: Sequence[Span] = ()  # ... at these of its rows

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def reach(self) -> int:
        """The end of what it writes: drafts included."""
        return self.end + self.drafts

    @property
    def scored(self) -> int:
        """How many of its first rows are followed by a token of the prompt."""
        return min(self.end, self.running.prompt_len - 1) - self.start


def next_work(running: Running, room: int, drafts: int) -> Work:
    """The next rows of `running`, at most `room`; where it decodes, `drafts` tokens may be drafted ahead."""
    at, states_from, total = running.holding.at, running.holding.states_from, len(running.tokens)
    if running.groups is None:
        count = min(running.todo, room)
        return Work(running, at, count, 0, 1, hold=True, decide=at + count == total)
    first, end = 0, total
    if states_from is not None:
        if at >= states_from:
            first = 1
        else:  # deeper groups found less in the prefix cache than group 1 did: its states are made again
            end = states_from
    count = min(end - at, room)
    score = running.scoring and at < running.prompt_len - 1
    drafts = drafts if running.decoding else 0
    return Work(running, at, count, first, running.groups, sample=at + count == total, score=score, drafts=drafts)


@dataclass(frozen=True)
class Plan:
    """One step. Works are sorted by depth, deepest first, so that each group runs on a prefix of the rows. `shallow`: the
    deeper requests that decode were left out."""

    works: list[Work]
    shallow: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """Layer groups that run, and rows summed over them."""
        groups = max(work.last for work in self.works) - min(work.first for work in self.works)
        drafts = max(work.drafts for work in self.works)  # group 1 runs once more for each
        rows = sum((work.count + work.drafts) * (work.last - work.first) for work in self.works)
        return max(1, groups + drafts), rows

    @property
    def audit(self) -> Work | None:
        """What full depth does for an answer that was told already: one a step, the only work of none that is live."""
        return next((work for work in self.works if work.audit), None)

    @property
    def samples(self) -> list[Work]:
        return [work for work in self.works if work.sample]

    @property
    def decisions(self) -> list[Work]:
        return [work for work in self.works if work.decide]

    @property
    def scores(self) -> list[Work]:
        return [work for work in self.works if work.score]


@dataclass
class Sampled:
    """The next token of one request, or why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: RequestError | None = None
    after: tuple[Sampled, ...] = ()  # the tokens that follow it, where drafts were right
    drafted: int = 0  # how many drafts there were
    nll: float | None = None  # of the token, where it was looked at (`signals.py`)
    spent: float = 0.0  # nats, where it is a draft that full depth would not have said (`tolerance.py`)
    gaps: tuple[float, ...] = ()  # [A] nats that each early exit loses here, where that is asked for (`Request.gaps`)


@dataclass(frozen=True)
class Decision:
    """The router's depth in layers, and the sums of each prompt page that had none (kept beside the page)."""

    layers: int
    notes: Sequence[Any] = ()
    signals: Signals | None = None  # what the router saw and predicted


@dataclass(frozen=True)
class Outcome:
    """What a step gave, in the order of `plan.samples`, `plan.decisions` and `plan.scores`."""

    samples: Sequence[Sampled]
    decisions: Sequence[Decision] = ()
    scores: Sequence[Sequence[TokenLogprob]] = ()  # of the prompt's tokens after its `scored` rows
    lost: Sequence[float] = ()  # nats, at each row in the spans of `plan.audit`; NaN where the model gave no number
