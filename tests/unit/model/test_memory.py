"""Weights move to large pages without anybody noticing."""

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import nn

from shoal import Model, presets
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.cpu import memory
from shoal.model.linears import prepack_
from shoal.model.net import Net


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for in Linux's way")
@pytest.mark.parametrize(("block", "moves"), [(memory.BLOCK, 3), (2**20, 1)])  # below one large page it is not worth it
def test_what_moves_keeps_its_values_and_stands_aligned(
    block: int, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "BLOCK", block)
    tensors = [torch.randn(300, 1001), torch.randint(-127, 128, (2000, 999), dtype=torch.int8), torch.randn(1024, 1024)]
    before = [tensor.clone() for tensor in tensors]
    memory.gather_(tensors)
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(tensor, was) and tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    moved = [tensor for tensor in tensors if tensor.untyped_storage().nbytes() > tensor.nbytes]
    assert len(moved) == moves and moved[0].data_ptr() % memory.LARGE == 0
    places = [tensor.data_ptr() for tensor in moved]
    memory.gather_(moved)
    assert [tensor.data_ptr() for tensor in moved] == places, "what was moved stays"


def test_tensors_that_share_their_memory_go_on_sharing_it() -> None:
    whole = torch.zeros(4, 2**20)
    parts = list(whole)
    memory.gather_(parts)
    parts[1][0] = 1.0
    assert whole[1, 0] == 1.0


@pytest.mark.parametrize("int8", [False, True])
def test_a_network_computes_the_same_before_and_after(int8: bool) -> None:
    config = dataclasses.replace(presets.get("test").model, vocab=20_000)
    model = Model(config, Net(config).init_(0), Tokenizer.bytes_only(), name="test")
    model = model.quantized() if int8 else model
    tokens = torch.arange(20, 50).view(1, -1)
    before = model.logits(tokens)
    prepack_(model.net)
    torch.testing.assert_close(model.logits(tokens), before, rtol=1e-4, atol=1e-5)  # oneDNN adds in another order


def test_a_parameter_stays_the_same_parameter() -> None:
    layer = nn.Linear(1024, 1024, bias=False)
    weight = layer.weight
    memory.gather_([layer.weight])
    assert layer.weight is weight and weight.requires_grad


class Libc:
    """Records what is asked of the system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int | None, int, int]] = []
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: self)
        monkeypatch.setattr(sys, "platform", "linux")

    def madvise(self, at: Any, size: Any, advice: int) -> None:
        self.asked.append((at.value, size.value, advice))


L = memory.LARGE


@pytest.mark.parametrize(
    ("address", "size", "start", "length"),
    [(2 * L, L, 2 * L, L), (2 * L + 1, 2 * L - 1, 3 * L, L), (L - 1, L + 1, L, L), (2 * L, 4 * L - 1, 2 * L, 3 * L)],
)
def test_whole_large_pages_are_asked_for_and_collapsed(
    monkeypatch: pytest.MonkeyPatch, address: int, size: int, start: int, length: int
) -> None:
    system = Libc(monkeypatch)
    memory.prefer_large(address, size)
    assert system.asked == [(start, length, 14), (start, length, 25)]


@pytest.mark.parametrize(("address", "size"), [(2 * L, L - 1), (2 * L + 1, L), (2 * L + 1, 2 * L - 2)])
def test_nothing_is_asked_for_where_no_whole_page_lies(
    monkeypatch: pytest.MonkeyPatch, address: int, size: int
) -> None:
    system = Libc(monkeypatch)
    memory.prefer_large(address, size)
    monkeypatch.setattr(sys, "platform", "darwin")
    memory.prefer_large(2 * L, 4 * L)
    assert system.asked == []


def test_what_is_gathered_at_once_fills_a_block_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room to the next 64 bytes for each."""
    moved: list[list[int]] = []
    monkeypatch.setattr(memory, "BLOCK", 256)
    monkeypatch.setattr(memory, "_move", lambda tensors: moved.append([each.nbytes for each in tensors]))
    sizes = (64, 65, 64, 1, 400, 256, 1)
    memory.gather_([torch.zeros(size, dtype=torch.int8) for size in sizes])
    assert moved == [[64, 65, 64], [1], [400], [256], [1]]


def test_what_lies_on_a_device_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(memory, "_move", asked.extend)
    here, elsewhere = torch.zeros(8), torch.zeros(8, device="meta")
    memory.gather_([elsewhere, here])
    assert len(asked) == 1 and asked[0] is here


def test_a_move_takes_large_pages_from_a_whole_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "prefer_large", lambda address, size: asked.append((address, size)))
    small = torch.zeros(L - 64, dtype=torch.int8)
    memory._move([small])
    assert asked == [] and small.untyped_storage().nbytes() == small.nbytes
    first, second = torch.ones(L - 64, dtype=torch.int8), torch.full((33,), 2, dtype=torch.int8)
    memory._move([first, second])
    ((address, size),) = asked
    assert size == L and address <= first.data_ptr() < address + L
    assert second.data_ptr() - first.data_ptr() == L - 64 and first.data_ptr() % L == 0
    assert bool((first == 1).all()) and bool((second == 2).all())
    more = torch.ones(65, dtype=torch.int8)
    memory._move([first, more])
    assert asked[1][1] == 2 * L, "the last page is taken whole"
