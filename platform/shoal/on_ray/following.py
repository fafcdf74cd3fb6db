"""A replica follows a release: it looks which version is stable. Serve has no part in it, so nothing is updated for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from shoal.errors import ShoalError, frames
from shoal.loop.again import Again
from shoal.loop.release import Release

LOOK_SECONDS = 1.0

log = logging.getLogger("ray.serve")


def stable(release: str) -> str:
    """The directory that the stable version of a release is served from. Raises UsageError where there is none."""
    return str(Release(release).stable().served)


async def follow(release: str, serves: str, take: Callable[[str], Awaitable[None]]) -> None:
    """Calls `take` with the directory of the stable version whenever that is another; `serves`: the one that is served. What
    `take` raises at is tried again as `Again` says, and what cannot be read is looked at again. Returns never."""
    said, again = "", Again(serves)
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            found = await asyncio.to_thread(stable, release)
            if again.due(found):
                await again.load(found, partial(take, found))
            said = "" if found == again.serves else said
        except Exception as error:
            what = str(error) if isinstance(error, ShoalError) else frames(error)
            if what != said:
                log.error("the release is not followed: %s", what)
            said = what
