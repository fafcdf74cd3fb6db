"""The weights' products: which of the ways to compute one is taken, and what each gives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shoal.model import int8
from shoal.model.cpu import fused, memory
from shoal.model.linears import Embedding, Held, Int8Linear, Linear, _Fp32Product, prepack_
from shoal.model.quant import int8_linear_reference
from tests.pretend_gpu import pretended


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize(("shape", "rows"), [((3, 8), 3), ((2, 5, 8), 10), ((4, 1, 8), 4)])
@pytest.mark.parametrize("inference", [True, False])
def test_few_rows_are_multiplied_by_our_own_loop_in_inference_alone(
    shape: tuple[int, ...], rows: int, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However their dimensions are cut; both ways give x times the transpose of the weight."""
    linear, x = Linear(8, 6), drawn(*shape)
    linear.weight.data.copy_(drawn(6, 8))
    asked, taken = list[int](), list[torch.Size]()
    monkeypatch.setattr(fused, "few", lambda count: not asked.append(count))

    def product(some: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        taken.append(some.shape)
        return some @ weight.T

    monkeypatch.setattr(fused, "product", product)
    with torch.inference_mode(inference):
        found = linear(x)
    torch.testing.assert_close(found, x @ linear.weight.T)
    assert asked == [rows], "by how many rows it is decided"
    assert taken == ([x.shape] if inference else [])


def test_many_rows_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(8, 6)
    linear.weight.data.copy_(drawn(6, 8))
    monkeypatch.setattr(fused, "few", lambda count: count < 4)
    monkeypatch.setattr(fused, "product", lambda x, weight: pytest.fail("many rows"))
    with torch.inference_mode():
        torch.testing.assert_close(linear(drawn(4, 8)), drawn(4, 8) @ linear.weight.T)


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


def test_a_layer_s_loop_is_given_the_weight_for_few_rows_of_its_numbers_that_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a call of its own is faster, or knows how to round."""
    monkeypatch.setattr(fused, "few", lambda count: count < 4)
    linear = Linear(8, 6)
    given = linear.matrix(3, torch.float32)
    assert given is not None and given[0] is linear.weight
    assert linear.matrix(4, torch.float32) is None and linear.matrix(3, torch.float64) is None
    linear.fake = True
    assert linear.matrix(3, torch.float32) is None


def test_a_layer_s_loop_is_given_levels_as_the_kernels_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Int8Linear(4, 3)
    monkeypatch.setattr(linear.kernels, "matrix", lambda rows: ("levels", rows))
    assert linear.matrix(2, torch.float32) == ("levels", 2) and linear.matrix(2, torch.float64) is None


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


@pytest.mark.parametrize(
    ("kind", "fake", "exact"), [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)]
)
@torch.no_grad()
def test_logits_of_half_the_bits_are_summed_in_fp32_on_a_gpu(
    kind: str, fake: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are rounded as INT8 will be, that product is theirs. Which way is taken, and how its dimensions are cut."""
    dtype, taken = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind], list[torch.Size]()

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        taken.append(x.shape)
        return x.float() @ weight.float().T

    monkeypatch.setattr(_Fp32Product, "apply", product)
    linear, x = Linear(8, 6).to(torch.float32 if fake else dtype), drawn(2, 5, 8).to(dtype)
    linear.weight.copy_(drawn(6, 8))
    linear.fake = fake
    want = linear.product(x) if not exact else x.float() @ linear.weight.float().T
    assert torch.equal(linear.product_in_fp32(x), linear.product(x)) and taken == [], (
        "on a CPU they are summed so anyway"
    )
    with pretended() as gpu:
        linear.weight = nn.Parameter(linear.weight.to(gpu), requires_grad=False)
        found: Any = linear.product_in_fp32(x.to(gpu))
    assert taken == ([torch.Size((10, 8))] if exact else [])
    assert found.dtype == (torch.float32 if exact else dtype)
    torch.testing.assert_close(found.held, want)


def test_what_decodes_is_ready_before_a_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of INT8 are chosen, and what is packed lies on large pages."""
    rounded, packed, asked = Int8Linear(4, 3), Linear(512, 256), list[int]()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(memory, "prefer_large", lambda at, size: asked.append(size))
    monkeypatch.setattr(memory, "gather_", lambda tensors: [*tensors])
    packed.weight.data.zero_()
    prepack_(nn.ModuleList([rounded, packed]))
    monkeypatch.setattr(int8, "pack", lambda *_: pytest.fail("a request waits for it"))
    assert rounded.kernels is not None
    assert len(asked) == 1 and asked[0] >= packed.weight.nbytes
