"""A capture in a folder, and a gateway's end of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.loop.capture import Capture
from shoal.loop.outbox import Outbox


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "capture", create=True)


@pytest.fixture
def box(capture: Capture) -> Iterator[Outbox]:
    made = Outbox(str(capture.folder))
    yield made
    made.close()
