"""Intervals against closed forms, and against how often they hold what they are of."""

import math

import numpy as np
import pytest

from shoal.evaluate import intervals

DRAWS = 400


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # roots of (p - x)^2 = z^2 x (1 - x) / n; the first three are in every textbook
        (5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (22, 60, 0.2562, 0.4932), (1, 40, 0.0044, 0.1288),
    ],
)  # fmt: skip
def test_wilsons_interval_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    found = intervals.wilson(hits, count)
    assert found == pytest.approx((low, high), abs=5e-5)
    for end in found:
        p = hits / count
        assert (p - end) ** 2 == pytest.approx(intervals.Z**2 * end * (1 - end) / count, abs=1e-9)
    rows = [True] * hits + [False] * (count - hits)
    assert intervals.share(rows, range(count)) == pytest.approx(found), "each row a group of its own"


def test_rows_of_a_group_that_all_agree_count_once() -> None:
    """Ten rows of each of 20 groups are 20 groups, if the ten say the same."""
    groups = [group for group in range(20) for _ in range(10)]
    alike = [group < 6 for group in groups]
    assert intervals.share(alike, groups) == pytest.approx(intervals.wilson(6, 20), abs=0.01)
    assert intervals.share([False] * 200, groups) == intervals.wilson(0, 20)
    assert intervals.share([], []) == (0.0, 1.0)
    low, high = intervals.share([True, False, True], [1, 1, 1])
    assert high - low > 0.7, "one group says next to nothing"


def test_a_means_interval_is_the_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    low, high = intervals.mean(values, range(4))
    error = np.std(values, ddof=1) / 2
    assert (low, high) == pytest.approx((4 - 1.959964 * error, 4 + 1.959964 * error))
    doubled = intervals.mean(values + values, [*range(4), *range(4)])
    assert doubled == pytest.approx((low, high)), "every row twice is no more than every row"
    assert intervals.mean([3.0, 5.0], [7, 7]) == (-math.inf, math.inf)
    assert intervals.mean([1.0, 3.0], [7, 8]) == pytest.approx((2 - 1.959964, 2 + 1.959964)), "two groups are enough"
    large = np.arange(1e8, 1e8 + 8000, 8).astype(np.float32)
    assert intervals.mean(large, range(1000)) == intervals.mean(large.tolist(), range(1000)), "in doubles"  # type: ignore[arg-type]


def test_a_quotients_interval_is_near_the_delta_methods() -> None:
    draws = np.random.default_rng(3)
    below = draws.uniform(50, 150, 400)
    above = below * draws.normal(2.0, 0.2, 400)
    ratio = above.sum() / below.sum()
    error = np.sqrt(((above - ratio * below) ** 2).sum()) / below.sum()
    low, high = intervals.quotient(above, below)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)
    assert intervals.quotient(above[:1], below[:1]) == (-math.inf, math.inf)
    assert intervals.quotient([*above, 3.0], [*below, 0.0]) == (low, high), "what holds nothing is nothing"


@pytest.mark.parametrize("kind", ["share", "mean", pytest.param("quotient", marks=pytest.mark.drill)])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(kind: str) -> None:
    """40 groups of 5 rows, whose rows are alike: rows taken as independent would hold it three times in four. Of 400 draws
    95 % are 380, give or take 9 (two standard deviations); few groups cost the normal and the bootstrap some."""
    draws, held, naive, other = np.random.default_rng(1), 0, 0, (0.5, 0.5)
    groups = np.repeat(np.arange(40), 5)
    for _ in range(DRAWS):
        p = draws.beta(1.0, 1.0, 40)  # of each group; 0.5 in the mean
        rows = draws.random(200) < p[groups]
        if kind == "share":
            low, high = intervals.share(rows.tolist(), groups.tolist())
            other = intervals.wilson(float(rows.sum()), 200)
        elif kind == "mean":
            low, high = intervals.mean(rows.astype(float).tolist(), groups.tolist())
            other = intervals.mean(rows.astype(float).tolist(), range(200))
        else:
            low, high = intervals.quotient(np.bincount(groups, rows), np.full(40, 5.0))
        held += low <= 0.5 <= high
        naive += other[0] <= 0.5 <= other[1]
    assert 0.92 <= held / DRAWS <= 0.975
    if kind != "quotient":
        assert naive / DRAWS < 0.88


def test_a_share_counts_as_many_rows_as_would_scatter_so() -> None:
    """20 groups of ten rows that agree, 6 of them hits: the groups' sums scatter as 20 drawn ones do, 20/19 more than these."""
    groups = [group for group in range(20) for _ in range(10)]
    count = 19 * 200 / 199
    found = intervals.share([group < 6 for group in groups], groups)
    assert found == pytest.approx(intervals.wilson(0.3 * count, count), rel=1e-12)


def test_rows_that_scatter_less_than_chance_count_as_what_they_are() -> None:
    """One hit in every pair."""
    groups = [pair for pair in range(30) for _ in range(2)]
    assert intervals.share([True, False] * 30, groups) == pytest.approx(intervals.wilson(30, 60))


def test_a_figure_says_of_how_many_rows_and_groups_it_is() -> None:
    hit, groups = [True, False, True, False, False], [1, 1, 2, 2, 3]
    assert intervals.of_share(hit, groups) == intervals.Figure(0.4, intervals.share(hit, groups), 5, 3)
    values = [1.0, 2.0, 6.0, 1.0, 0.0]
    assert intervals.of_mean(values, groups) == intervals.Figure(2.0, intervals.mean(values, groups), 5, 3)
    above, below = [1.0, 2.0], [4.0, 4.0]
    assert intervals.of_quotient(above, below, 7) == intervals.Figure(0.375, intervals.quotient(above, below), 7, 2)
    assert intervals.of_share([True], [1]).value == 1 and intervals.of_mean([3.0], [1]).value == 3
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
    """Where all are hits, or none, rounding would be beyond; without any row it is all of both."""
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    for count in range(1, 200):
        assert intervals.wilson(0, count)[0] == 0 and intervals.wilson(count, count)[1] == 1
