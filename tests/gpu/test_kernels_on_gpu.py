"""The Triton kernels on a GPU against the torch operators in float64: what tests/triton holds in the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal.model import int8, paged
from shoal.model.gpu import launch
from shoal.model.reach import ALL, Reach
from tests.triton import mixed, test_thin
from tests.triton.stored import Stored, store

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),  # kernels of each shape are compiled first
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not launch.installed(), reason="needs Triton"),
]


def on_gpu(case: Stored) -> Stored:
    step = dataclasses.replace(
        case.step,
        positions=case.step.positions.to(DEVICE),
        slots=case.step.slots.to(DEVICE),
        tables=case.step.tables.to(DEVICE),
    )
    q, kv, summaries = (each.to(DEVICE) for each in (case.q, case.kv, case.summaries))
    return dataclasses.replace(case, q=q, kv=kv, summaries=summaries, step=step)


@pytest.mark.parametrize(("busy", "few"), [(1, launch.FEW_NUMBERS), (10**9, launch.FEW_NUMBERS), (10**9, 0)])
@pytest.mark.parametrize("kv", [None, torch.int8])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("kind", ["H", "S", "L", "D"])
@torch.no_grad()
def test_attention_is_that_of_torch_in_float64(
    kind: str,
    dtype: torch.dtype,
    off: float,
    kv: torch.dtype | None,
    busy: int,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same memory read by both, by one program a row and with keys in pieces, which have teams or not; most rows, as one
    block of many may be chosen otherwise where scores tie in fp32."""
    monkeypatch.setattr(launch, "BUSY", busy)
    monkeypatch.setattr(launch, "FEW_NUMBERS", few)
    monkeypatch.setattr(launch, "LEAST_KEYS", 32)
    case = store(0, [3000, 700, 65, 1], [3, 1, 2, 1], group=4, dim=64, page=32, block=16, dtype=dtype, kv_dtype=kv)
    gamma, bias = torch.rand(8).to(dtype), torch.randn(8).to(dtype)
    reach = Reach(128, 8 * (kind in "HS"), 1, gamma if kind == "H" else None, bias if kind == "S" else None)
    reach = dataclasses.replace(reach, dense=ALL * (kind == "D"))
    exact = dataclasses.replace(
        reach,
        gamma=None if reach.gamma is None else gamma.double(),
        bias=None if reach.bias is None else bias.double(),
    )
    want = paged.paged_attention(case.q.double(), case.kv, case.summaries, case.step, exact)
    there, moved = (
        on_gpu(case),
        dataclasses.replace(
            reach,
            gamma=None if reach.gamma is None else gamma.to(DEVICE),
            bias=None if reach.bias is None else bias.to(DEVICE),
        ),
    )
    got = launch.attend(there.q, there.kv, there.summaries, there.step, moved)
    errors = (got.double().cpu() - want).abs().amax((1, 2)) / want.abs().max()
    assert errors.median() <= off and (errors <= off).double().mean() >= 0.85


@pytest.mark.parametrize("few", [launch.FEW_NUMBERS, 0])
@pytest.mark.parametrize("times", [50_000])
@torch.no_grad()
def test_the_last_to_arrive_reads_what_all_have_stored(times: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it reads nothing older a GPU alone can show, and only if the launch before left other numbers in the same memory.
    Of pieces which score for themselves, and of teams of three."""
    monkeypatch.setattr(launch, "BUSY", 10**9)
    monkeypatch.setattr(launch, "LEAST_KEYS", 32)
    monkeypatch.setattr(launch, "FEW_NUMBERS", few)
    monkeypatch.setattr(launch, "TILE", 16)
    case = on_gpu(store(1, [700, 65, 1], [1, 1, 1], group=4, dim=64, page=32, block=16, dtype=torch.bfloat16))
    reach = Reach(128, 8, 1, torch.rand(8).to(DEVICE))
    asked = [case.q, -case.q, case.q.flip(-1)]
    want = [launch.attend(q, case.kv, case.summaries, case.step, reach) for q in asked]
    wrong = torch.zeros((), dtype=torch.long, device=DEVICE)
    for turn in range(times):
        got = launch.attend(asked[turn % 3], case.kv, case.summaries, case.step, reach)
        wrong += (got != want[turn % 3]).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("dtype", test_thin.DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "ranks"), test_thin.SHAPES)
def test_each_row_gets_what_its_adapter_adds(
    inputs: int, outputs: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    test_thin.compare(inputs, outputs, ranks, dtype, DEVICE)


@pytest.mark.parametrize("kind", mixed.REACHES)
@torch.no_grad()
def test_prompts_beside_others_are_those_of_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches begin at any row, so that nothing by row that they are given begins at a multiple of 16 bytes."""
    monkeypatch.setattr(launch, "LONG", mixed.LONG)
    case, reach = mixed.mixed(), mixed.REACHES[kind]
    there = on_gpu(case)  # before a step has made anything on the CPU
    want = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    gamma, bias = (None if each is None else each.to(DEVICE) for each in (reach.gamma, reach.bias))
    moved = dataclasses.replace(reach, gamma=gamma, bias=bias)
    got = paged.paged_attention(there.q, there.kv, there.summaries, there.step, moved)
    torch.testing.assert_close(got.cpu(), want, atol=1e-12, rtol=0)


def test_the_device_is_one_for_the_kernels() -> None:
    """Else all the rest goes on by torch's operators, and nothing here would say so."""
    assert launch.able(torch.device(DEVICE))


def test_int8_passes_its_self_test() -> None:
    assert int8.self_test(int8.KERNELS["triton"], DEVICE) is None
