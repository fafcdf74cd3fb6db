"""Surprisal against its formula, and as what it is for: new words are more surprising than known ones."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DataError
from shoal.loop.surprisal import EVERY, PAIRS, TRUST, UNSEEN, Learned, Surprisal

KNOWN = [[1, 2, 3], [1, 2, 4], [1, 2, 3]]


def test_it_is_what_its_formula_gives() -> None:
    """Of [1, 2, 4] by hand, among 9 tokens of 10 kinds."""
    total = 9 + UNSEEN * 10
    first = (3 + UNSEEN) / total
    trust = 3 / (3 + TRUST)
    second = trust * 1.0 + (1 - trust) * (3 + UNSEEN) / total
    third = trust / 3 + (1 - trust) * (1 + UNSEEN) / total
    wanted = -(math.log(first) + math.log(second) + math.log(third)) / 3
    assert Surprisal.counted(KNOWN, 10).of([1, 2, 4]) == pytest.approx(wanted, rel=1e-12)


def test_of_a_longer_prompt_the_most_surprising_tenth_counts() -> None:
    """Four new words among 36 that are known are as surprising as they are alone."""
    table = Surprisal.counted([[1] * 100], 10)
    alone = -math.log((0 + UNSEEN) / (100 + UNSEEN * 10))
    mixed = [1] * 35 + [5, 6, 5, 6, 1]
    trust = 99 / (99 + TRUST)
    after_one = -math.log((1 - trust) * math.exp(-alone))  # the first of them follows a word with which others go
    assert table.of(mixed) == pytest.approx((after_one + 3 * alone) / 4, rel=1e-9)
    few = table.of([1, 1, 1, 1, 5])
    usual = -math.log(trust + (1 - trust) * (100 + UNSEEN) / (100 + UNSEEN * 10))
    first = -math.log((100 + UNSEEN) / (100 + UNSEEN * 10))
    assert few == pytest.approx((after_one + first + usual) / 3, rel=1e-9)


def test_new_words_surprise_more_than_old_words_in_another_order_and_these_more_than_old_ones() -> None:
    table = Surprisal.counted(KNOWN * 20, 1_000)
    old, turned, new = (table.of(prompt) for prompt in ([1, 2, 3], [3, 2, 1], [7, 8, 9]))
    assert old is not None and turned is not None and new is not None and old < turned < new
    assert table.of([]) is None


@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=40))
def test_it_is_a_positive_number_whatever_is_asked(prompt: list[int]) -> None:
    found = Surprisal.counted(KNOWN, 1_000).of(prompt)
    assert found is not None and math.isfinite(found) and found >= 0


def test_a_file_of_it_says_the_same(tmp_path: Path) -> None:
    table = Surprisal.counted(KNOWN, 1_000)
    table.write(tmp_path / "tokens.npz")
    assert Surprisal.read(tmp_path / "tokens.npz").of([1, 2, 7]) == table.of([1, 2, 7])
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]
    np.savez(tmp_path / "wrong.npz", single=np.zeros(3), followed=np.zeros(3), pairs=np.zeros(PAIRS - 1))
    (tmp_path / "none.npz").write_text("no")
    for name in ("wrong.npz", "none.npz", "absent.npz"):
        with pytest.raises(DataError, match="no table of tokens"):
            Surprisal.read(tmp_path / name)


def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_a_service_learns_its_table_once_and_all_its_processes_take_the_first(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npz"
    first, second = Learned(path, 10, wanted=3), Learned(path, 10, wanted=60)
    assert [second.of([9, 9]) for _ in range(EVERY - 1)] == [None] * (EVERY - 1)
    assert [first.of(prompt) for prompt in KNOWN] == [None] * 3
    wanted = Surprisal.counted(KNOWN, 10).of([1, 2, 4])
    until(lambda: first.of([1, 2, 4]) == wanted)
    assert second.of([9, 9]) is None  # and it looks
    until(lambda: second.of([1, 2, 4]) == wanted)
    later = Learned(path, 10, wanted=3)
    until(lambda: later.of([1, 2, 4]) == wanted)
    assert first.of([1, 2, 4]) == wanted, "what comes later changes nothing"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_ids_that_no_token_has_are_not_counted(tmp_path: Path) -> None:
    table = Surprisal.counted([[1, 2, 99]], 10)
    assert table.of([1, 2]) == Surprisal.counted([[1, 2]], 10).of([1, 2])


@pytest.mark.parametrize("wrong", ["a folder that is not there", "a table that cannot be read"])
def test_a_table_that_cannot_be_had_is_said_and_costs_its_number_alone(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens.npz"
    if wrong == "a table that cannot be read":
        path.write_text("no")
    else:
        path = tmp_path / "none" / "tokens.npz"
    table = Learned(path, 10, wanted=2)
    for _ in range(300):
        assert table.of([1, 2]) is None
    until(lambda: not any(thread.name == "surprisal" for thread in threading.enumerate()))
    assert 1 <= len(caplog.records) <= 20
