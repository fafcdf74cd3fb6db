"""How retrainings of a release went, of those too that made no version."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.loop import retrainings
from shoal.loop.retrainings import FILE, Retrainings, Run, one, read


def outcomes(release: Path) -> list[str]:
    return [run.outcome for run in read(release).runs]


def run(release: Path, passed: bool | None) -> None:
    with one(release, 3.0) as ended:
        ended(passed)


def test_those_in_a_row_are_counted_until_one_may_serve(tmp_path: Path) -> None:
    assert read(tmp_path) == Retrainings()
    run(tmp_path, False)
    assert read(tmp_path).failed == 1
    with pytest.raises(ZeroDivisionError), one(tmp_path, 3.0):
        raise ZeroDivisionError("no disk")
    assert read(tmp_path).failed == 2 and read(tmp_path).runs[-1].why == "no disk"
    with pytest.raises(KeyboardInterrupt), one(tmp_path, 3.0):
        raise KeyboardInterrupt
    assert read(tmp_path).failed == 2, "a person ended it: that says nothing"
    for passed in (True, None):
        run(tmp_path, passed)
        assert read(tmp_path).failed == 0
    assert outcomes(tmp_path) == ["refused", "failed", "ended", "passed", "unjudged"]


def test_one_that_was_killed_is_counted_by_the_next(tmp_path: Path) -> None:
    with one(tmp_path, 3.0) as ended:
        during = (tmp_path / FILE).read_text()
        ended(True)
    (tmp_path / FILE).write_text(during)  # as a kill leaves it
    assert read(tmp_path).failed == 0 and outcomes(tmp_path) == ["works"]
    run(tmp_path, False)
    assert read(tmp_path).failed == 2 and outcomes(tmp_path) == ["killed", "refused"]
    assert read(tmp_path).runs[0].minutes == 3.0, "as long as it was asked to take"


def test_minutes_without_a_version_are_spent_for_a_day(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ago = [(now - timedelta(hours=hours)).isoformat() for hours in (30, 20, 2, -5)]
    runs = tuple(
        Run(began, outcome, 10.0) for began, outcome in zip(ago, ("failed", "killed", "passed", "ended"), strict=True)
    )
    known = Retrainings(1, runs)
    assert known.spent(now) == 20.0  # of a clock that was ahead, too
    retrainings._write(tmp_path, known)
    run(tmp_path, True)
    assert outcomes(tmp_path) == ["killed", "passed", "ended", "passed"], "older ones are forgotten"


@pytest.mark.parametrize("text", ["", "[3]", "3", '{"failed": "two"}', '{"runs": [{"began": 3}]}'])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"retrain\.json cannot be read.*[:;] remove it") as raised:
        read(tmp_path)
    assert "\n" not in raised.value.message
    (tmp_path / FILE).write_text(json.dumps({"failed": 2, "runs": []}))
    assert read(tmp_path).failed == 2
