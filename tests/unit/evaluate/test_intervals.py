"""Intervals against closed forms, and against how often they hold what they are of."""

import math

import numpy as np
import pytest

from benchmarks.intervals import KINDS, held
from shoal.evaluate import intervals


def test_rows_of_a_group_that_all_agree_count_once() -> None:
    """Ten rows of each of 20 groups are 20 groups, if the ten say the same."""
    groups = [group for group in range(20) for _ in range(10)]
    low, high = intervals.of_share([group < 6 for group in groups], groups).interval
    one, other = intervals.exact(6, 20)
    assert low <= one and high >= other and high - low < 1.2 * (other - one)
    assert intervals.of_share([False] * 200, groups).interval == intervals.exact(0, 20)
    assert intervals.of_share([True, False] * 10, range(20)).interval == intervals.exact(10, 20), "a row is a group"


def test_rows_that_scatter_less_than_chance_count_as_what_they_are() -> None:
    """One hit in every pair."""
    groups = [pair for pair in range(30) for _ in range(2)]
    assert intervals.of_share([True, False] * 30, groups).interval == pytest.approx(intervals.exact(30, 60))


def test_a_means_interval_is_at_least_students() -> None:
    """The jackknife's error of a mean is the textbook's; what is there twice in each group is no more than once."""
    values = np.random.default_rng(0).normal(10, 1, 40)
    low, high = intervals.of_mean(values.tolist(), range(40)).interval
    half = 2.0227 * values.std(ddof=1) / 40**0.5
    assert low <= values.mean() - half + 1e-4 and high >= values.mean() + half - 1e-4
    assert high - low == pytest.approx(2 * half, rel=0.25)
    twice = intervals.of_mean([*values.tolist()] * 2, [*range(40)] * 2).interval
    assert twice == pytest.approx((low, high)), "every row twice is no more than every row"


def test_a_quotient_is_of_what_is_not_empty_and_never_below_nothing() -> None:
    draws = np.random.default_rng(3)
    below = draws.uniform(50, 150, 400)
    above = below * draws.normal(2.0, 0.2, 400)
    ratio = above.sum() / below.sum()
    error = np.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    low, high = intervals.quotient(above, below)
    assert (low, high) == pytest.approx((ratio - 2 * error, ratio + 2 * error), abs=0.25 * error)
    assert intervals.quotient([*above, 3.0], [*below, 0.0]) == (low, high), "what holds nothing is nothing"
    assert intervals.quotient([1.0, 0.0, 0.2, 90.0, 3.0, 1.5], [1.0] * 6)[0] == 0.0


def test_no_interval_is_stated_of_fewer_than_five() -> None:
    """Nor where fewer than five differ, but for what is exact."""
    values, hits = [1.0, 2.0, 4.0, 9.0, 3.0], [True, False, True, True, False]
    for count in range(6):
        of = range(count)
        stated = [
            intervals.of_share(hits[:count], of), intervals.of_mean(values[:count], of),
            intervals.of_bounded(values[:count], of, 9.0), intervals.of_quotient(values[:count], [1.0] * count, count),
            intervals.Figure(0.0, intervals.crossed(np.ones((count, 9)) * values[0], range(9)), 9, 9),
            intervals.Figure(0.0, intervals.crossed(np.tile(values[:count], (5, 1)), of), 9, 9),
        ]  # fmt: skip
        assert [one.ends is not None for one in stated] == [count >= 5] * 6, count
    assert intervals.of_mean([0.0] * 30 + [1.0] * 4, range(34)).ends is None
    assert intervals.of_mean([0.0] * 30 + [1.0] * 5, range(35)).ends is not None
    assert intervals.of_quotient([2.0] * 30, [1.0] * 30, 30).ends is None
    assert intervals.of_mean([0.0] * 30, range(30)).between() == "too few of 30 groups differ, at least 5"
    assert intervals.of_mean([1.0, 3.0], [4, 4]).between() == "too few: 1 groups, at least 5"
    assert intervals.median(range(5)) == intervals.UNKNOWN and intervals.median([*range(6)]) == (0, 5)


def test_of_values_that_few_differ_in_the_others_may_be_as_many_as_is_exact() -> None:
    low, high = intervals.of_bounded([0.0] * 198 + [1.0, 3.0], range(200), 4.0).interval
    assert (low, high) == pytest.approx((0.0, 4 * intervals.exact(2, 200)[1]))
    low, high = intervals.of_bounded([0.5] * 200, range(200), 1.0).interval
    assert (low, high) == pytest.approx((0.5 - 0.5 * 0.018275, 0.5 + 0.5 * 0.018275), abs=1e-5)
    assert intervals.of_bounded([float("nan")] * 9, range(9), 1.0).ends is None


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_the_truth(kind: str) -> None:
    """Of 300 at ten units; before a release of 2,000, at 5, 10 and 33. The percentiles of a bootstrap held a mean of skewed
    values in 80 %, and bits a byte in 87 %."""
    stated, good = held(kind, 10, 300)
    assert good / max(1, stated) >= 0.93


def test_a_figure_says_of_how_many_rows_and_groups_it_is() -> None:
    hit, groups = [True, False, True, False, False], [1, 1, 2, 2, 3]
    for found, value in (
        (intervals.of_share(hit, groups), 0.4), (intervals.of_mean([1.0, 2.0, 6.0, 1.0, 0.0], groups), 2.0),
    ):  # fmt: skip
        assert (found.value, found.rows, found.groups) == (value, 5, 3)
    found = intervals.of_quotient([1.0, 2.0], [4.0, 4.0], 7)
    assert (found.value, found.rows, found.groups) == (0.375, 7, 2)
    assert intervals.of_part([3, 4], [5, 5]).value == 0.7 and intervals.of_part([3, 4], [5, 5]).rows == 10
    assert intervals.of_share([], []).value == intervals.of_mean([], []).value == 0


def test_an_interval_without_an_end_is_none_in_a_report() -> None:
    assert intervals.Figure(1.0, (0.5, 2.0), 9, 3).ends == [0.5, 2.0]
    assert intervals.of_mean([1.0, 3.0], [4, 4]).ends is None


@pytest.mark.parametrize(("hits", "count"), [(300, 300), (299, 300), (0, 12), (7, 20), (1, 1)])
def test_an_exact_interval_is_where_the_tails_of_the_binomial_are_2_5_percent(hits: int, count: int) -> None:
    """By its definition, with the sums written out; all hits have a closed form."""
    low, high = intervals.exact(hits, count)

    def at_least(some: int, share: float) -> float:
        return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(some, count + 1))

    assert low == (0.0 if hits == 0 else pytest.approx(low)) and (
        hits == 0 or at_least(hits, low) == pytest.approx(0.025)
    )
    assert hits == count or 1 - at_least(hits + 1, high) == pytest.approx(0.025)
    assert hits != count or (low == pytest.approx(0.025 ** (1 / count)) and high == 1.0)
    assert intervals.exact(0, 0) == (0.0, 1.0)


def test_no_share_is_below_nothing_or_above_all() -> None:
    for count in range(1, 200):
        assert intervals.exact(0, count)[0] == 0 and intervals.exact(count, count)[1] == 1


@pytest.mark.parametrize("count", [6, 7, 9, 12, 25])
def test_a_medians_interval_is_of_the_binomial(count: int) -> None:
    low, high = intervals.median([*range(count)])
    assert low + high == count - 1
    outside = 2 * sum(math.comb(count, k) for k in range(int(low) + 1)) / 2**count
    assert outside <= 0.05 < outside + 2 * math.comb(count, int(low) + 1) / 2**count
