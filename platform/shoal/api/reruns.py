"""Requests that the router answered, asked again at full depth while nobody waits: what the exit that it chose has lost.

    an answer has ended ─> one in so many, its prompt in memory ─> nobody is answered, the engine idles ─> full depth, greedily
    somebody comes: the re-run ends at once, and is begun again ─> a row of its own with `regret`, beside that of its request

The regret is KL(full depth || exit) in the mean over the places of full depth's own answer (`engine.compared`). No text is
written: a prompt is in the memory of this process, for ten minutes at most, and its answer is not even read. A service that is
never idle measures nothing, and says so in its counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from shoal.api.client import EngineClient
from shoal.api.requests import EngineCall
from shoal.api.split import Split
from shoal.config import FULL
from shoal.engine.events import LATER, Event, Finished, Request, Signals
from shoal.engine.metrics import Samples, sample, summed
from shoal.errors import ShoalError, frames
from shoal.loop.capture import now_ms
from shoal.loop.rows import RERUN, Row

TOKENS = 64  # of an answer that is looked at: the mean over so many hardly moves with more
WAITING = 64  # prompts in memory
WAIT_SECONDS = 600.0  # that one waits there
QUIET_SECONDS, LOOK_SECONDS = 0.2, 0.02  # nobody was answered for so long; how often that is looked at
TRIES = 3  # before one that always gives way is given up
DEADLINE = 60.0  # seconds of one
OUTCOMES = ("done", "gave_way", "waited", "full", "failed")

log = logging.getLogger("shoal.api")


class Host(Protocol):
    """What is needed of a model and the engine that runs it, `service.Hosted`."""

    client: EngineClient
    held: int  # requests that are answered by it


@dataclass
class _Asked:
    """One request that waits to be asked again."""

    request: Request
    client: EngineClient
    row: Row  # of the answer that it got
    exits: tuple[int, ...]
    tolerance: float
    since: float
    tries: int = 0


class Reruns:
    """Of one gateway. `offer` what has ended; `run` beside the app."""

    def __init__(self, share: float, put: Callable[[Row], None]) -> None:
        """`share`: of the requests whose depth the router chose; `put` takes the rows."""
        self.share, self._put = share, put
        self.hosts: Callable[[], Iterable[Host]] = tuple  # all that are answered here
        self.counts = Counter[str]()
        self._waiting = deque[_Asked]()
        self._some = asyncio.Event()

    def samples(self) -> Samples:
        """What is said of them at a scrape."""
        return {sample("reruns", outcome=outcome): float(self.counts[outcome]) for outcome in OUTCOMES}

    def wants(self, call: EngineCall, told: Signals | None, id_: str) -> bool:
        """Whether the router chose the depth within the tolerance that is promised to everybody, and the answer of this id is
        among the ones that are asked again. `told` by the engine at its end."""
        if told is None or told.tolerance is None or told.router_bound is None:
            return False
        return call.requests[0].quality_tolerance is None and _among(id_, self.share)

    def offer(
        self, call: EngineCall, client: EngineClient, told: Signals | None, row: Row, exits: tuple[int, ...]
    ) -> None:
        """Take the request of `row`, if it is wanted, and one whose loss can be told."""
        first = call.requests[0]
        if told is None or told.tolerance is None or not self.wants(call, told, row.id):
            return
        if row.status != 200 or row.resumed or row.role == "canary" or first.adapter or call.silent:
            return
        if len(call.requests) > call.n:  # its row has means over several prompts
            return
        if row.layers not in exits:
            return
        tokens = min(TOKENS, first.sampling.max_tokens)
        how = replace(
            first.sampling, temperature=0.0, max_tokens=tokens, min_tokens=min(tokens, first.sampling.min_tokens),
            speculative=0, logprobs=None, prompt_logprobs=None,
        )  # fmt: skip
        again = Request(
            first.prompt,
            how,
            FULL,
            deadline=DEADLINE,
            priority=LATER + 1,
            payer="rerun",
            cache_salt=first.cache_salt,
            signals=True,
            gaps=True,
        )
        self._waiting.append(_Asked(again, client, row, exits, told.tolerance, time.monotonic()))
        if len(self._waiting) > WAITING:
            self._waiting.popleft()
            self.counts["full"] += 1
        self._some.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._some.wait()
            if not self._waiting:
                self._some.clear()
                continue
            await self._quiet()
            self._drop_old()
            if self._waiting and await self._idle(self._waiting[-1].client):
                await self._rerun(self._waiting.pop())  # the newest: its beginning is still in the prefix cache

    @property
    def _busy(self) -> bool:
        return any(host.held for host in self.hosts())

    async def _quiet(self) -> None:
        """Returns when nobody was answered here for `QUIET_SECONDS`, or when the oldest has waited for too long."""
        until = time.monotonic() + QUIET_SECONDS
        while (now := time.monotonic()) < until and now < self._waiting[0].since + WAIT_SECONDS:
            busy = self._busy
            if busy:
                until = time.monotonic() + 2 * QUIET_SECONDS
            await asyncio.sleep(QUIET_SECONDS if busy else LOOK_SECONDS)  # a service that works is not asked often

    def _drop_old(self) -> None:
        while self._waiting and time.monotonic() >= self._waiting[0].since + WAIT_SECONDS:
            self._waiting.popleft()
            self.counts["waited"] += 1

    async def _idle(self, client: EngineClient) -> bool:
        """Whether the engines run nothing for others, such as other gateways and batches, either. Where none answers, they are
        busy, or would have to be started for this alone."""
        try:
            told = await client.stats()
        except ShoalError:
            told = {sample("num_requests_waiting"): 1.0}
        silent = told.get(sample("num_replicas")) == 0
        if silent or summed(told, "num_requests_running") + summed(told, "num_requests_waiting"):
            await asyncio.sleep(QUIET_SECONDS)
            return False
        return not self._busy

    async def _rerun(self, asked: _Asked) -> None:
        """Ask again; where somebody comes meanwhile, end it and put it back."""
        task = asyncio.create_task(self._answered(asked))
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
                if self._busy:
                    break
        finally:
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            self.counts[task.result()] += 1
            return
        asked.tries += 1
        if asked.tries < TRIES:
            self._waiting.append(asked)
            self._some.set()
        else:
            self.counts["gave_way"] += 1

    async def _answered(self, asked: _Asked) -> str:
        """Runs one to its end and keeps its row; returns what became of it."""
        request = replace(asked.request, id=f"{asked.row.id}.rerun{asked.tries}")
        begun: list[str] = []
        end: Finished | None = None
        try:
            async with aclosing(cast(Any, _lists(asked.client, request, begun))) as lists:
                async for events in lists:
                    end = _end(events[-1])
        except ShoalError:
            return "failed"
        except Exception as error:  # a slip is no reason to measure nothing any more
            log.error("a re-run failed\n%s", frames(error))
            return "failed"
        told = None if end is None else end.signals
        if (
            told is None
            or len(told.gaps) != len(asked.exits) - 1
            or (begun and begun[0] not in ("", asked.row.version))
        ):
            return "failed"  # also where other weights have taken the place of those that answered
        self._put(_row(asked, told))
        return "done"


def _lists(client: EngineClient, request: Request, begun: list[str]) -> Any:
    """The events of `request` by the stable version, whose label goes into `begun` where it has one."""
    if not isinstance(client, Split):
        return client.batches(request)
    labels, stable = client.labels, client.stable
    return stable.batches(request, lambda weights: begun.append(labels.get(weights.partition("-")[0], "")))


def _end(event: Event) -> Finished | None:
    return event if isinstance(event, Finished) and event.reason in ("stop", "length") else None


def _row(asked: _Asked, told: Signals) -> Row:
    """The row of a re-run: whose it is, and what was measured; nothing else that its request has."""
    answered, gaps = asked.row, (*told.gaps, 0.0)
    return Row(
        id=answered.id, at=now_ms(), model=answered.model, version=answered.version, role=RERUN, weights=answered.weights,
        route=answered.route, slice=answered.slice, subject=answered.subject, tolerance=asked.tolerance,
        regret=gaps[asked.exits.index(answered.layers or 0)], regret_bound=answered.router_bound, gaps=[*told.gaps],
    )  # fmt: skip


def _among(id_: str, share: float) -> bool:
    """Whether the request of this id is among a `share` of all."""
    return int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest(), "big") < share * 2**64
