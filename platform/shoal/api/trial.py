"""A canary as a gateway sees it: what it is asked, how long it is waited for, and what it and the stable version did."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from shoal.api.client import EngineClient
from shoal.api.meter import Meter
from shoal.config import FULL
from shoal.engine.events import Event, Request
from shoal.errors import EngineDeadError
from shoal.loop.canary import Decision, Pace, judged
from shoal.loop.canary_state import Canary
from shoal.loop.evidence import VOTER, Evidence, Person

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


@dataclass(frozen=True)
class Part:
    """Of a conversation in a trial: where its answers count."""

    key: str | None  # of a person in the evidence; None: they do not
    first: bool = False  # it begins the conversation
    who: str = ""  # hash of who asks, or of the conversation where a request names nobody


NOWHERE = Part(None)


class Trial:
    """A canary as the gateway sees it: where it is, and what it has done so far."""

    def __init__(self, client: Weighed, label: str, canary: Canary, pace: Pace) -> None:
        """`pace`: of the stable version."""
        self.client, self.label, self.canary, self.pace = client, label, canary, pace
        self.evidence = Evidence()  # of all gateways, as far as this one has heard of it
        self.running = 0  # requests that are with it
        self.decided: tuple[Decision, str] = ("wait", "")
        self.shadowing: asyncio.Task[None] | None = None
        # answers, the newest last -> label of the version, the step, the key that asked, and who did
        self.answered: dict[str, tuple[str, int, str, str]] = {}
        self._voters: dict[tuple[int, str], str] = {}  # step, and who was answered -> who voted on that first
        self._talks: dict[bytes, int] = {}  # that were heard of, the newest last -> the step that they began in

    def takes(self, conversation: bytes) -> bool:
        """Whether a conversation is the canary's."""
        drawn = int.from_bytes(
            hashlib.blake2b(conversation, digest_size=8, key=self.label.encode()[:64]).digest(), "big"
        )
        return drawn < self.canary.share * 2**64

    def go_on(self, canary: Canary) -> None:
        """Another step, or the same with other bounds. What condemned it before stands."""
        self.canary, self.decided = canary, self.decided if self.decided[0] == "back" else ("wait", "")

    def hear(self, others: Mapping[str, Person]) -> None:
        """What the other gateways have counted so far, all in all. What condemned it before stands."""
        if others != self.evidence.others:
            self.evidence.hear(others)
            self._judge()

    def _judge(self) -> None:
        if self.decided[0] != "back":
            self.decided = judged(self.canary, self.evidence)

    def part(self, talk: bytes, person: str, *, canary: bool, api_key: str = "") -> Part:
        """Where a request of this conversation counts, at the canary or the stable version. `person`: who asks; "" where nobody
        says so: then each conversation is of another. One that began before this step counts for nobody in it. `api_key`: what
        tells the key from others; "" without keys."""
        first = self.begins(talk)
        who = self._hash(person.encode("utf-8", "surrogatepass") if person else talk).hex()
        if self._talks[self._hash(talk)] != self.canary.step:
            return Part(None, who=who)
        see, of = self.evidence.part, self._key(api_key)
        return Part(see(self.canary.step, who, self._hash(talk), canary=canary, at=time.time(), api_key=of), first, who)

    def begins(self, talk: bytes) -> bool:
        """Whether nothing of this conversation was asked before."""
        key = self._hash(talk)
        began = self._talks.pop(key, None)
        self._talks[key] = self.canary.step if began is None else began
        if len(self._talks) > REMEMBERED:
            del self._talks[next(iter(self._talks))]
        return began is None

    def _hash(self, what: bytes) -> bytes:
        """The same at each gateway."""
        return hashlib.blake2b(what, digest_size=8, key=self.label.encode()[:64]).digest()

    def _key(self, api_key: str) -> str:
        return self._hash(api_key.encode()).hex()[:8] if api_key else ""

    def count(self, meter: Meter, part: Part, *, stable: bool, failed: bool = False) -> None:
        """A request has ended at one of the two versions."""
        if part.key is not None:
            self.evidence.see(part.key, "failures", failed)
            if not failed:
                self._count_answer(part.key, meter)
            if not failed and part.first:
                self._count_worth(part.key, meter)
        if not stable:
            self._judge()

    def remember(self, answer: str, version: str, api_key: str, who: str) -> None:
        """That an answer was given by this version, to `who`, which may be voted on."""
        self.answered[answer] = version, self.canary.step, api_key, who
        if len(self.answered) > REMEMBERED:
            del self.answered[next(iter(self.answered))]

    def vote(self, answer_id: str, person: str | None, rating: str | None) -> None:
        """A person rates an answer that is `answered`, or withdraws that. The person's first answer of a step counts, and on it
        the newest vote; who has no name is one person. Of those who vote on what one was answered the first counts: a version
        is drawn for who asks, however many names there are to vote by. Of copies and their originals none counts: nobody reads
        the copies."""
        label, step, api_key, asker = self.answered[answer_id]
        if not step:
            return
        answer, who = answer_id.encode(), self._hash(f"{person}".encode()).hex()
        if self._voters.setdefault((step, asker), who) != who:
            return
        if len(self._voters) > REMEMBERED:
            del self._voters[next(iter(self._voters))]
        see, of = self.evidence.part, self._key(api_key)
        key = see(step, f"{VOTER}{who}", answer, canary=label == self.label, at=time.time(), api_key=of)
        if key is not None:
            self.evidence.unsee(key, "down")
            if rating is not None:
                self.evidence.see(key, "down", rating == "down")
            self._judge()

    def called(self, valid: bool, part: Part) -> None:
        """An answer that was counted has calls of tools, all of them `valid` or not. Of copies and originals none counts."""
        if part.key is not None and part.key[0] != "0":
            self.evidence.see(part.key, "wrong", not valid)
            self._judge()

    def _count_answer(self, key: str, meter: Meter) -> None:
        self.evidence.see(key, "invalid", meter.invalid)
        slow = None if meter.times is None else self.pace.is_slow(*meter.times)
        if slow is not None:
            self.evidence.see(key, "slow", slow)

    def _count_worth(self, key: str, meter: Meter) -> None:
        self.evidence.see(key, "cut", meter.cut)
        unsure = self.pace.is_unsure(meter.nll, len(meter.tokens))
        if unsure is not None:
            self.evidence.see(key, "unsure", unsure)

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
