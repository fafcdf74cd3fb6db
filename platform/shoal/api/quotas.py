"""What keys have left, counted in one place where several gateways serve them.

    Quotas   the count: plain Python, in a process of its own (`on_ray.quotas`)
    Shared   of one gateway: asks it before each request of a limited key, and tells it of tokens and of ends

A gateway that the count does not know, since one of the two is new, joins first: with the requests that run there, and what it
last knew was left of each minute. So a count that starts anew goes on where the other was. Who says nothing for
`SILENT_SECONDS` has died, and holds nothing any more.

Where the count does not answer within `PATIENCE_SECONDS`, each gateway keeps the limits by itself until it does. That errs
towards answering: nobody waits who need not, and a key has at most its limits at each gateway. A request that has to be asked
about again, since a gateway joined meanwhile, may be counted twice in its minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from shoal.api.auth import Bucket, Clock, Key, parsed
from shoal.api.wire import RateLimitError

PATIENCE_SECONDS = 1.0  # with the count, before a request is admitted without it
START_SECONDS = 30.0  # for the process that counts to be there, before a gateway serves without it
TELL_SECONDS = 0.25  # between two reports of tokens
BEAT_SECONDS = 1.0  # between two reports of a gateway that has nothing to say
SILENT_SECONDS = 10.0  # then a gateway's requests have ended with it
FULL_SECONDS = 0.05  # before a full key is asked about once more: an end may be on its way from elsewhere

log = logging.getLogger("shoal.api")


@dataclass(frozen=True)
class Held:
    """What a gateway that joins knows of a key."""

    taken: int = 0  # its requests that run there
    requests: float | None = None  # what was left of its minute; None: it has no such limit
    tokens: float | None = None


@dataclass(frozen=True)
class Left:
    """What a key has left at all gateways together; of one more request also why it is refused, if it is."""

    requests: float | None
    tokens: float | None
    elsewhere: int  # its requests that run at other gateways
    refusal: RateLimitError | None = None


class Quotas:
    """The count. Keys go by their lines, as in a file; gateways by any name of their own."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._held: dict[str, Counter[str]] = {}  # gateway -> line -> requests that run there
        self._heard: dict[str, float] = {}
        self._last = clock()  # that anybody was heard

    @property
    def idle(self) -> float:
        """Seconds since any gateway said anything."""
        return self._clock() - self._last

    def join(self, gateway: str, held: Mapping[str, Held]) -> None:
        """`gateway` is there, with what it holds; of what two know of a minute the lesser counts."""
        self._last = self._heard[gateway] = self._clock()
        self._held[gateway] = Counter()
        for line, told in held.items():
            key = self._key(line)
            self._held[gateway][line] = told.taken
            for bucket, level in ((key.requests, told.requests), (key.tokens, told.tokens)):
                if bucket is not None and level is not None:
                    bucket.level = min(bucket.level, level)

    def admit(self, gateway: str, line: str) -> Left | None:
        """Counts a request of a key, or says why not; None: `gateway` is to join first."""
        if not self._knows(gateway):
            return None
        key, refusal = self._key(line), None
        if key.places is not None:
            key.places.taken = self._taken(line)
        try:
            key.admit()
        except RateLimitError as error:
            refusal = error
        else:
            self._held[gateway][line] += key.places is not None
        return self._left(gateway, line, refusal)

    def come(self, gateway: str, line: str) -> None:
        """`gateway` admitted a request by itself, after it had said what it holds."""
        held, key = self._held.get(gateway), self._key(line)
        if held is not None:
            held[line] += key.places is not None
            if key.requests is not None:
                key.requests.spend(1)

    def leave(self, gateway: str, line: str) -> None:
        """A request that was admitted has ended."""
        held = self._held.get(gateway)
        if held is not None and held[line] > 0:
            held[line] -= 1

    def refund(self, gateway: str, line: str) -> None:
        """A request that was admitted was refused after all: it is none of its minute."""
        key = self._keys.get(line)
        if key is not None and key.requests is not None:
            key.requests.spend(-1)

    def tell(self, gateway: str, spent: Mapping[str, int]) -> dict[str, Left] | None:
        """Counts the tokens of each key, and returns what all these have left; None as of `admit`."""
        if not self._knows(gateway):
            return None
        for line, tokens in spent.items():
            if tokens:
                self._key(line).spend(tokens)
        found = {line: self._left(gateway, line) for line in spent}
        self._forget()
        return found

    def _knows(self, gateway: str) -> bool:
        now = self._clock()
        for name in [name for name, heard in self._heard.items() if now - heard > SILENT_SECONDS]:
            del self._heard[name], self._held[name]
        if gateway not in self._heard:
            return False
        self._last = self._heard[gateway] = now
        return True

    def _key(self, line: str) -> Key:
        if line not in self._keys:
            self._keys[line] = parsed(line, 1, self._clock)
        return self._keys[line]

    def _taken(self, line: str) -> int:
        return sum(held[line] for held in self._held.values())

    def _left(self, gateway: str, line: str, refusal: RateLimitError | None = None) -> Left:
        key = self._key(line)
        elsewhere = self._taken(line) - self._held[gateway][line]
        return Left(_level(key.requests), _level(key.tokens), elsewhere, refusal)

    def _forget(self) -> None:
        """Drop keys of which there is nothing to know."""
        for line in [line for line, key in self._keys.items() if _is_whole(key) and not self._taken(line)]:
            del self._keys[line]
        for held in self._held.values():
            for line in [line for line, count in held.items() if not count]:
                del held[line]


