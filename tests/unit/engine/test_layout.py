"""Where the rows of a step stand, what a device is sent and asked, and which rows tell what early exits would have lost: by
counting, row by row."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shoal import presets
from shoal.config import GROUPS
from shoal.engine.compared import Audited, Compared, divergences
from shoal.engine.device import Unread, fetched, picked, viewed
from shoal.engine.holding import Holding
from shoal.engine.layout import StepLayout
from shoal.engine.plan import Work
from shoal.engine.told import ADAPTERS, IDS, POSITIONS, REQUESTS, SLOTS, Told

CONFIG = presets.get("test").model
CPU, PAGE = torch.device("cpu"), CONFIG.page


def work(start: int, count: int, last: int = GROUPS, seed: int = 0, **more: Any) -> Work:
    """Rows of a request that holds pages of its own, of which group j has computed some tokens fewer than group j - 1."""
    holding = Holding.nothing([0] * (start + count), None, PAGE, start + count + 5 * seed)
    rng = np.random.default_rng(seed)
    holding.tables[:] = rng.permutation(holding.tables.size).reshape(holding.tables.shape) + 1000 * (seed + 1)
    holding.computed = [start + 2 - j for j in range(GROUPS)]
    running = SimpleNamespace(holding=holding, request=SimpleNamespace(gaps=more.pop("gaps", False)))
    return Work(running, start, count, 0, last, **more)  # type: ignore[arg-type]


class Adapted:
    """What stands beside the rows of some works."""

    def __init__(self, works: Any) -> None:
        self.works, self.rows = works, None

    def first(self, rows: int) -> tuple[Any, int]:
        return [*self.works], rows


def test_each_row_stands_in_its_request_s_pages() -> None:
    works = [work(2 * PAGE - 2, 5, seed=0), work(3, 1, seed=1), work(0, 2 * PAGE, seed=2), work(PAGE, 1, seed=3)]
    layout = StepLayout(works, CONFIG, CPU, Adapted)  # type: ignore[arg-type]
    assert layout.starts == [0, 5, 6, 6 + 2 * PAGE, 7 + 2 * PAGE]
    longest = max(-(-each.end // PAGE) for each in works)
    for group in range(GROUPS):
        for count in range(1, len(works) + 1):
            rows = layout.starts[count]
            step = layout.step(group, rows)
            positions, slots = list[int](), list[int]()
            for each in works[:count]:
                holding = each.running.holding
                for at in range(each.start, each.end):
                    positions.append(at)
                    unit = int(holding.tables[group, at // PAGE])
                    slots.append(unit * PAGE + at % PAGE if at >= holding.computed[group] else -1)
            assert step.positions.tolist() == positions and step.slots.tolist() == slots
            assert step.starts == layout.starts[: count + 1] and (step.page, step.block) == (PAGE, CONFIG.block)
            assert step.tables.shape == (count, longest)
            assert step.tables.dtype == step.slots.dtype == step.positions.dtype == torch.int64
            for r, each in enumerate(works[:count]):
                own = each.running.holding.tables[group, :longest].tolist()
                assert step.tables[r].tolist() == own + [0] * (longest - len(own))
            heads = range(CONFIG.kv_heads)
            assert step.written(CONFIG.kv_heads).tolist() == [
                max(slot, 0) // PAGE * PAGE * CONFIG.kv_heads + head * PAGE + max(slot, 0) % PAGE
                for slot in slots
                for head in heads
            ]
            assert step.read(CONFIG.kv_heads).tolist() == [
                [[unit * CONFIG.kv_heads + head for unit in table] for head in heads] for table in step.tables.tolist()
            ]
            assert step.beside == (works, rows) and step.rows.starts == step.starts
            assert layout.step(group, rows).rows is step.rows, "made once for all groups"
    some = layout.of(works[1:3])
    assert some.starts == [0, 1, 1 + 2 * PAGE] and some.step(0, 1).beside == (works[1:3], 1)
    assert some.step(0, 1).positions.tolist() == [3]
    assert StepLayout(works, CONFIG, CPU, lambda _: None).step(0, 5).beside is None


def test_a_graph_is_told_each_row_of_a_step_and_that_those_beyond_are_nobody_s() -> None:
    """Whatever was there before: what is left of a longer step would be written to another's slots."""
    told = Told(CONFIG, 4, 9, CPU)
    long = [work(2 * PAGE - 2, 5, seed=0), work(3, 1, seed=1), work(PAGE, 2, 2, seed=2)]
    short = [work(5, 1, 1, seed=3)]
    assert told.rows.tolist() == [[0] * 9] * 3 + [[-1] * 9] * (1 + GROUPS) and told.going.tolist() == [0] * GROUPS
    # rows of a request have the table of its number, which is another one where some draft on and some do not
    for works, requests, adapters in ((long, [2, 0, 1], [-1, 1, 0]), (short, [0], [-1]), (short, [0], [2])):
        planned = [works[requests.index(number)] for number in range(len(works))]
        for each in works:
            each.running.tokens = [100 * each.start + place for place in range(each.end)]
        told.fill_tables(planned)
        rows = list[list[int]]()
        for each, request, adapter in zip(works, requests, adapters, strict=True):
            holding = each.running.holding
            for at in range(each.start, each.end):
                slots = [
                    int(holding.tables[group, at // PAGE]) * PAGE + at % PAGE
                    if at >= holding.computed[group] and group < each.last
                    else -1
                    for group in range(GROUPS)
                ]
                rows.append([100 * each.start + at, at, request, adapter, *slots])
        going = [sum(each.count for each in works if each.last > group) for group in range(GROUPS)]
        assert told.fill(works, requests, adapters) == told.going.tolist() == going
        assert (IDS, POSITIONS, REQUESTS, ADAPTERS, SLOTS) == (0, 1, 2, 3, 4)
        nobody = [0, 0, 0, -1, *[-1] * GROUPS]
        assert told.rows.T.tolist() == rows + [nobody] * (9 - len(rows))


def test_numbers_come_in_one_copy_as_they_are() -> None:
    given = [
        torch.tensor([[0.1, 2.0], [3.0, -4.0]]), torch.tensor([], dtype=torch.int64), torch.tensor([2**53, -7]),
        torch.tensor([True, False]),
    ]  # fmt: skip
    wanted = [each.flatten().tolist() for each in given]
    assert fetched(*given) == wanted and fetched(given[1]) == [[]]


def test_what_is_unread_comes_once_and_each_part_to_whom_it_is_for() -> None:
    unread, came = Unread(), list[tuple[str, list[list[float]]]]()
    unread.read()
    unread.add([torch.tensor([1, 2]), torch.tensor([0.5])], lambda numbers: came.append(("first", numbers)))
    unread.add([torch.tensor([True])], lambda numbers: came.append(("second", numbers)))
    assert len(unread.tensors) == 3 and not came
    unread.read()
    unread.read()
    assert came == [("first", [[1.0, 2.0], [0.5]]), ("second", [[1.0]])] and not unread.tensors


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_the_number_in_a_row_s_column_is_picked(kind: torch.dtype) -> None:
    x = torch.arange(12.0).view(3, 4).to(kind)
    assert picked(x, torch.tensor([3, 0, 2])) == [3.0, 4.0, 10.0]
    seen = viewed(x.requires_grad_())
    assert (seen is None) == (kind == torch.bfloat16)
    if seen is not None:
        seen[0, 0] = 7.0
        assert x[0, 0] == 7.0, "the same memory"
    assert viewed(torch.zeros(1, device="meta")) is None


# ---- what early exits would have lost


def test_rows_that_are_compared_are_those_of_full_depth_that_want_it_and_give_a_token() -> None:
    """A verification gives a row of logits for each of its rows, and a sample for itself; what gives no token gives neither."""
    works = [
        work(9, 3, sample=True, verify=True, gaps=True), work(9, 4, sample=True, gaps=True),
        work(0, 2, gaps=True), work(9, 1, sample=True), work(9, 1, sample=True, gaps=True),
        work(9, 1, GROUPS - 1, sample=True, gaps=True),
    ]  # fmt: skip
    starts = [0, 3, 7, 9, 10, 11, 12]
    found = Compared.of(works, starts, CONFIG)
    assert found is not None
    assert (found.rows, found.samples, found.at) == ([6, 10], [1, 3], [3, 5])
    assert Compared.of([works[0], works[2], works[3], works[5]], [0, 3, 5, 6, 7], CONFIG) is None
    logits = torch.zeros(7, 2, dtype=torch.float64)
    logits[3, 0], logits[5, 0] = math.log(3.0), math.log(9.0)  # p: three quarters and nine tenths
    net = SimpleNamespace(logits=lambda states: states)
    found.exits = [logits[[3, 3]], torch.zeros(2, 2, dtype=torch.float64)]
    kl = 0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)
    even = [math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p) for p in (0.75, 0.9)]
    unread = Unread()
    gaps = found.gaps(logits, net, unread)  # type: ignore[arg-type]
    assert not gaps, "they come with what else is read"
    unread.read()
    assert gaps == {
        1: pytest.approx((0.0, even[0]), abs=1e-12), 3: pytest.approx((kl, even[1]), abs=1e-12),
    }  # fmt: skip


