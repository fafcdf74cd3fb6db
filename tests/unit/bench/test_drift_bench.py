"""Ordinary traffic rings nobody, a new subject does; by the benchmark that is run before a release."""

import json

import pytest

from benchmarks.drift import PATTERNS, SHIFT, WITHIN_DAYS, Pattern, alarm_day
from shoal.cli import main


@pytest.mark.parametrize("pattern", PATTERNS[2:], ids=lambda pattern: pattern.name)
def test_sessions_and_weekends_are_no_drift(pattern: Pattern) -> None:
    """Every request counted, and compared with a day, each of these rang within 30 days."""
    assert [alarm_day(pattern, 150, (7, run)) for run in range(2)] == [None, None]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_a_fifth_of_the_sessions_with_a_new_subject_is_seen_within_three_days(pattern: Pattern) -> None:
    day = alarm_day(pattern, 400, (7, 0, 1), shift=SHIFT)
    assert day is not None and 0 <= day <= WITHIN_DAYS


@pytest.mark.drill
def test_the_command_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "drift", "--runs", "1", "--daily", "300"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told["traffic"]) == {pattern.name for pattern in PATTERNS}
    assert all(one["false"] == 0 for one in told["traffic"].values())
    assert main(["bench", "drift", "--runs", "0"]) == 2
