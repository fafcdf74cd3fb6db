"""How long a request waits while no replica is there to take it.

A replica that was lost is replaced in `REPLACED_SECONDS`, or something is wrong that waiting does not mend: then clients are
told to come back, and soon. Where a deployment may have none, a request is what starts one, and waits for it as long as it may.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from shoal.errors import QueueFullError

T = TypeVar("T")

REPLACED_SECONDS = 20.0  # without a replica, before requests are refused
LEAST_SECONDS = 2.0  # that each waits nevertheless
RETRY_SECONDS = 5.0  # that a refused client is told
LOOK_SECONDS = 0.25


class NoReplicaError(QueueFullError):
    """No replica is alive: as with a full queue, nobody takes the request now, and it may come back."""

    status = 503
    code = "no_replica"
    retry_after = RETRY_SECONDS


class Absence:
    """Of the replicas of one deployment."""

    def __init__(self, may_be_none: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`may_be_none`: the deployment starts one when somebody asks."""
        self._may_be_none, self._clock = may_be_none, clock
        # when none was seen first, in a row of looks; when it was looked last
        self._since = self._looked = -float("inf")

    async def bounded(self, choosing: Coroutine[Any, Any, T], present: Callable[[], bool]) -> T:
        """The result of `choosing` a replica, which waits while there is none; `present`: is there any now? Raises
        NoReplicaError."""
        if self._may_be_none:
            return await choosing
        began, task = self._clock(), asyncio.ensure_future(choosing)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=LOOK_SECONDS)
                if not task.done() and self.too_long(present(), began):
                    raise NoReplicaError("no engine replica is alive", do=f"try again in {RETRY_SECONDS:g} s")
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})

    def too_long(self, present: bool, began: float) -> bool:
        """Whether a request that waits since `began` is to be refused; `present`: there is a replica."""
        now = self._clock()
        if present or now - self._looked > 4 * LOOK_SECONDS:  # nobody looked meanwhile: there may have been one
            self._since = now
        self._looked = now
        return not present and now - self._since > REPLACED_SECONDS and now - began > LEAST_SECONDS
