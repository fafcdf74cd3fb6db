"""The last look of `shoal watch` at what this service captures.

The gateway looks at nothing itself: it reads the file that the look wrote, in a thread, once for all who ask, and again only
when there is another.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from shoal.api.capture import Recorder
from shoal.api.metrics import REFERENCE
from shoal.engine.metrics import Samples, sample
from shoal.errors import ShoalError
from shoal.loop.looked import FOLDER, STATE, last_look, shown
from shoal.loop.tell import STATES


class LastLook:
    """At the capture of one `Recorder`."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._folder = recorder.capture.folder
        self._stamp: tuple[int, ...] | None = None  # of the file that is known
        self._known: dict[str, Any] | None = None
        self._reading = asyncio.Lock()

    async def get(self) -> dict[str, Any] | None:
        """As `looked.last_look`, without what was forgotten since. Raises DataError."""
        async with self._reading:
            return await asyncio.to_thread(self._read)

    async def samples(self) -> Samples:
        """For a scrape; nothing where nobody has looked, or what was written cannot be read."""
        try:
            found = await self.get()
            return {} if found is None else _told(found)
        except (ShoalError, KeyError, TypeError, ValueError):  # one file is not to cost a scrape all the rest
            return {}

    def _read(self) -> dict[str, Any] | None:
        try:
            found = (self._folder / FOLDER / STATE).stat()
            stamp: tuple[int, ...] | None = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            stamp = None
        if stamp != self._stamp or stamp is None:
            self._known, self._stamp = last_look(self._folder), stamp
        return None if self._known is None else shown(self._known, self.recorder.capture.forgotten())


def _told(found: dict[str, Any]) -> Samples:
    report = found["report"]
    told = {
        sample("drift_state"): float(STATES.index(report["state"])),
        sample("drift_evidence_requests"): float(report["evidence"]),
        sample("drift_needed_requests"): float(report["needed"]),
        sample("drift_requests"): float(report["requests"]),
        sample("drift_looked_timestamp_seconds"): float(found["looked"]),
    }
    if ended := report["reference"].get("ended"):
        told[REFERENCE.sample()] = datetime.fromisoformat(ended).timestamp()
    if regret := report.get("regret"):
        told |= {sample("regret_nats", bound=name): float(regret[name]) for name in ("low", "mean", "high")}
        told[sample("regret_tolerance_nats")] = float(regret["tolerance"])
        told[sample("regret_reruns")] = float(regret["reruns"])
    return told | {sample("drift_shift_sd", signal=each["signal"]): float(each["shift"]) for each in report["signals"]}