def test_rows_that_an_exit_gave_are_compared_there_with_full_depth_a_few_at_a_time() -> None:
    works = [work(3, 2), work(10, 6, spans=[(1, 11, 13), (2, 13, 16)])]
    found = Audited.of(works, [0, 2, 8], CONFIG)
    assert found is not None and Audited.of(works[:1], [0, 2], CONFIG) is None
    assert found.spans == [(1, slice(3, 5)), (2, slice(5, 8))] and found.full == CONFIG.layers == 4
    draws = torch.Generator().manual_seed(0)
    states = {layers: torch.randn(8, 5, generator=draws, dtype=torch.float64) for layers in range(1, 5)}
    for layers, x in states.items():
        found.see(layers, given := x.clone())
        given.zero_()  # the next layers may write there
    read = list[tuple[int, int]]()
    net: Any = SimpleNamespace(head=lambda some, layers: (read.append((len(some), layers)), some)[1])
    wanted = []
    for exit_, row in ((1, 3), (1, 4), (2, 5), (2, 6), (2, 7)):
        p, q = (states[layers][row].softmax(-1) for layers in (4, exit_))
        wanted.append(float((p * (p / q).log()).sum()))
    assert found.lost(net, 2) == pytest.approx(wanted) and min(wanted) > 0.1
    assert read == [(2, 4), (2, 1), (2, 4), (2, 2), (1, 4), (1, 2)]
    found.given[1][0, 0] = math.nan
    assert [math.isnan(one) for one in found.lost(net, 9)] == [False, False, True, False, False]


def test_an_exit_loses_nothing_less_than_nothing_and_a_row_without_a_number_tells_nothing() -> None:
    full = torch.tensor([[0.1, 0.2, 0.3], [0.0, math.nan, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    exit_ = full.clone()
    exit_[2, 0] = -math.inf  # full depth gives what it never does
    first, *others = divergences(full, [exit_, full])
    assert first == (0.0, 0.0) and others == [(), (), ()]
    assert divergences(full, []) == []
