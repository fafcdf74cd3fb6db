"""What adapters add to a linear, by their kernels in Triton's interpreter, against the definition, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shoal.model.adapters import Adapter, Bank
from shoal.model.gpu import launch
from shoal.model.places import Places
from tests.triton.rounded import Rounded
from tests.triton.test_reference import CUT, KINDS, LEAST, exact, near

DTYPES = (torch.float64, *KINDS)
SHAPES = [(48, 130, (3, 0, 17)), (600, 40, (1, 4, 5))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "ranks"), SHAPES)
def test_each_row_gets_what_its_adapter_adds(
    inputs: int, outputs: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of ranks that fill a tile and that do not, and of none; a row without an adapter keeps its bits. In fp32 and bf16 each
    number within what two sums in fp32 and a rounding at the end may lose."""
    compare(inputs, outputs, ranks, dtype, "cpu")


@torch.no_grad()
def compare(inputs: int, outputs: int, ranks: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    last = np.cumsum(ranks)
    bounds = torch.tensor(np.stack([last - ranks, last]), dtype=torch.int32)
    a, b = (torch.randn(int(last[-1]), size, generator=draw, dtype=torch.float64) for size in (inputs, outputs))
    x, y = (torch.randn(6, size, generator=draw, dtype=torch.float64) for size in (inputs, outputs))
    a, b, x, y = (each.to(device, dtype) for each in (a / inputs**0.5, b, x, y))
    of = torch.tensor([2, -1, 0, 1, 2, -1], device=device)
    y[1] = -0.0
    out = y.clone()
    launch.add_thin(x, a, b, bounds.to(device), max(ranks), of, out)
    for n, k in enumerate(of.tolist()):
        own = slice(*bounds[:, k].tolist())
        row, one, other, before = (
            Rounded.exact(exact(each.cpu())) for each in (x[n : n + 1], a[own], b[own], y[n : n + 1])
        )
        wanted = ((row @ one.turned()) @ other + before).cut(CUT.get(dtype, 0.0)) if k >= 0 else before
        near(out[n : n + 1].cpu(), wanted.of, wanted.off + LEAST[dtype] if dtype in KINDS else 1e-12)
    # no adapter, or one that does not change this linear
    still = [n for n, k in enumerate(of.tolist()) if k < 0 or not ranks[k]]
    assert torch.equal(out[still], y[still]) and bool(out[1].signbit().all())


@pytest.mark.smoke
@torch.no_grad()
def test_rows_of_a_bank_and_at_places_get_the_same_bits() -> None:
    """By the same kernels, wherever the matrices lie, and whatever lay there before."""
    draw = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(20, 30, bias=False, dtype=torch.float64))

    def adapter(name: str, rank: int) -> Adapter:
        pair = [torch.randn(rank, size, generator=draw, dtype=torch.float64) for size in (20, 30)]
        return Adapter(name, {"0": (pair[0], pair[1])})

    held = [adapter("one", 2), adapter("two", 5), adapter("three", 3)]
    places, rows = Places(net), [held[2], None, held[0], held[1]]
    places.of([adapter(f"before {i}", 7) for i in range(3)])
    x, of = torch.randn(4, 20, generator=draw, dtype=torch.float64), torch.tensor(places.of(rows))
    mine, other = (torch.zeros(4, 30, dtype=torch.float64) for _ in range(2))
    places.beside[net[0]].add(x, of, mine)
    Bank(net, held).beside(rows, [1] * 4).add(net[0], x, other)
    assert torch.equal(mine, other) and bool(mine[[0, 2, 3]].any(-1).all()) and not mine[1].any()
