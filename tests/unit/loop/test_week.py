"""Hours of the week, and how much days differ beyond them."""

import numpy as np
import pytest

from shoal.loop.week import DAY, WEEK_HOURS, day_to_day, hour_of, parts_of

MONDAY = 4 * DAY  # 1970-01-05 0:00, UTC


def over(days: float, count: int, seed: int = 0) -> np.ndarray:
    return MONDAY + np.sort(np.random.default_rng(seed).random(count)) * days * DAY


def test_hours_of_the_week_are_known_from_two_weeks_on() -> None:
    assert [len(parts_of(over(days, 20_000), 40)[0]) for days in (0.2, 0.95, 7, 13, 14, 30)] == [
        1,
        24,
        24,
        24,
        168,
        168,
    ]
    hours = hour_of(MONDAY + np.array([0.0, 3600, 5 * DAY, 7 * DAY]), WEEK_HOURS)
    assert hours[0] == hours[3] and len(set(hours.tolist())) == 3


@pytest.mark.parametrize("count", [300, 2_000, 50_000])
def test_each_part_has_enough_values(count: int) -> None:
    at = over(14, count)
    of_hour, part = parts_of(at, 100)
    assert np.bincount(part).min() >= 40 and np.array_equal(of_hour[hour_of(at, len(of_hour))], part)


def test_days_that_differ_widen_the_band_and_more_requests_narrow_it() -> None:
    def band(count: int, apart: float, days: int = 14) -> float | None:
        rng, at = np.random.default_rng(1), over(days, count)
        values = rng.normal(size=count) + apart * rng.normal(size=days)[((at - MONDAY) // DAY).astype(int)]
        of_hour, part = parts_of(at, 40)
        means = np.bincount(part, weights=values) / np.bincount(part)
        return day_to_day(values - means[part], at, len(of_hour))

    few, many = band(2_000, 0.0), band(40_000, 0.0)
    assert few is not None and many is not None and many < few < 0.5
    apart = band(40_000, 0.3)
    assert apart is not None and apart > 0.5, "the next day may be two of its standard deviations away"
    assert band(2_000, 0.0, days=3) is None
