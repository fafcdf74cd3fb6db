"""The bounded form of `python -m tests.fuzz`: a few rounds of each kind, beside two threads that compress."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import fuzz

ROUNDS = 10


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whatever_happens_the_engines_say_what_the_oracle_says(kind: fuzz.Kind) -> None:
    seen = Counter[str]()
    for page in fuzz.PAGES:
        fuzz.asked(kind, page, 6)  # before the threads: with nothing beside it
    with fuzz.busy(2):
        for seed in range(ROUNDS):
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
