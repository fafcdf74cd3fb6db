"""The bounded form of `python -m tests.fuzz`: a few rounds in fp32; those beside threads that compress, of which one takes as
long as the rounds do, and those in INT8 are drills. Kernels beside four: `tests/unit/model/test_lifetimes.py`."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import fuzz

# seeds of rounds, threads beside them
BESIDE = [pytest.param(rounds, n, marks=pytest.mark.drill) for rounds, n in ((range(10), 1), (range(10, 20), 2))]
ROUNDS = ((range(10), 0), *BESIDE)


@pytest.mark.parametrize(("rounds", "beside"), ROUNDS, ids=["alone", "beside-one", "beside-two"])
@pytest.mark.parametrize("kind", ["fp32", pytest.param("int8", marks=pytest.mark.drill)])
def test_whatever_happens_the_engines_say_what_the_oracle_says(kind: fuzz.Kind, rounds: range, beside: int) -> None:
    seen = Counter[str]()
    for page in fuzz.PAGES:
        fuzz.asked(kind, page, 6)  # before the threads: with nothing beside it
    with fuzz.busy(beside):
        for seed in rounds:
            seen += fuzz.Round(kind, seed, 6).run()
    for what in (
        "stop",
        "length",
        "preempted",
        "cached",
        "accepted",
        "rejected",
        "begun",
        "guided",
        "images",
        "adapted",
        "paid",
    ):
        assert seen[what] >= 10, (what, seen)
    assert seen["cancelled"]
