"""A canary as a gateway sees it: what it is asked, how long it is waited for, and what it and the stable version did."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol

from shoal.api.client import EngineClient
from shoal.api.meter import Meter
from shoal.config import FULL
from shoal.engine.events import Event, Request
from shoal.errors import EngineDeadError
from shoal.loop.canary import Canary, Decision, Evidence, Pace, Tally, added, judged

LATE_SECONDS = 2.0  # least patience with a canary
LATE_TIMES = 10.0  # the patience, in times of the stable version's 95th percentile to a first token
UNKNOWN_SECONDS = 30.0  # the patience while nothing is known of the stable version
REMEMBERED = 10_000  # answers that may be voted on

OnBegun = Callable[[str], None]


class Weighed(EngineClient, Protocol):
    """An engine that says with which weights it answers."""

    def batches(self, request: Request, on_begun: OnBegun | None = None) -> AsyncIterator[list[Event]]:
        """As `EngineClient`; `on_begun` is called before the first events, with what the engine's `info` calls its weights."""

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int = FULL,
        *,
        payer: str = "",
        client: str = "",
        priority: int = 0,
        adapter: str = "",
        on_begun: OnBegun | None = None,
    ) -> list[list[float]]:
        """As `EngineClient`; `on_begun` as of `batches`, before it returns."""


class Trial:
    """A canary as the gateway sees it: where it is, and what it has done so far."""

    def __init__(self, client: Weighed, label: str, canary: Canary, pace: Pace) -> None:
        """`pace`: of the stable version."""
        self.client, self.label, self.canary, self.pace = client, label, canary, pace
        self.evidence = Evidence()  # of all gateways, as far as this one has heard of it
        self._elsewhere = Evidence()  # what of it others counted
        self.running = 0  # requests that are with it
        self.decided: tuple[Decision, str] = ("wait", "")
        self.shadowing: asyncio.Task[None] | None = None
        self._votes: dict[tuple[str, str | None], str] = {}  # (answer, person) -> the newest rating
        self._talks: dict[bytes, None] = {}  # that were heard of, the newest last

    def takes(self, conversation: bytes) -> bool:
        """Whether a conversation is the canary's."""
        drawn = int.from_bytes(
            hashlib.blake2b(conversation, digest_size=8, key=self.label.encode()[:64]).digest(), "big"
        )
        return drawn < self.canary.share * 2**64

    def go_on(self, canary: Canary) -> None:
        """Another step, or the same with other bounds. What condemned it before stands."""
        if canary.step != self.canary.step:
            self.evidence.step = self._elsewhere.step = 0
        self.canary, self.decided = canary, self.decided if self.decided[0] == "back" else ("wait", "")

    @property
    def own(self) -> Evidence:
        """What this gateway counted."""
        return added(self.evidence, self._elsewhere, -1)

    def hear(self, elsewhere: Evidence) -> None:
        """What the other gateways have counted so far, all in all. What condemned it before stands."""
        if elsewhere == self._elsewhere:
            return
        self.evidence, self._elsewhere = added(self.own, elsewhere), elsewhere
        if self.decided[0] != "back":
            self.decided = judged(self.canary, self.evidence)

    def is_first(self, talk: bytes) -> bool:
        """Whether a request begins a talk: those that follow are no evidence of their own of what answers are worth."""
        key = hashlib.blake2b(talk, digest_size=8).digest()
        known = key in self._talks
        self._talks[key] = None
        if len(self._talks) > REMEMBERED:
            del self._talks[next(iter(self._talks))]
        return not known

    def count(self, meter: Meter, *, stable: bool, failed: bool = False, first: bool = False) -> None:
        """A request has ended at one of the two versions; `first` of its talk."""
        tally = self.evidence.stable if stable else self.evidence.canary
        tally.requests += 1
        tally.failures += failed
        if not failed:
            self._count_answer(tally, meter)
        if not failed and first:
            self._count_worth(tally, meter)
        if not stable:
            self.evidence.step += 1
            self.decided = judged(self.canary, self.evidence)

    def vote(self, label: str, by: tuple[str, str | None], rating: str | None) -> None:
        """A person rates an answer that the version `label` gave during the trial, `by` (answer, person), or withdraws that:
        the newest counts."""
        tally = self.evidence.canary if label == self.label else self.evidence.stable
        for one, sign in ((self._votes.pop(by, None), -1), (rating, 1)):
            if one is not None:
                tally.votes += sign
                tally.down += sign * (one == "down")
        if rating is not None:
            self._votes[by] = rating
        self.decided = judged(self.canary, self.evidence)

    def called(self, valid: bool, *, stable: bool) -> None:
        """An answer that was counted has calls of tools, all of them `valid` or not."""
        tally = self.evidence.stable if stable else self.evidence.canary
        tally.called += 1
        tally.wrong += not valid
        if self.decided[0] != "back":
            self.decided = judged(self.canary, self.evidence)

    def _count_answer(self, tally: Tally, meter: Meter) -> None:
        tally.invalid += meter.invalid
        if meter.times is None:
            return
        slow = self.pace.is_slow(*meter.times)
        if slow is not None:
            tally.timed += 1
            tally.slow += slow

    def _count_worth(self, tally: Tally, meter: Meter) -> None:
        tally.talks += 1
        tally.cut += meter.cut
        unsure = self.pace.is_unsure(meter.nll, len(meter.tokens))
        if unsure is not None:
            tally.heard += 1
            tally.unsure += unsure

    async def patient(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """The canary's events. Raises EngineDeadError when one is late."""
        self.running += 1
        lists = self.client.batches(request)
        try:
            while True:
                patience = min(self.pace.patience(LATE_SECONDS, LATE_TIMES), UNKNOWN_SECONDS)
                try:
                    async with asyncio.timeout(patience):
                        events = await anext(lists, None)
                except TimeoutError:
                    raise EngineDeadError("the canary is late", got=f"silence for {patience:.1f} s") from None
                if events is None:
                    return
                yield events
        finally:
            self.running -= 1
            if isinstance(lists, AsyncGenerator):
                await lists.aclose()
