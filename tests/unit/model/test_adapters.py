"""What stands beside a network's linears: which rows get it, and in which of three ways; that merged models say the same:
tests/unit/engine/test_adapters.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal import presets
from shoal.model import adapters
from shoal.model.adapters import IN_LOOPS, NONE, Adapter, Bank, Stack, alone, kept, nothing
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.linears import Int8Linear, Linear
from shoal.model.net import Net
from tests.unit.model.test_places import WIDTHS, adapter


def network() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*each, bias=False, dtype=torch.float64) for each in WIDTHS.values()))


HELD = [adapter("one", 3), adapter("two", 1, "1"), adapter("three", 2, "0")]


class Ways:
    """Where a CPU or a GPU has loops of its own, which are written out here."""

    def __init__(self, patch: pytest.MonkeyPatch, on: str) -> None:
        self.did: list[str] = []
        patch.setattr(fused, "usable", lambda x: on == "cpu")
        patch.setattr(launch, "usable", lambda x: on == "gpu")
        patch.setattr(fused, "beside", self.beside)
        patch.setattr(launch, "add_thin", self.add_thin)

    def beside(self, x: Tensor, numbers: Any, places: Any, of: Any, out: Tensor) -> None:
        self.did.append("loop")
        for n, k in enumerate(of.tolist()):
            if k >= 0:
                a, b = matrices(numbers, places[k], x.shape[1], out.shape[1])
                out[n] += x[n] @ a.T @ b

    def add_thin(self, x: Tensor, a: Tensor, b: Tensor, bounds: Tensor, most: int, of: Tensor, out: Tensor) -> None:
        assert bounds.dtype == torch.int32 and most == int((bounds[1] - bounds[0]).max())
        self._add("kernels", x, a, b, bounds[0], bounds[1], of, out)

    def _add(self, way: str, x: Tensor, a: Tensor, b: Tensor, first: Any, last: Any, of: Any, out: Tensor) -> None:
        self.did.append(way)
        for n, k in enumerate(of.tolist()):
            if k >= 0:
                out[n] += x[n] @ a[int(first[k]) : int(last[k])].T @ b[int(first[k]) : int(last[k])]


def matrices(numbers: Any, place: Any, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """A and B of the adapter that lies at a place."""
    (a, b, ranks), there = place.tolist(), torch.from_numpy(numbers)
    return there[a : a + ranks * inputs].view(ranks, inputs), there[b : b + ranks * outputs].view(ranks, outputs)


@pytest.mark.parametrize("on", ["cpu", "gpu", "neither"])
@pytest.mark.parametrize("rows", [1, IN_LOOPS, IN_LOOPS + 2])
def test_few_rows_go_by_the_loops_that_there_are_and_each_gets_what_is_its_own(
    on: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of several ranks, beside both linears or one; rows in whatever dimensions, and none of an adapter."""
    ways, net, draw = Ways(monkeypatch, on), network(), torch.Generator().manual_seed(rows)
    counts = [rows] if rows == 1 else [2, rows // 2 - 4, 1, rows - rows // 2 - 1, 2]
    of = [HELD[1]] if rows == 1 else [HELD[2], HELD[1], None, HELD[0], HELD[2]]
    beside = Bank(net, HELD).beside(of, counts)
    each = [one for one, count in zip(of, counts, strict=True) for _ in range(count)]
    for name, linear in net.named_children():
        inputs, outputs = WIDTHS[name]
        x = torch.randn(rows, inputs, generator=draw, dtype=torch.float64)
        y = torch.randn(rows, outputs, generator=draw, dtype=torch.float64)
        want = y.clone()
        for n, one in enumerate(each):
            if one is not None and name in one.pairs:
                a, b = one.pairs[name]
                want[n] += x[n] @ a.T @ b
        shape = (rows,) if rows == 1 else (2, rows // 2)
        with torch.no_grad():
            got = beside.add(linear, x.view(*shape, inputs), y.view(*shape, outputs))
        torch.testing.assert_close(got.view(rows, outputs), want, rtol=0, atol=1e-12)
        assert got.data_ptr() == y.data_ptr(), "what the linear gave is changed"
    own = {"cpu": "loop", "gpu": "kernels", "neither": ""}[on]
    assert ways.did == ([own] * 2 if own and rows <= IN_LOOPS else [])


def test_a_linear_that_no_adapter_changes_stays_as_it_is() -> None:
    net, x = network(), torch.ones(2, 6, dtype=torch.float64)
    beside = Bank(net, [HELD[1]]).beside([HELD[1]], [2])
    y = torch.zeros(2, 4, dtype=torch.float64)
    assert beside.add(net[0], x, y) is y and not y.any()
    numbers, places, of = beside.layer([net[0]])
    assert (numbers.shape, numbers.dtype, places.tolist(), of.tolist()) == ((0,), np.float64, [[[0, 0, 0]]], [0, 0])
    numbers, places, of = beside.layer([net[1], net[0]])
    assert places[1].tolist() == [[0, 0, 0]] and places[0, 0, 2] == 1 and len(numbers) == 4 + 5
    assert alone(net, None, 3) is None
    assert alone(net, HELD[1], 3).layer([net[1]])[-1].tolist() == [0, 0, 0]  # type: ignore[union-attr]


def test_the_loops_of_a_layer_are_given_what_stands_beside_each_of_its_linears() -> None:
    """In one memory, in which the stacks lie themselves; once for all steps, each with its own rows."""
    net = Net(presets.get("test").model)
    linears = net.groups[2].blocks[0]._products  # type: ignore[union-attr]
    names = {module: name for name, module in net.named_modules()}
    draw = torch.Generator().manual_seed(1)

    def drawn(ranks: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
        sizes = [(linear, rank) for linear, rank in zip(linears, ranks, strict=True) if rank]
        return {
            names[linear]: tuple(torch.randn(rank, width, generator=draw) for width in linear.weight.shape[::-1])
            for linear, rank in sizes
        }  # type: ignore[misc]

    held = [Adapter(f"{ranks}", drawn(ranks)) for ranks in ([2, 0, 1, 0], [0, 0, 3, 4])]
    bank = Bank(net, held)
    numbers, places, of = bank.beside([held[1], None], [2, 1]).layer(linears)
    assert of.tolist() == [1, 1, NONE] and places.shape == (4, 2, 3)
    for number, linear in enumerate(linears):
        outputs, inputs = linear.weight.shape
        for k, one in enumerate(held):
            want = one.pairs.get(names[linear], (torch.zeros(0, inputs), torch.zeros(0, outputs)))
            assert all(map(torch.equal, matrices(numbers, places[number, k], inputs, outputs), want))
        if linear in bank.stacks:
            assert np.shares_memory(numbers, bank.stacks[linear].a.numpy()) and len(
                bank.stacks[linear].arrays[0]
            ) == len(numbers)
    later = bank.beside([held[0]], [1]).layer(linears)
    assert later[0] is numbers and later[1] is places and later[2].tolist() == [0]


def test_the_matrices_of_all_lie_one_after_the_other_and_rows_know_whose_they_are() -> None:
    net = network()
    bank = Bank(net, HELD)
    assert bank.places == {"one": 0, "two": 1, "three": 2} and set(bank.stacks) == set(net)
    for name, ranks in (("0", [3, 0, 2]), ("1", [3, 1, 0])):
        stack = bank.stacks[net[int(name)]]
        assert (stack.last - stack.first).tolist() == ranks and stack.last.tolist() == np.cumsum(ranks).tolist()
        pairs = [one.pairs[name] for one in HELD if name in one.pairs]
        assert torch.equal(stack.a, torch.cat([a for a, _ in pairs])) and torch.equal(
            stack.b, torch.cat([b for _, b in pairs])
        )
        bounds, most = stack.bounds
        assert (bounds.tolist(), bounds.dtype, most) == ([stack.first.tolist(), stack.last.tolist()], torch.int32, 3)
    beside = bank.beside([None, HELD[2], HELD[0], None, HELD[0]], [1, 2, 1, 2, 1])
    assert beside._of.tolist() == beside._there.tolist() == [NONE, 2, 2, 0, NONE, NONE, 0]
    assert beside._runs == [(1, 3, 2), (3, 4, 0), (6, 7, 0)]
    assert beside.first(7) is beside and beside.first(3)._of.tolist() == [NONE, 2, 2]
    assert Stack(torch.zeros(0, 2), torch.zeros(0, 2), np.zeros(0, np.int64), np.zeros(0, np.int64)).bounds[1] == 0


def test_matrices_are_kept_in_the_float_of_a_linear_and_in_bfloat16_beside_whole_numbers() -> None:
    """Of which loops read the bits."""
    a, b = torch.tensor([[1.0], [3.0]]).T, torch.tensor([[1.0], [-2.0]]).T
    for linear, dtype in ((Linear(2, 2).double(), torch.float64), (Int8Linear(2, 2), torch.bfloat16)):
        pair = kept(linear, a, b)
        assert [each.dtype for each in pair] == [dtype] * 2 and all(each.is_contiguous() for each in pair)
        assert [each.tolist() for each in pair] == [a.tolist(), b.tolist()]
    stack = Stack(*kept(Int8Linear(2, 2), a, b), np.array([0]), np.array([1]))
    bits, places = stack.arrays
    assert bits.dtype == np.uint16 and [*map(hex, bits)] == ["0x3f80", "0x4040", "0x3f80", "0xc000"]
    assert places.tolist() == [[0, 2, 1]]


def test_matrices_of_another_kind_than_the_rows_are_not_read_by_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    ways, linear = Ways(monkeypatch, "cpu"), Int8Linear(2, 2)
    one = Adapter("one", {"0": kept(linear, torch.ones(1, 2), torch.ones(1, 2))})
    beside = Bank(nn.Sequential(linear), [one]).beside([one], [1])
    x = torch.ones(1, 2, dtype=torch.float64)
    assert beside.add(linear, x, x + 1).tolist() == [[4.0, 4.0]] and ways.did == []


def test_an_adapter_of_nothing_stands_beside_all_linears_of_the_first_layer() -> None:
    config = presets.get("test").model
    net = Net(config).init_(0)
    found = nothing(net)
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim
    shapes = {
        "attention.qkv": (48, heads),
        "attention.out": (heads // 3, 48),
        "mlp.up": (48, 176),
        "mlp.down": (88, 48),
    }
    assert found.identity == "" and {
        name: tuple(len(each[0]) for each in pair) for name, pair in found.pairs.items()
    } == {f"groups.0.blocks.0.{name}": shape for name, shape in shapes.items()}
    assert all(each.shape[0] == 1 and not each.any() for pair in found.pairs.values() for each in pair)
    assert isinstance(found, Adapter) and tuple(shapes) == adapters.LINEARS
