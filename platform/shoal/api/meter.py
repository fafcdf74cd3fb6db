"""One request as it went at one version, and what is left of it to do at another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from shoal.engine.events import Event, Finished, Request, Token
from shoal.errors import DeadlineError

ENDLESS = 16  # times the same token at the end of an answer that is none


@dataclass
class Meter:
    """One request as it went at one version."""

    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)
    told: Token | None = None  # the last of them
    left: float = 0.0  # when it went on at another version
    cut: bool = False  # it was ended by its length
    nll: float | None = None  # nats of a sample of its tokens

    def take(self, events: list[Event]) -> None:
        self.last = time.monotonic()
        for event in events:
            if isinstance(event, Token):
                self.first = self.first or self.last
                self.tokens.append(event.token)
                self.told = event
            elif isinstance(event, Finished):
                self.cut = event.reason == "length"
                self.nll = None if event.signals is None else event.signals.answer_nll

    @property
    def times(self) -> tuple[float, float | None] | None:
        """Seconds to the first token, and of each after it; None without one."""
        if self.first is None:
            return None
        more = len(self.tokens) - 1
        return self.first - self.began, (self.last - self.first) / more if more > 0 else None

    @property
    def invalid(self) -> bool:
        """No token at all, or one that goes on and on."""
        return not self.tokens or (len(self.tokens) >= ENDLESS and len({*self.tokens[-ENDLESS:]}) == 1)

    def rest(self, request: Request) -> Request:
        """What is left to do of `request`. Raises DeadlineError when its time is over."""
        left = None if request.deadline is None else request.deadline - (time.monotonic() - self.began)
        if left is not None and left <= 0:
            raise DeadlineError("the request ran out of its time", param="deadline", got=request.deadline)
        again = replace(request, id=f"{request.id}.stable", deadline=left, priority=request.sooner)
        self.left = time.monotonic()
        return again if self.told is None else again.after(self.tokens, self.told)

    def ours(self, event: Event, request: Request) -> Event:
        """An event of `rest` as one of `request`."""
        if isinstance(event, Token):
            return replace(event, request=request.id)
        before = self.left - self.began
        first = event.first_token_seconds + before if self.first is None else self.first - self.began
        return replace(event, request=request.id, first_token_seconds=first, total_seconds=event.total_seconds + before)
