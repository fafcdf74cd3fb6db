"""A capture in a folder, and a gateway's end of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.loop import costs
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


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all models a token takes a second: what a gate asks beside the clock is a twentieth of its time. `test_costs` and
    `test_one_that_takes_longer_for_a_token_is_stopped` look at the clock."""
    monkeypatch.setattr(costs, "_seconds", lambda engine, prompts, depth: 1.0)
