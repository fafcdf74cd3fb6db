"""Weights move to large pages without anybody noticing."""

import dataclasses
import sys

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
