"""The order of training: shares kept everywhere, each row once an epoch, the same at any world size."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.data import order
from shoal.data.documents import MODALITIES
from shoal.data.order import (
    SPAN,
    Mix,
    RowOrder,
    cut,
    length_groups,
    padding,
    parse_mix,
    permutation,
    permuted,
    shuffled,
)
from shoal.errors import ConfigError, UsageError

SHARES = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1), min_size=1)


@given(SHARES, st.integers(0, 5000), st.integers(1, 400))
@settings(deadline=None)
def test_every_stretch_has_the_shares_asked_for(shares: dict[str, float], start: int, length: int) -> None:
    mix = Mix(shares)
    counts = Counter(mix.at(position)[0] for position in range(start, start + length))
    for name, share in mix.shares.items():
        assert abs(counts[name] - share * length) <= len(shares) + 1
        assert share == pytest.approx(shares[name] / sum(shares.values()), abs=0.002)


MODAL = st.fixed_dictionaries({name: st.floats(0.01, 1) for name in MODALITIES})


@given(MODAL, MODAL, st.integers(0, 10**9))
def test_shares_by_token_hold_within_1_point_of_1000_rows_and_5_of_any_50(
    shares: dict[str, float], fills: dict[str, float], start: int
) -> None:
    """`fills`: how full the rows of a modality are; scaled so that none is less than half as full as another."""
    tokens = {name: round(512 * (0.5 + fill / 2)) for name, fill in fills.items()}
    order = RowOrder({name: shares[name] / tokens[name] for name in shares}, dict.fromkeys(shares, 77), seed=0)
    total = sum(shares.values())
    for length, within in ((1000, 0.01), (50, 0.05)):
        read: Counter[str] = Counter()
        for position in range(start, start + length):
            name, _ = order.at(position)
            read[name] += tokens[name]
        for name, share in shares.items():
            assert abs(read[name] / read.total() - share / total) <= within


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_short_source_repeats_in_another_order_each_time(short: int, long: int, seed: int) -> None:
    order = RowOrder({"text": 0.5, "code": 0.5}, {"text": short, "code": long}, seed)
    read = [order.at(position) for position in range(2 * 3 * short)]
    seen = [row for name, row in read if name == "text"]
    rounds = [seen[at : at + short] for at in range(0, len(seen), short)]
    assert len(rounds) == 3 and all(sorted(one) == list(range(short)) for one in rounds)
    if short > 9:
        assert len({tuple(one) for one in rounds}) == 3


@given(SHARES, st.integers(1, 300))
@settings(deadline=None)
def test_occurrences_count_up_without_a_gap(shares: dict[str, float], length: int) -> None:
    seen: Counter[str] = Counter()
    mix = Mix(shares)
    for position in range(length):
        name, before = mix.at(position)
        assert before == seen[name]
        seen[name] += 1


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}])
def test_shares_that_mean_nothing_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="mix"):
        Mix(shares)


@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 3))
@settings(deadline=None)
def test_each_row_comes_once_an_epoch(count: int, seed: int, epoch: int) -> None:
    drawn = [shuffled(count, epoch * count + place, seed, 1) for place in range(count)]
    assert sorted(drawn) == list(range(count))


def test_epochs_seeds_and_modalities_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(50, *key)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(orders) == 4


def test_the_order_is_that_of_numpys_promised_stream() -> None:
    """A change here would make every resumed run see other rows than those it has not seen."""
    assert permutation(10, 7, 0).tolist() == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1]


class Coarse:
    """A stream of numbers of which only the highest `bits` bits are told, so that many are equal."""

    def __init__(self, stream: np.random.PCG64, bits: int) -> None:
        self._stream, self._bits = stream, np.uint64(64 - bits)

    def random_raw(self, count: int) -> np.ndarray:
        return self._stream.random_raw(count) >> self._bits << self._bits


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Forgets what is known of orders; so it is after the test, too."""

    def clear() -> None:
        for known in (permutation, order._ends, order._span):
            known.cache_clear()

    yield clear
    clear()


@given(st.integers(1, 150), st.integers(1, 70), st.integers(5, 64), st.integers(0, 2**32), st.integers(1, 64))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_order_by_spans_is_the_order(
    forget: Callable[[], None], count: int, span: int, drawn: int, seed: int, bits: int
) -> None:
    """Also where spans have few numbers or none, and where many numbers are equal."""
    real = order._numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "SPAN", span)
        patch.setattr(order, "DRAWN", drawn)
        patch.setattr(order, "_numbers", lambda *key: Coarse(real(*key), bits))
        forget()
        found = [permuted(count, place, seed, 1) for place in range(count)]
        assert found == permutation(count, seed, 1).tolist()


