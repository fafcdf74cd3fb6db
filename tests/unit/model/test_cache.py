"""Where the rows of a step stand, by eye; and how far a decoding row looks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal import presets
from shoal.model import reach
from shoal.model.cache import GroupCache, PagedStep, Rows, read_rows, write_rows
from shoal.model.paged import _past, _stale
from shoal.model.reach import Reach, way

POSITIONS = torch.tensor([4, 7, 8, 9, 3, 0, 1])  # requests of 1, 3, 1 and 2 rows
STARTS = [0, 1, 4, 5, 7]


def rows() -> Rows:
    return Rows(POSITIONS, STARTS, page=8, block=4)


def test_requests_with_one_row_decode_together_and_the_others_are_chunks() -> None:
    one = rows()
    assert (one.singles, one.chunks, one.longest) == ([0, 2], [1, 3], 3)
    assert one.offsets.tolist() == [4, 7, 0, 1, 3, 0, 1]
    assert one.block_ends.tolist() == [1, 4], "of positions 7 and 3"
    assert one.last.tolist() == [4, 9, 3, 1]
    assert one.single_rows.tolist() == [0, 4]
    assert (one.single.positions.tolist(), one.single.starts) == ([4, 3], [0, 1, 2])
    assert (one.single.page, one.single.block, one.single.chunks) == (8, 4, [])
    assert one.single.last.tolist() == [4, 3], "of one row each the last is that one"
    assert [one.of_at_least(least) for least in (1, 2, 3, 4)] == [
        [(0, 1), (1, 3), (2, 1), (3, 2)], [(1, 3), (3, 2)], [(1, 3)], [],
    ]  # fmt: skip
    nobody = Rows(POSITIONS[:0], [0], 8, 4)
    assert (nobody.singles, nobody.chunks, nobody.longest) == ([], [], 0)


def test_rows_are_parted_by_where_they_stand() -> None:
    single = Rows(torch.tensor([5, 2, 6, 4]), [0, 1, 2, 3, 4], 8, 4)
    (early, before), (late, after) = single.parted(5)
    assert (early.tolist(), before.positions.tolist(), before.starts) == ([1, 3], [2, 4], [0, 1, 2])
    assert (late.tolist(), after.positions.tolist(), after.starts) == ([0, 2], [5, 6], [0, 1, 2])
    assert {(each.page, each.block) for each in (before, after)} == {(8, 4)}


def test_a_slot_is_a_place_in_each_head_of_its_unit() -> None:
    """Memory as [U * Hk * P]: unit 2, slot 3 of 8 slots and 2 heads is row 2 * 16 + 3, and 8 further for the other head."""
    assert write_rows(torch.tensor([19, -1, 8]), kv_heads=2, page=8).tolist() == [35, 43, 0, 8, 16, 24]
    assert write_rows(torch.tensor([[19], [8]]), 2, 8).tolist() == [[35, 43], [16, 24]], "of each group"
    assert read_rows(torch.tensor([[3, 1]]), kv_heads=2).tolist() == [[[6, 2], [7, 3]]]


def test_a_step_makes_what_it_is_not_given_and_makes_it_once() -> None:
    made: list[int] = []

    def given(value: int) -> torch.Tensor:
        made.append(value)
        return torch.tensor([value])

    slots, tables = torch.tensor([19, -1]), torch.tensor([[2], [3]])
    plain = PagedStep(torch.tensor([3, 9]), slots, tables, [0, 1, 2], 8, 4)
    assert plain.units.tolist() == [2, 0]
    assert plain.written(2).tolist() == [35, 43, 0, 8] and plain.read(2).tolist() == read_rows(tables, 2).tolist()
    assert plain.written(2) is plain.written(2) and plain.read(2) is plain.read(2)
    assert (plain.rows.starts, plain.rows.page, plain.rows.block) == ([0, 1, 2], 8, 4) and plain.rows is plain.rows
    shared = rows()
    told = dataclasses.replace(plain, shared=shared, writes=lambda: given(1), reads=lambda: given(2))
    told._written = told._read = None
    for _ in range(2):
        assert (told.written(2).tolist(), told.read(2).tolist()) == ([1], [2])
    assert made == [1, 2] and told.rows is shared


def test_memory_has_a_place_for_each_slot_and_a_summary_for_each_block() -> None:
    c = presets.get("test").model
    plain = GroupCache.zeros(c, 3, torch.float64)
    assert plain.kv.shape == (c.group_layers, 3, c.kv_heads, c.page, 2 * c.head_dim) and plain.kv.dtype == torch.float64
    assert plain.summaries.shape == (c.group_layers, 3, c.kv_heads, c.page // c.block, c.head_dim)
    assert plain.summaries.dtype == torch.float64
    small = GroupCache.zeros(dataclasses.replace(c, summary="mean_var"), 3, torch.bfloat16, kv_dtype=torch.int8)
    assert small.kv.shape[-1] == 2 * c.head_dim + 4 and small.kv.dtype == torch.int8
    assert small.summaries.shape[-1] == 2 * c.head_dim and small.summaries.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "chooses", "dense", "how"),
    [  # a window of 12, 2 blocks of 4: 8 tokens; 2 (12 + 3 * 4) = 48
        (8, True, 0, "whole"), (9, True, 0, "masked"), (48, True, 0, "masked"), (49, True, 0, "chosen"),
        (12, False, 0, "whole"), (13, False, 0, "masked"), (24, False, 0, "masked"), (25, False, 0, "chosen"),
        (49, True, 49, "whole"), (49, True, 48, "chosen"),
    ],
)  # fmt: skip
def test_the_cheapest_way_that_the_length_allows(keys: int, chooses: bool, dense: int, how: str) -> None:
    assert way(keys, window=12, block=4, top_k=2, chooses=chooses, dense=dense) == how
    gate = torch.ones(1) if chooses else None
    assert Reach(12, 2, 1, gate, None, dense).way(keys, 4) == Reach(12, 2, 1, None, gate, dense).way(keys, 4) == how


def test_the_window_bounds_what_is_read_whole_where_it_is_the_shorter() -> None:
    found = [way(keys, window=6, block=4, top_k=2, chooses=True) for keys in (6, 7, 8)]
    assert found == ["whole", "masked", "masked"]


def test_a_dense_layer_reads_any_context_whole() -> None:
    gate = torch.ones(1)
    found = [reach.Reach(12, 2, 1, gate, None, dense).way(10**11, 4) for dense in (0, 10**10, reach.ALL)]
    assert found == ["chosen", "chosen", "whole"], "a hundred thousand million tokens"


def test_where_the_host_knows_the_ends_a_device_is_asked_for_nothing() -> None:
    """On meta every read raises. Behind position 9 of 16 stand six rows of each of two KV heads, as numbers or as truths."""
    there = Rows(POSITIONS.to("meta"), STARTS, 8, 4, ends=[4, 9, 3, 1])
    for one in (rows(), there):
        assert (one.end(0), one.of(1).end(0), one.of(3).end(0)) == (4, 9, 1)
    assert [there.of(1, count).end(0) for count in (1, 2, 3)] == [7, 8, 9] and rows().end(3) == 1
    assert _past(there.of(1).last, 16).is_meta
    last = rows().of(1).last
    assert last.tolist() == [9] and _stale(last, 2, 16).tolist() == [*range(10, 16), *range(26, 32)]
    assert _past(last, 16).nonzero()[:, 1].tolist() == [*range(10, 16)]
