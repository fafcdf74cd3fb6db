"""A replica follows a release: it looks which version is stable. Serve has no part in it, so nothing is updated for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from shoal.errors import ShoalError, frames
from shoal.loop.release import Release

LOOK_SECONDS = 1.0
AGAIN_SECONDS = 60.0  # after a version that could not be loaded: each try reads all of it

log = logging.getLogger("ray.serve")


def stable(release: str) -> str:
    """The directory that the stable version of a release is served from. Raises UsageError where there is none."""
    return str(Release(release).stable().served)


async def follow(release: str, serves: str, take: Callable[[str], Awaitable[None]]) -> None:
    """Calls `take` with the directory of the stable version whenever that is another; `serves`: the one that is served. What
    `take` raises at is tried again after `AGAIN_SECONDS`, and what cannot be read is looked at again. Returns never."""
    said = refused = ""
    tried = 0.0  # when, by the steady clock
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            found = await asyncio.to_thread(stable, release)
            if found != serves and (found != refused or time.monotonic() - tried >= AGAIN_SECONDS):
                refused, tried = found, time.monotonic()
                await take(found)
                serves, refused = found, ""
            said = "" if found == serves else said
        except Exception as error:
            what = str(error) if isinstance(error, ShoalError) else frames(error)
            if what != said:
                log.error("the release is not followed: %s", what)
            said = what
