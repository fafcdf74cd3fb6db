"""An outbox whose scribe is in this process: what was put is on the disk at once, for tests of what rows say."""

from __future__ import annotations

import pytest

from shoal.loop.capture import Capture
from shoal.loop.outbox import Outbox
from shoal.loop.scribe import Scribe
from shoal.loop.writer import Bounds, Writer


class AtOnce(Outbox):
    """With the same frames and counts, and no pipe."""

    def __init__(self, folder: str, bounds: Bounds | None = None) -> None:
        super().__init__(folder, bounds)
        capture = Capture(folder, create=True)
        self.writer = Writer(capture, bounds, start=False)
        self._here = Scribe(capture, self.writer, self._shared, set())

    def _begin(self) -> None:
        pass

    def _send(self, frame: bytes) -> None:
        self._here.take(frame)

    def close(self) -> None:
        self.writer.close()
        super().close()


@pytest.fixture(autouse=True)
def rows_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of a module that imports this. So nobody need wait a second for a row that another gateway may write."""
    monkeypatch.setattr("shoal.api.capture.Outbox", AtOnce)
    monkeypatch.setattr("shoal.api.storing.LOOK_SECONDS", 0.0)
