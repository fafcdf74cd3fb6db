"""Norm, rotation and writing in Triton against the torch operators that they stand in for; and the smaller kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import presets
from shoal.config import ModelConfig
from shoal.model import int8, slots
from shoal.model.block import Attention, rope_tables
from shoal.model.cache import Rows
from shoal.model.gpu import launch
from shoal.model.paged import write_kv
from shoal.model.quant import int8_linear_reference, quantize_rows
from tests.triton.stored import step_of, store

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

# of q, k and v: rounding of sums; in bf16 that of what is stored, which the interpreter cuts where a GPU rounds
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}


class Given(torch.nn.Module):
    """In place of a product."""

    def __init__(self, found: torch.Tensor) -> None:
        super().__init__()
        self.found = found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.found


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**how: Any) -> tuple[ModelConfig, Attention]:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 12, "block": 4, "page": 8, **how}
    config = dataclasses.replace(presets.get("test").model, **shape)
    made = Attention(config, "H").double().requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(normal(i, *parameter.shape) / (6 if parameter.dim() > 1 else 1))
    return config, made


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(
    ("norm", "bias", "summary"), [("head", 0, "mean"), ("all", 1, "mean_var"), ("none", 1, "mean")]
)
def test_what_is_stored_is_what_torch_stores(dtype: torch.dtype, kv: str, norm: str, bias: int, summary: str) -> None:
    """Chunks that begin and end inside a block, a row that is stored already, and one request of one row."""
    config, exact = attention(qk_norm=norm, qkv_bias=bool(bias), summary=summary)
    kind = slots.stored_as(kv, dtype)
    case = store(1, [21, 8], [11, 1], dim=12, dtype=dtype, kv_dtype=kind, variance=summary == "mean_var")
    case.step = step_of(case.step.tables, [(10, 21), (7, 8)], 8, 4)
    case.step.slots[3] = -1
    memories = [(case.kv.clone(), case.summaries.clone()) for _ in range(2)]
    x = normal(9, 12, config.width).to(dtype)
    with torch.no_grad():
        heads = exact.to(dtype).qkv(x)
        rope = rope_tables(case.step.positions, config, launch.fp(dtype))
        q = launch.project_and_store(heads, *exact.beside_qkv(dtype), exact.form, rope, *memories[0], case.step)
        exact = exact.double()
        exact.qkv = Given(heads.double())
        want = exact.project(x, rope_tables(case.step.positions, config, torch.float64))
        k, v = (each.to(dtype) for each in want[1:])
        write_kv(k, v, *memories[1], case.step)
    assert (q.double() - want[0]).abs().max() <= BOUNDS[dtype] * want[0].abs().max()
    (got, means), (kept, _) = memories
    off = BOUNDS[dtype] + (2 / 127 if kv == "int8" and dtype != torch.float64 else 0)
    written = case.step.slots[case.step.slots >= 0]
    for at in written.tolist():
        a, b = (torch.stack(slots.decode(each[at // 8, :, at % 8], torch.float64)) for each in (got, kept))
        assert (a - b).abs().max() <= off * b.abs().max()
    for row, t in enumerate(case.step.positions.tolist()):
        unit, slot = divmod(int(case.step.slots[row]), 8)
        if t % 4 == 3 and row != 3:
            keys = slots.decode(got[unit, :, slot - 3 : slot + 1], torch.float64)[0]  # [Hk, S, d]
            summed = [keys.mean(1), keys.var(1, correction=0)][: 1 + (summary == "mean_var")]
            found = means[unit, :, slot // 4].double()
            torch.testing.assert_close(found, torch.cat(summed, -1), atol=off / 10, rtol=0)
    untouched = torch.ones(len(got) * 8, dtype=torch.bool)
    untouched[written] = False
    flat, before = (each.transpose(1, 2).flatten(0, 1)[untouched] for each in (got, case.kv))
    assert torch.equal(flat.nan_to_num(7), before.nan_to_num(7)), "a row without a slot wrote somewhere"


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(("block", "summary"), [(4, "mean"), (1, "mean_var"), (8, "mean_var")])
def test_a_row_a_request_summarises_in_the_same_launch(kv: str, block: int, summary: str) -> None:
    """To the bit what two launches leave; a block that is completed, one that is not, and a row without a slot, whose memory is
    not touched. What lies there is NaN, and scales that are none."""
    config, made = attention(qk_norm="head", summary=summary, block=block)
    kind = slots.stored_as(kv, torch.bfloat16)
    how = {"dim": 12, "dtype": torch.bfloat16, "kv_dtype": kind, "variance": summary == "mean_var", "block": block}
    case = store(2, [15, 23, 6], [1, 1, 1], **how)  # type: ignore[arg-type]
    step = step_of(case.step.tables, [(15, 16), (23, 24), (6, 7)], 8, block)
    step.slots[1] = -1
    memories = [(case.kv.clone(), case.summaries.clone()) for _ in range(2)]
    several = Rows(step.positions, step.starts, 8, block)
    several.longest = 2
    with torch.no_grad():
        heads = made.to(torch.bfloat16).qkv(normal(9, 3, config.width).bfloat16())
        rope = rope_tables(step.positions, config, torch.float32)
        for memory, shared in zip(memories, (None, several), strict=True):
            given = dataclasses.replace(step, shared=shared)
            launch.project_and_store(heads, *made.beside_qkv(torch.bfloat16), made.form, rope, *memory, given)
    for one, two, before in zip(*memories, (case.kv, case.summaries), strict=True):
        assert torch.equal(one.double().nan_to_num(7), two.double().nan_to_num(7))
        assert not torch.equal(one.double().nan_to_num(7), before.double().nan_to_num(7))
    unit = int(step.tables[0, 1])
    assert memories[0][1][unit, :, 7 // block].isfinite().all(), "of the block that is complete"


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
@pytest.mark.parametrize("new", [[11, 1], [1, 1]])
def test_keys_that_are_normed_already_are_stored_to_the_bit(dtype: torch.dtype, summary: str, new: list[int]) -> None:
    """As vLLM gives them to us, in parts of one tensor; of a row without a slot not even the null unit is written."""
    case = store(1, [21, 8], new, dim=12, dtype=dtype, variance=summary == "mean_var")
    case.step.slots[0] = -1
    before, mine, want = [(case.kv.clone(), case.summaries.clone()) for _ in range(3)]
    k, v = normal(3, len(case.q), 4, 12).to(dtype).split(2, dim=1)
    launch.store(k, v, *mine, case.step)
    write_kv(k, v, *want, case.step)
    assert torch.equal(mine[0][1:].nan_to_num(7), want[0][1:].nan_to_num(7))
    torch.testing.assert_close(mine[1][1:], want[1][1:], atol=1e-6, rtol=1e-6, equal_nan=True)
    assert not torch.equal(mine[1].nan_to_num(7), before[1].nan_to_num(7)), "no block is completed"
    assert mine[0][0].isnan().all() and not want[0][0].isnan().all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 70), st.sampled_from(list(BOUNDS)))
def test_norm_sum_and_activation(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    x, added, weight = (normal(seed + i, rows, width).to(dtype) for i in range(3))
    weight = weight[0]
    with torch.no_grad():
        off = BOUNDS[dtype] * 4
        norm = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
        assert (launch.rms_norm(x, weight, 1e-6).double() - norm).abs().max() <= off
        total, normed = launch.add_norm(x, added, weight, 1e-6)
        sums = x.double() + added.double()
        assert ((total.double() - sums).abs() <= BOUNDS[dtype] * sums.abs()).all()
        norm = F.rms_norm(total.double(), (width,), weight.double(), 1e-6)
        assert (normed.double() - norm).abs().max() <= off
        both = torch.cat([x, added], dim=-1)
        want = F.silu(x.double()) * added.double()
        assert (launch.swiglu(both).double() - want).abs().max() <= off * want.abs().max().clamp(min=1)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 18), st.integers(1, 140), st.integers(1, 40), st.sampled_from([0.0, 1e-20, 1, 1e4])
)  # fmt: skip
def test_int8_is_the_reference_to_the_bit(seed: int, rows: int, inputs: int, outputs: int, size: float) -> None:
    x, w = (normal(seed, rows, inputs) * size).float(), normal(seed + 1, outputs, inputs)
    x[0, 0] = w[0, 0] = 3.0 * size  # a saturating pair
    weight, scale = quantize_rows(w)
    assert torch.equal(launch.int8_product(weight, scale)(x), int8_linear_reference(x, weight, scale))


def test_int8_passes_the_test_that_a_kernel_must_pass_before_it_serves() -> None:
    assert int8.self_test(int8.KERNELS["triton"]) is None
