"""What is refused at submission: what can never fit, what finds the queue full, and what would come too late."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from shoal.config import GROUPS
from shoal.engine.metrics import Metrics
from shoal.engine.pace import Pace
from shoal.engine.pages import Pages
from shoal.engine.running import Running
from shoal.engine.shares import clearly_before, may_wait
from shoal.errors import DeadlineError, QueueFullError, RequestError


class Door:
    """Refuses by what the pool holds and what `pace` has measured."""

    def __init__(self, pages: Pages, pace: Pace, metrics: Metrics) -> None:
        self._pages, self._pace, self._metrics = pages, pace, metrics
        self._turned_away = 0  # requests refused for a full queue, less those admitted since
        self._deadlines: list[tuple[float, int, str]] = []  # when, and whose: a request's number and id

    def must_fit(self, running: Running) -> None:
        """Raises RequestError for a size that can never fit."""
        stored = running.prompt_len + running.sampling.max_tokens - 1  # the last token's K/V is never needed
        groups = GROUPS if running.groups is None or running.look is not None else running.groups
        need = running.holding.pages_for(stored) * groups
        if need > self._pages.total:
            raise RequestError(
                "the request can never fit the KV memory", param="max_tokens",
                got=f"{need} units", allowed=f"at most {self._pages.total}", do="ask for fewer tokens or less depth",
            )  # fmt: skip

    def full(self, live: int) -> QueueFullError:
        """The error of a request that finds no place beside the `live` ones, with a time to come back."""
        self._turned_away += 1
        self._metrics.refused += 1
        error = QueueFullError("the queue is full", got=f"{live} requests", do="try again later")
        error.retry_after = self._pace.wait(self._turned_away)  # the n-th for the n-th place that becomes free
        return error

    def gives_place(self, running: Running, runs: Sequence[Running], waiting: Sequence[Running], live: int) -> Running:
        """Which gives its place to `running` where `live` requests have all: of what may wait for it, the last that has had
        nothing, or else waits, or else `runs`; without such, the last of the `waiting`, in order, that has had nothing, where
        `running` ranks clearly before it. Raises QueueFullError."""
        later = [] if may_wait(running) else [other for other in (*runs, *waiting) if may_wait(other)]
        if later:
            return next((other for other in reversed(later) if other.fresh), later[-1])
        last = next((other for other in reversed(waiting) if other.fresh), None)
        if last is None or last.order[0] < running.order[0] or not clearly_before(running, last):
            raise self.full(live)
        return last

    def must_be_in_time(self, running: Running, ahead: int, rows: int) -> None:
        """Raises DeadlineError for a request that `ahead` others come before, where its deadline is out of reach; `rows`: of a
        step, which may get fewer."""
        deadline = running.request.deadline
        if deadline is not None and (soonest := self._soonest(running, ahead, rows)) > deadline:
            self._metrics.refused += 1
            raise DeadlineError(
                "the deadline is out of reach", param="deadline", got=deadline,
                allowed=f"{soonest:.2f} s or more at present", do="give it more time, or try again later",
            )  # fmt: skip

    def came_in(self, running: Running) -> None:
        """Note when the time of `running` is over."""
        if running.request.deadline is not None:
            heapq.heappush(self._deadlines, (running.arrival + running.request.deadline, running.number, running.id))

    def late(self, now: float) -> Iterator[tuple[int, str]]:
        """Number and id of each request whose time is over `now`; it may have ended before. Each is named once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)[1:]

    def passed(self, now: float, waiting: int) -> None:
        """A request was admitted, and `waiting` still wait."""
        self._pace.enters(now, waiting)
        self._turned_away = max(0, self._turned_away - 1)

    def _soonest(self, running: Running, ahead: int, most: int) -> float:
        """Seconds that `running` must expect to wait for its first token: those before it in the queue, then its prompt through
        the groups that it is known to need, `most` rows a step. 0 while nothing has been measured."""
        holding = running.holding
        holding.extend_keys(self._pages)
        rows = max(1, len(running.tokens) - self._pages.peek(0, holding.keys)[0] * holding.page)
        groups, steps = running.groups or 1, -(-rows // most)
        return (self._pace.wait(ahead) or 0.0) + (self._pace.seconds(groups * steps, groups * rows) or 0.0)