def test_an_order_of_many_rows_is_that_of_numpys_promised_stream() -> None:
    """Of more rows than a span may have, beside the whole that is sorted."""
    count = SPAN + SPAN // 2
    raw = np.random.PCG64(np.random.SeedSequence((7, 0, 3))).random_raw(count)
    wanted = np.argsort(raw, kind="stable")
    places = [0, 1, count // 2 - 1, count // 2, count // 2 + 1000, count - 1]
    assert [shuffled(count, 3 * count + place, 7, 0) for place in places] == wanted[places].tolist()


def test_an_order_of_more_rows_takes_no_more_memory(
    forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was 3.1 GB a rank of the rows of 10 TB, and 1.2 GB an epoch from then on."""
    forget()
    monkeypatch.setattr("shoal.data.order.SPAN", 2**13)
    monkeypatch.setattr("shoal.data.order.DRAWN", 2**13)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            rows = RowOrder({"text": 1.0}, {"text": count}, 5)
            for position in range(0, 2 * count, 2**11):  # two epochs
                rows.at(position)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2**14)
    assert peak(2**18) < 1.2 * peak(2**17)


def test_a_span_is_drawn_once_while_it_is_read(forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three modalities, where each step's rows are looked up twice: a step ahead, too."""
    drawn, real = Counter[int](), order._stream

    def stream(count: int, bits: int, *key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        drawn[count] += 1
        return real(count, bits, *key)

    monkeypatch.setattr(order, "SPAN", 64)
    monkeypatch.setattr(order, "_stream", stream)
    forget()
    counts = {"text": 512, "image": 511, "code": 510}
    rows = RowOrder({"text": 0.4, "image": 0.3, "code": 0.3}, counts, 5)
    for step in range(100):
        read = [rows.at(position) for position in range(8 * step, 8 * step + 16)]
        assert len(set(read)) == len(read)
    assert drawn == {512: 1 + 5, 511: 1 + 4, 510: 1 + 4}, "how many each span has, and each that was reached"


@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 200), st.integers(0, 9))
@settings(deadline=None)
def test_groups_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    sizes = np.array(lengths)
    groups = length_groups(sizes, budget, seed, 0)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * sizes[group].max() <= budget for group in groups)


def test_grouping_by_length_saves_padding() -> None:
    sizes = np.random.default_rng(0).integers(5, 200, 2000)
    grouped = padding(length_groups(sizes, 2000, 0, 0), sizes)
    assert grouped < 0.1 < 0.3 < padding(cut(permutation(2000, 0), sizes, 2000), sizes)


def test_a_mix_is_shares_that_sum_to_one() -> None:
    assert parse_mix("text=60, image=20,code=20") == parse_mix({"text": 3, "image": 1, "code": 1})


@pytest.mark.parametrize(
    "mix", ["", "text", "text=abc", "text=nan", "text=inf", "film=1", "text=0", "text=-1,code=2", {}]
)
def test_what_is_no_mix_is_refused(mix: str | dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--mix"):
        parse_mix(mix)


def test_groups_are_those_of_windows_of_the_shuffled_rows_longest_first() -> None:
    """Written out for ten rows, in the order of the test above: a change here is another order for every resumed run."""
    sizes = np.array([5, 5, 5, 5, 5, 9, 9, 3, 3, 3])
    longest_first = [[6, 5], [3, 4, 0], [2, 1, 9], [8, 7]]  # 18 tokens hold two of 9, three of 5, and six of 3
    assert [
        group.tolist() for group in cut(np.array([row for group in longest_first for row in group]), sizes, 18)
    ] == longest_first
    found = [group.tolist() for group in length_groups(sizes, 18, 7)]
    assert found == [longest_first[at] for at in permutation(4, 7, 1)]


def test_rows_of_a_group_come_from_one_window() -> None:
    """1,024 shuffled rows that are sorted together; so the groups of the next epoch are others."""
    sizes = np.random.default_rng(0).integers(5, 200, 2500)
    window = {int(row): place // 1024 for place, row in enumerate(permutation(2500, 3, 0))}
    groups = length_groups(sizes, 2000, 3)
    assert all(len({window[row] for row in group.tolist()}) == 1 for group in groups)
    assert {window[group[0]] for group in groups} == {0, 1, 2}


def test_a_mix_is_kept_to_a_thousandth_and_what_is_left_over_goes_to_the_largest_remainders() -> None:
    assert Mix({"a": 1, "b": 1, "c": 1}).parts == {"a": 334, "b": 333, "c": 333}
    assert Mix({"a": 0.5004, "b": 0.4996}).parts == {"a": 1, "b": 1}, "500.4 and 499.6"
    assert Mix({"a": 0.7004, "b": 0.0, "c": 0.2996}).parts == {"a": 7, "c": 3}


def test_each_position_goes_to_who_is_furthest_behind() -> None:
    """Of 3 to 1: behind by 3/4 and 1/4; 2/4 and 2/4; 1/4 and 3/4; 4/4 and 0."""
    assert [Mix({"a": 3, "b": 1}).at(position) for position in range(5)] == [
        ("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 3),
    ]  # fmt: skip


def test_rows_of_a_modality_are_shuffled_by_the_seed_its_place_and_the_epoch() -> None:
    for place, name in enumerate(MODALITIES):
        order = RowOrder({name: 1.0}, {name: 10}, seed=7)
        read = [order.at(position) for position in range(20)]
        assert read == [(name, int(row)) for epoch in (0, 1) for row in permutation(10, 7, place, epoch)]


def test_an_order_that_is_kept_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 1)[0] = 3
