"""A service follows a release: it serves the stable version, gives a canary its share, and takes it back by its evidence.

`Follower` looks at ``release.json`` once a second, and writes what the evidence of a canary decides: each step, its rollback,
and its promotion where the release says so. Each gateway of a service has one: they count together (`seen`), and what two
decide at once is done once. Where engines run is for `Deploys` to know: another Serve application, or this
process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from shoal.api.metrics import RETRAINED
from shoal.api.seen import Seen
from shoal.api.split import Split
from shoal.api.trial import Trial, Weighed
from shoal.engine.metrics import Samples
from shoal.errors import ShoalError, frames
from shoal.loop import retrainings
from shoal.loop.again import Again
from shoal.loop.canary import advanced, checks
from shoal.loop.canary_state import Canary
from shoal.loop.release import ChangedError, Release, State, now
from shoal.loop.versions import Version
from shoal.machine import write_aside

EVIDENCE = "canary.json"  # of the release's folder: what the pages and people read of a canary
LOOK_SECONDS = 1.0
DEAD_LOOKS = 3  # in a row at a canary that is not well
HELD_SECONDS = 24 * 3600.0  # of a step without enough traffic
LEAVE_SECONDS = 30.0  # for a canary's streams to end before its engine does
READY = "all steps are clear: promote it, or roll it back"

log = logging.getLogger("shoal.api")


class Deploys(Protocol):
    """Where the engines of a release run."""

    async def serve(self, version: Version) -> None:
        """New requests get `version`, now or as soon as it is loaded; returns when it is."""

    async def begin(self, version: Version) -> Weighed:
        """A canary of `version` that is well, beside what serves. Raises ShoalError where it does not start."""

    async def end(self) -> None:
        """No canary is there any more but the one that the release has on trial now, which another gateway may have begun."""

    def weights(self, version: Version) -> str:
        """How what its engines call their weights begins."""


class Follower:
    """Of one service."""

    def __init__(self, release: Release, split: Split, deploys: Deploys, *, serves: int) -> None:
        """`serves`: the version that serves already."""
        self.release, self._split, self._deploys = release, split, deploys
        self._again, self._seen = Again(serves), Seen(release.directory)
        split.beside = partial(_beside, release)
        self._state = -1  # number of the state that is followed
        self._unwell = 0
        self._step: Canary | None = None  # that is waited for since `_since`, by a clock that nobody sets
        self._since = 0.0
        self._written = ""
        self._left = True  # a canary may still be there that nobody wants, such as a gateway's before this one

    async def run(self) -> None:
        """Follows until it is cancelled; what cannot be read is looked at again."""
        said = ""
        while True:
            try:
                await self.look()
                said = ""
            except ChangedError:  # a person, or another gateway, was first: the next look follows that
                pass
            except Exception as error:
                what = error.message if isinstance(error, ShoalError) else frames(error)
                if what != said:
                    log.error("the release is not followed: %s", what)
                said = what
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Does what the release says now, and tells it what was seen."""
        state = await asyncio.to_thread(self.release.state)
        if state.number != self._state or (state.stable is not None and self._again.due(state.stable)):
            await self._take(state)
            self._state = state.number
        if self._split.trial is not None:
            await self._judge(self._split.trial, state)
        elif state.held is None and state.canary is None and state.auto in ("canary", "promote"):
            await self._begin_by_itself(state)

    async def _take(self, state: State) -> None:
        # of equal weights the stable version's name counts
        found = list[Version]()
        for number in (state.candidate, state.previous):
            if number is not None:
                with suppress(ShoalError):  # somebody made room: what serves needs none of the others
                    found.append(await asyncio.to_thread(self.release.version, number))
        stable = await asyncio.to_thread(self.release.stable)
        labels = {self._deploys.weights(version): version.label for version in (*found, stable)}
        self._split.labels = {**self._split.labels, **labels}  # streams go on with versions of before
        if self._again.due(stable.number):
            try:
                await self._again.load(stable.number, lambda: self._deploys.serve(stable))
                log.warning("version %s serves", stable.label)
            except Exception as error:  # a slip is no reason to end a service, nor to load for ever
                what = error.message if isinstance(error, ShoalError) else frames(error)
                log.error("version %s does not serve, what served goes on: %s; it is tried again", stable.label, what)
        trial, canary = self._split.trial, state.canary
        if trial is not None and not trial.canary.same(canary):
            await self._end(trial)
            trial = None
        if canary is None:
            await asyncio.to_thread(self._seen.forget)
            if self._left:
                await self._deploys.end()
                self._left = False
            return
        if trial is None:
            await self._begin(canary)
        elif canary != trial.canary:
            trial.go_on(canary)

    async def _begin(self, canary: Canary) -> None:
        version = await asyncio.to_thread(self.release.version, canary.version)
        self._split.labels = {**self._split.labels, self._deploys.weights(version): version.label}
        self._left = True
        try:
            client = await self._deploys.begin(version)
        except Exception as error:
            what = error.message if isinstance(error, ShoalError) else type(error).__name__
            await self._back(canary, f"it did not start: {what}")
            await self._deploys.end()
            return
        if not canary.same((await asyncio.to_thread(self.release.state)).canary):  # taken back while it was loaded
            await self._deploys.end()
            self._left = False
            return
        self._unwell = 0
        self._split.trial = Trial(client, version.label, canary, self._split.pace)

    async def _end(self, trial: Trial) -> None:
        """It gets nothing more, its streams end, and then it goes."""
        self._split.trial = None
        if trial.shadowing is not None:
            trial.shadowing.cancel()
        until = asyncio.get_running_loop().time() + LEAVE_SECONDS
        while trial.running and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.05)
        await self._deploys.end()
        self._left = False

    async def _judge(self, trial: Trial, state: State) -> None:
        trial.hear(await asyncio.to_thread(self._seen.others, trial.canary))
        if trial.canary != self._step:
            self._step = trial.canary
            self._since = time.monotonic() - await asyncio.to_thread(self._seen.waited, trial.canary)
        waited = time.monotonic() - self._since
        await asyncio.to_thread(self._seen.tell, trial.canary, dict(trial.evidence.own), waited)
        await asyncio.to_thread(self._write, trial)
        decision, why = trial.decided
        if decision == "back" or await self._is_dead(trial):
            trial.decided = "back", why if decision == "back" else "its engine is dead"
            await self._back(trial.canary, trial.decided[1], trial)
            return
        if state.held is not None:
            return
        canary = trial.canary
        if decision == "next":
            step = advanced(canary, now())
            await asyncio.to_thread(self.release.step, step, why=why, figures=_figures(trial), seen=state.number)
            trial.go_on(step)
        elif decision == "done" and state.auto == "promote":
            work = partial(self.release.promote, canary.version, why=why, force=True, who="shoal", seen=state.number)
            await asyncio.to_thread(work, figures=_figures(trial))
        elif decision == "done":
            await asyncio.to_thread(self.release.hold, why=READY, who="shoal", seen=state.number)
        elif waited > HELD_SECONDS:
            what = f"too little traffic in {HELD_SECONDS / 3600:.0f} h: {why}"
            await asyncio.to_thread(self.release.hold, why=what, who="shoal", seen=state.number)

    async def _is_dead(self, trial: Trial) -> bool:
        try:
            await trial.client.check_health()
            self._unwell = 0
        except ShoalError:
            self._unwell += 1
        return self._unwell >= DEAD_LOOKS

    async def _back(self, canary: Canary, why: str, trial: Trial | None = None) -> None:
        """Writes that it is taken back, and ends it. What is condemned gets nothing more already, so that where the release is
        busy the next look may do it."""
        state = await asyncio.to_thread(self.release.state)
        if canary.same(state.canary):
            figures = {} if trial is None else _figures(trial)
            work = partial(self.release.rollback, why=why, who="shoal", figures=figures, seen=state.number)
            await asyncio.to_thread(work)
            self._split.rollbacks += 1
            log.error("the canary of version %s is taken back: %s", canary.version, why)
        if trial is not None:
            await self._end(trial)

    async def _begin_by_itself(self, state: State) -> None:
        if state.candidate is None or state.candidate == state.stable:
            return
        version = await asyncio.to_thread(self.release.version, state.candidate)
        if version.passed:
            work = partial(
                self.release.begin, version.number, why=f"auto: {state.auto}", who="shoal", seen=state.number
            )
            await asyncio.to_thread(work)

    def _write(self, trial: Trial) -> None:
        """What was seen of the canary, for people."""
        told = {
            "version": trial.canary.version,
            "step": trial.canary.step,
            "since": trial.canary.since,
            "evidence": trial.evidence.table(),
            "decision": trial.decided,
            "checks": [
                {**asdict(each), "condemned": each.condemned, "cleared": each.cleared}
                for each in checks(trial.evidence)
            ],
        }
        text = json.dumps(told, indent=1)
        if text != self._written:
            write_aside(self.release.directory / EVIDENCE, text + "\n")
            self._written = text


def _beside(release: Release) -> Samples:
    """What its files say; nothing where one cannot be read, which who retrains is told."""
    try:
        return {RETRAINED.sample(): float(retrainings.read(release.directory).failed)}
    except ShoalError:
        return {}


def _figures(trial: Trial) -> dict[str, Any]:
    """For the audit log."""
    return trial.evidence.table()
