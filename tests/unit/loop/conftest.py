import pytest

from shoal.loop import writer


@pytest.fixture(autouse=True)
def rows_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a write may take so long that the disk is taken for a slow one, whose rows come a moment later."""
    monkeypatch.setattr(writer, "SLOW_SECONDS", 60.0)
    monkeypatch.setattr(writer, "HELD_SECONDS", 60.0)