class Link(Protocol):
    """A gateway's way to the count: its methods, whose calls arrive in the order in which they are made. Raises whatever it
    raises where there is no count."""

    def join(self, gateway: str, held: Mapping[str, Held]) -> Awaitable[None]: ...

    def admit(self, gateway: str, line: str) -> Awaitable[Left | None]: ...

    def tell(self, gateway: str, spent: Mapping[str, int]) -> Awaitable[dict[str, Left] | None]: ...

    def come(self, gateway: str, line: str) -> None:
        """Waits for nothing, and raises nothing; nor do `leave` and `refund`."""

    def leave(self, gateway: str, line: str) -> None: ...

    def refund(self, gateway: str, line: str) -> None: ...


class Shared:
    """`auth.Counts` of one gateway."""

    def __init__(self, link: Link, gateway: str) -> None:
        self._link, self._gateway = link, gateway
        self._known: dict[str, Key] = {}  # by line: those that the count may know more of than we do
        self._spent = Counter[str]()  # tokens that it has not been told of
        self._joins = self._begun = 0  # those that have ended well, and all
        self._joining = asyncio.Lock()
        # requests that were admitted here alone, requests that ended, and requests that were refused, while we joined without
        # or with them
        self._came, self._left, self._refunded = Counter[str](), Counter[str](), Counter[str]()
        self._alone = False  # the count does not answer
        self._told = -BEAT_SECONDS

    async def begin(self) -> None:
        """Joins the count before there are requests, where it may have to start first."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._join(0)
        except Exception as error:
            self._lost(error)

    async def run(self) -> None:
        """Tells the count what is new, until it is cancelled."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            await self.report()

    async def admit(self, key: Key) -> None:
        """As `Key.admit`, by the count."""
        self._known[key.line] = key
        refusal = await self._asked(key)
        if refusal is not None and key.places is not None and key.places.all_taken >= key.places.most:
            await asyncio.sleep(FULL_SECONDS)
            refusal = await self._asked(key)
        if refusal is not None:
            raise refusal

    def leave(self, key: Key) -> None:
        if self._joining.locked():
            self._left[key.line] += 1
        elif self._joins and not self._alone:
            self._link.leave(self._gateway, key.line)

    def refund(self, key: Key) -> None:
        if self._joining.locked():
            self._refunded[key.line] += 1
        elif self._joins and not self._alone:
            self._link.refund(self._gateway, key.line)

    def spend(self, key: Key, tokens: int) -> None:
        self._known[key.line] = key
        self._spent[key.line] += tokens

    async def report(self) -> None:
        """Tells the count of tokens that were spent, and learns what is left; joins it again where it was lost."""
        now = time.monotonic()
        due = bool(self._spent) or now - self._told >= BEAT_SECONDS
        if not due or not (self._known or self._joins):
            return
        self._told = now
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if self._alone or not self._joins:
                    await self._join(self._joins)
                await self._joined()
                joins = self._joins
                told = await self._tell()
                if told is None:
                    await self._join(joins)
                    told = await self._tell()
        except Exception as error:
            self._lost(error)
            return
        if self._alone:
            return  # what is admitted alone since then is not in it
        for line, left in (told or {}).items():
            if (key := self._known.get(line)) is not None:
                self._take(key, left)
                # While some run elsewhere we are to hear when they end: batches wait for that.
                if _is_whole(key) and not self._spent[line] and not (key.places and key.places.all_taken):
                    del self._known[line]

    def _tell(self) -> Awaitable[dict[str, Left] | None]:
        spent, self._spent = self._spent, Counter()
        return self._link.tell(self._gateway, {line: spent[line] for line in self._known})

    async def _asked(self, key: Key) -> RateLimitError | None:
        """Why the count refuses a request of `key`; None: it has counted it. What it counts for a client that leaves meanwhile
        ends at once."""
        asking = asyncio.create_task(self._ask(key))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(partial(_undone, key))
            raise

    async def _ask(self, key: Key) -> RateLimitError | None:
        left: Left | None = None
        if not self._alone:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    left = await self._counted(key.line)
            except Exception as error:
                self._lost(error)
        self._known[key.line] = key  # A report may have dropped it meanwhile.
        if left is None or self._alone:  # Others may have been admitted alone since.
            try:
                key.admit()
            except RateLimitError as error:
                return error
            if self._joining.locked():
                self._came[key.line] += 1
            return None
        self._take(key, left)
        if left.refusal is None and key.places is not None:
            key.places.taken += 1
        return left.refusal

    async def _counted(self, line: str) -> Left:
        if not self._joins:
            await self._join(0)
        for _ in range(2):
            await self._joined()
            joins, begun = self._joins, self._begun
            left = await self._link.admit(self._gateway, line)
            if left is None:  # it is new, or took us for dead
                await self._join(joins)
            elif begun == self._begun:  # else what it has counted was forgotten when we joined again
                return left
        raise ConnectionError("the count forgets who joins it")

    async def _join(self, joins: int) -> None:
        """Joins, unless somebody has since the `joins`th time: a second time would forget who was admitted between."""
        async with self._joining:
            if self._joins == joins:
                self._begun += 1
                held = {line: _held(key) for line, key in self._known.items()}
                self._spent.clear()  # what is left here is without it
                self._came.clear()
                self._left.clear()
                self._refunded.clear()
                await self._link.join(self._gateway, held)
                self._joins += 1
                if self._alone:
                    log.warning("the keys' limits are counted for all gateways again")
                self._alone = False
                for line in self._came.elements():
                    self._link.come(self._gateway, line)
                for line in self._left.elements():
                    self._link.leave(self._gateway, line)
                for line in self._refunded.elements():
                    self._link.refund(self._gateway, line)

    async def _joined(self) -> None:
        """Waits for a join that is under way: what overtakes it is forgotten, and what follows it at once does not know yet who
        came alone."""
        async with self._joining:
            pass

    def _lost(self, error: BaseException) -> None:
        if not self._alone:
            what = type(error).__name__
            log.error("the keys' limits are each gateway's own until their count answers again: %s", what)
        self._alone = True
        for key in self._known.values():
            if key.places is not None:
                key.places.elsewhere = 0  # nobody knows

    def _take(self, key: Key, left: Left) -> None:
        """What the count said last is what the key has here: its headers say so, and batches leave as much to others."""
        if key.requests is not None and left.requests is not None:
            key.requests.level = left.requests
        if key.tokens is not None and left.tokens is not None:
            key.tokens.level = left.tokens - self._spent[key.line]
        if key.places is not None:
            key.places.elsewhere = left.elsewhere


def _undone(key: Key, asked: asyncio.Task[RateLimitError | None]) -> None:
    with suppress(Exception, asyncio.CancelledError):
        if asked.result() is None:
            key.leave()


def _held(key: Key) -> Held:
    return Held(0 if key.places is None else key.places.taken, _level(key.requests), _level(key.tokens))


def _level(bucket: Bucket | None) -> float | None:
    return None if bucket is None else bucket.level


def _is_whole(key: Key) -> bool:
    """Whether nothing of its minute is spent."""
    return all(bucket is None or bucket.level >= bucket.per_minute for bucket in (key.requests, key.tokens))
