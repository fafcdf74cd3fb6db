"""The weights' products: which of the ways to compute one is taken, and what each gives."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shoal.model.linears import Embedding, Held, Int8Linear, Linear, _Fp32Product
from shoal.model.quant import int8_linear_reference


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("fake", [True, False])
def test_rows_of_a_table_are_those_that_forward_gives(fake: bool) -> None:
    """Rounded as INT8 will be, where the table is in training for that."""
    table = Embedding(10, 4)
    table.weight.data.copy_(drawn(10, 4))
    table.fake = fake
    found = torch.from_numpy(table.rows([3, 0, 3]))
    assert torch.equal(found, table(torch.tensor([3, 0, 3])))
    assert torch.equal(found, table.weight[[3, 0, 3]]) is not fake


def test_gradients_of_logits_in_fp32_are_those_of_the_product() -> None:
    """x W': of x they are g W, of W they are g' x, in the numbers of x. CUDA alone multiplies forward so."""
    x, weight, given = drawn(5, 3, dtype=torch.float64), drawn(4, 3, dtype=torch.float64), drawn(5, 4)
    exact = [each.clone().requires_grad_() for each in (x, weight)]
    (exact[0] @ exact[1].T).backward(given.double())
    found = _Fp32Product.backward(SimpleNamespace(saved_tensors=(x, weight)), given)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-12, atol=1e-12)


def test_tensors_of_a_module_are_told_from_those_of_before() -> None:
    """One that is not there is passed over."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("nothing", None)
            self.linear = Linear(3, 2)

    part = Part()
    held = Held(part)
    before = held.state()
    assert before == held.state() and len(before) == 2, "a weight, and whether it is rounded"
    with torch.no_grad():
        part.linear.weight.mul_(2)
    changed = held.state()
    assert changed != before
    part.linear.fake = True
    assert held.state() != changed


def test_kernels_of_a_weight_are_made_anew_where_it_changed() -> None:
    linear = Int8Linear(4, 3)
    first = linear.kernels
    assert linear.kernels is first
    linear.weight.fill_(1)
    second = linear.kernels
    assert second is not first
    linear.weight_scale.fill_(2.0)
    assert linear.kernels is not second
    torch.testing.assert_close(linear(torch.ones(1, 4)), torch.full((1, 3), 8.0))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_levels_are_multiplied_in_fp32_whatever_is_asked_in(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linear, x = Int8Linear(4, 3), drawn(*shape).to(dtype)
    linear.weight.copy_(torch.tensor([[1, 2, 3, 4], [0, -5, 0, 7], [9, 9, -9, 0]]))
    linear.weight_scale.copy_(torch.tensor([[0.5], [2.0], [0.25]]))
    found = linear(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 3)
    rows = x.float().reshape(-1, 4)
    want = int8_linear_reference(rows, linear.weight, linear.weight_scale)
    torch.testing.assert_close(found.reshape(-1, 3), want.to(dtype))
