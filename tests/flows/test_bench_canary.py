"""The benchmark of canaries, on few trials with few people: it drives the trial that a gateway has."""

from __future__ import annotations

import pytest

from benchmarks.canary import PATTERNS, WORSE, canary, trial_of
from shoal.errors import UsageError
from shoal.progress import results


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_that_is_worse_goes_and_an_equal_one_stays_whatever_the_traffic(pattern: str) -> None:
    assert sum(trial_of(pattern, WORSE, seed, 150, 80)[0] for seed in range(4)) >= 3
    assert trial_of(pattern, 0.0, 0, 20, 20)[0] is False


@pytest.mark.drill
@pytest.mark.parametrize("pattern", PATTERNS)
def test_of_equal_ones_five_in_a_hundred_go_at_most(pattern: str) -> None:
    """Of 60 trials the promise of 5 % lets chance make 6."""
    assert sum(trial_of(pattern, 0.0, seed, 30, 30)[0] for seed in range(60)) <= 6


def test_a_pattern_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="patterns"):
        canary(results(), patterns=("holidays",))
