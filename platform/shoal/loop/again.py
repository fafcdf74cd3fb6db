"""When a version is loaded that is to serve and does not yet: by a gateway, and by each of its replicas."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

SECONDS = 60.0  # after a version that could not be loaded: each try reads all of it

T = TypeVar("T")  # how who loads it names a version


class Again(Generic[T]):
    """Of one that loads. `serves`: the version that it serves."""

    def __init__(self, serves: T) -> None:
        self.serves = serves
        self._failed: tuple[T, float] | None = None  # what could not be loaded, and when, by the steady clock

    def due(self, wanted: T) -> bool:
        """Whether to load `wanted` now: another than what serves, and none that could not be loaded a moment ago."""
        if wanted == self.serves:
            return False
        return self._failed is None or self._failed[0] != wanted or time.monotonic() - self._failed[1] >= SECONDS

    async def load(self, wanted: T, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, after which `wanted` serves. Raises what that does: it could not be loaded then."""
        try:
            await work()
        except Exception:
            self._failed = wanted, time.monotonic()
            raise
        self.serves, self._failed = wanted, None
