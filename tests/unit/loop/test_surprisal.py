"""Surprisal against its formula, and as what it is for: new words are more surprising than known ones."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DataError
from shoal.loop.surprisal import PAIRS, TRUST, UNSEEN, Surprisal

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
