"""What stands beside a network's linears: which rows get it, and in which of three ways; that merged models say the same:
tests/unit/engine/test_adapters.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from shoal import presets
from shoal.model import adapters
from shoal.model.adapters import Adapter, Bank, Stack, alone, kept, nothing
from shoal.model.linears import Int8Linear, Linear
from shoal.model.net import Net
from tests.unit.model.test_places import WIDTHS, adapter


def network() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*each, bias=False, dtype=torch.float64) for each in WIDTHS.values()))


HELD = [adapter("one", 3), adapter("two", 1, "1"), adapter("three", 2, "0")]


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
