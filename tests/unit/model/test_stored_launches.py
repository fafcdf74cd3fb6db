"""What launches the kernels that write keys and values, and those of adapters, on programs that do in torch what each kernel
says. Against torch over pages, and the definition; the kernels themselves are of tests/triton."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoal import presets
from shoal.model import slots
from shoal.model.block import Attention, rope_tables
from shoal.model.cache import PagedStep, Rows
from shoal.model.gpu import launch
from shoal.model.paged import write_kv
from tests.triton.stored import step_of as step_over
from tests.triton.stored import store
from tests.unit.model.launched import stand_in, written_down
from tests.unit.model.test_launch import META, step_of

NORMS = ("NONE", 0), ("HEAD", 1), ("ALL", 2)  # as `gpu.store` has them


def turned(x: Any, keep: Any, cross: Any, half: int) -> Any:
    """x [N, heads, d] by tables [N, d]: dim i with dim i + half; the rest is left."""
    if not half:
        return x
    other = [*range(half, 2 * half), *range(half), *range(2 * half, x.shape[-1])]
    return x * keep.view(len(x), 1, -1) + x[..., other] * cross.view(len(x), 1, -1)


def normed(x: Any, weight: Any, eps: float, over: int) -> Any:
    """x [N, heads, d] over each head, or over all together."""
    if not over:
        return x
    whole = x if over == 1 else x.flatten(1)
    return F.rms_norm(whole, whole.shape[-1:], weight, eps).view_as(x)


def summary(kv: Any, summaries: Any, slot: int, t: int, shape: dict[str, Any]) -> None:
    """Of the block that the token at t completes, which lies at `slot`."""
    unit, offset = divmod(slot, shape["P"])
    if slot >= 0 and (t + 1) % shape["S"] == 0:
        keys = slots.decode(kv[unit, :, offset + 1 - shape["S"] : offset + 1], summaries.dtype)[0]
        spread = [keys.var(1, correction=0)] * shape["VARIANCE"]
        summaries[unit, :, offset // shape["S"]] = torch.cat([keys.mean(1), *spread], -1)


def write(
    grid: Any, qkv: Any, bias: Any, q_weight: Any, k_weight: Any, keep: Any, cross: Any, places: Any, positions: Any, q: Any,
    kv: Any, summaries: Any, *rest: Any, **shape: Any,
) -> None:  # fmt: skip
    (*strides, eps), dim, heads = rest, shape["D"], (shape["HEADS"], shape["KV_HEADS"], shape["KV_HEADS"])
    assert grid == (len(qkv), sum(heads)) and strides == [*kv.stride()[:3], *summaries.stride()[:3]]
    assert all(each.is_contiguous() for each in (qkv, keep, cross)) and shape["TALL"] >= shape["S"]
    assert shape["TOTAL"] >= dim * (heads[0] if shape["NORM"] == 2 else 1)
    x = qkv.view(len(qkv), -1, dim) + (bias.view(-1, dim) if shape["BIASED"] else 0)
    *both, v = x.split(heads, 1)
    one, k = (
        turned(normed(part, weight, eps, shape["NORM"]), keep, cross, shape["HALF"])
        for part, weight in zip(both, (q_weight, k_weight), strict=True)
    )
    q.copy_(one)
    for row, slot in enumerate(places.tolist()):
        if slot >= 0:
            kv[slot // shape["P"], :, slot % shape["P"]] = slots.encode(k[row], v[row], kv.dtype)
        if shape["SINGLE"]:
            summary(kv, summaries, slot, int(positions[row]), shape)


def summarise(grid: Any, kv: Any, summaries: Any, positions: Any, places: Any, *strides: int, **shape: Any) -> None:
    assert grid == (len(positions), kv.shape[1]) and [*strides] == [*kv.stride()[:3], *summaries.stride()[:3]]
    assert shape["TALL"] >= shape["S"]
    for slot, t in zip(places.tolist(), positions.tolist(), strict=True):
        summary(kv, summaries, slot, t, shape)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched."""
    told = list[str]()
    stand_in(
        monkeypatch,
        "store",
        *NORMS,
        _store=lambda *given, **shape: (told.append("_store"), write(*given, **shape)),
        _summarise=lambda *given, **shape: (told.append("_summarise"), summarise(*given, **shape)),
    )
    return told


STEPS = {
    "chunks": [(10, 21), (7, 8)],  # they begin and end inside a block
    "a row each": [(15, 16), (6, 7), (7, 8)],
    "two rows": [(14, 16), (7, 8)],
}


def spread(step: PagedStep) -> PagedStep:
    """The same rows, each with a table of its own."""
    starts = [*range(len(step.positions) + 1)]
    tables = step.tables[[r for r in range(len(step.starts) - 1) for _ in range(step.starts[r], step.starts[r + 1])]]
    shared = Rows(step.positions, starts, step.page, step.block, apart=True)
    return PagedStep(step.positions, step.slots, tables, starts, step.page, step.block, shared=shared)


@pytest.mark.parametrize("kind", [*STEPS, "apart"])
@pytest.mark.parametrize(
    ("norm", "bias", "summary", "kv"),
    [("head", False, "mean", "auto"), ("all", True, "mean_var", "auto"), ("none", True, "mean_var", "int8")],
)
@torch.no_grad()
def test_what_is_written_is_what_torch_writes(
    norm: str, bias: bool, summary: str, kv: str, kind: str, launches: list[str]
) -> None:
    """In one launch where each request has one row: else the keys of a block may be of several, and are waited for. A row
    without a slot writes nothing."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 12, "block": 4, "page": 8}
    config = dataclasses.replace(presets.get("test").model, **shape, qk_norm=norm, qkv_bias=bias, summary=summary)
    made, g = Attention(config, "H").double(), torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    spans = STEPS.get(kind, STEPS["chunks"])
    case = store(
        1, [end for _, end in spans], [end - begin for begin, end in spans], dim=12, variance=summary == "mean_var",
        kv_dtype=slots.stored_as(kv, torch.float64),
    )  # fmt: skip
    step = step_over(case.step.tables, spans, 8, 4)
    step.slots[-1] = -1
    memories = [(case.kv.clone(), case.summaries.clone()) for _ in range(2)]
    x = torch.randn(len(step.positions), config.width, generator=g, dtype=torch.float64)
    rope = rope_tables(step.positions, config, torch.float64)
    given = spread(step) if kind == "apart" else step
    wide = torch.stack([made.qkv(x)] * 2, -1)[..., 0]  # rows that do not lie one behind the other
    q = launch.project_and_store(wide, *made.beside_qkv(torch.float64), made.form, rope, *memories[0], given)
    want, k, v = made.project(x, rope)
    write_kv(k, v, *memories[1], step)
    torch.testing.assert_close(q, want, atol=1e-12, rtol=0)
    for mine, theirs in zip(*memories, strict=True):
        torch.testing.assert_close(mine[1:], theirs[1:], atol=1e-12, rtol=0, equal_nan=True)
    assert torch.equal(memories[0][0][0].double().nan_to_num(7), case.kv[0].double().nan_to_num(7)), "the null unit"
    assert not torch.equal(memories[0][1].nan_to_num(7), case.summaries.nan_to_num(7)), "no block is completed"
    assert launches == (["_store"] if kind == "a row each" else ["_store", "_summarise"])


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("new", [[11, 1], [1, 1]])
def test_keys_that_are_normed_already_are_stored_as_they_are(
    new: list[int], variance: bool, launches: list[str]
) -> None:
    """As vLLM gives them to us, in parts of one tensor."""
    case = store(1, [21, 8], new, dim=12, variance=variance)
    mine, want = [(case.kv.clone(), case.summaries.clone()) for _ in range(2)]
    both = torch.randn(len(case.q), 4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    launch.store(*both.split(2, dim=1), *mine, case.step)
    write_kv(*both.split(2, dim=1), *want, case.step)
    assert torch.equal(mine[0].nan_to_num(7), want[0].nan_to_num(7)) and len(launches) == 1 + (new != [1, 1])
    torch.testing.assert_close(mine[1], want[1], atol=1e-12, rtol=0, equal_nan=True)


def test_of_no_rows_nothing_is_launched(launches: list[str]) -> None:
    case, none = store(1, [8], [1], dim=12), torch.zeros(0, dtype=torch.float64)
    rope = none.view(0, 12), none.view(0, 12)
    form = launch.Form(1e-6, 3, after=False)
    q = launch.project_and_store(
        none.view(0, 96), none, none, none, form, rope, case.kv, case.summaries, step_of([], 1)
    )
    assert q.shape == (0, 4, 12) and not launches


@pytest.mark.parametrize(("dim", "warps"), [(16, 1), (17, 4)])
def test_who_makes_a_summary_has_warps_for_the_numbers_of_a_block(
    dim: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One holds 1,024 of them: here 64 keys, of heads of 16 and, as they are padded, of 32."""
    told = written_down(monkeypatch, "store", *NORMS)
    k, kv, summaries = torch.zeros(2, 1, dim), torch.zeros(1, 1, 64, 2 * dim), torch.zeros(1, 1, 1, dim)
    for counts, wanted in (([1, 1], [warps]), ([2], [1, warps])):
        launch.store(k, k, kv, summaries, step_of(counts, 1, 64, 64))
        assert [each["num_warps"] for each in told] == wanted
        told.clear()


# ---- adapters


def thin(
    grid: Any, x: Any, a: Any, bounds: Any, of: Any, between: Any, inputs: int, room: int, count: int, **shape: Any
) -> None:
    assert x.is_contiguous() and (x.shape[1], room, count) == (inputs, between.shape[1], bounds.shape[1])
    assert grid[0] == len(x) and between.dtype == launch.fp(x.dtype) and (grid[1] - 1) * shape["RANKS"] < room
    between.fill_(torch.nan)
    for row, piece in itertools.product(*map(range, grid)):
        begin, end = bounds[:, of[row]].tolist() if of[row] >= 0 else (0, 0)
        for rank in range(piece * shape["RANKS"], min((piece + 1) * shape["RANKS"], end - begin)):
            between[row, rank] = x[row].to(between.dtype) @ a[begin + rank].to(between.dtype)


def wide(
    grid: Any, between: Any, b: Any, bounds: Any, of: Any, out: Any, outputs: int, room: int, count: int, **shape: Any
) -> None:
    assert (out.shape[1], room, count) == (outputs, between.shape[1], bounds.shape[1])
    assert grid[0] == len(out) and (grid[1] - 1) * shape["TILE"] < outputs
    for row, piece in itertools.product(*map(range, grid)):
        begin, end = bounds[:, of[row]].tolist() if of[row] >= 0 else (0, 0)
        some = slice(piece * shape["TILE"], (piece + 1) * shape["TILE"])
        if begin < end:
            out[row, some] += (between[row, : end - begin] @ b[begin:end, some].to(between.dtype)).to(out.dtype)


@pytest.mark.parametrize(("kind", "off"), [(torch.float64, 1e-12), (torch.bfloat16, 0.25)])
@pytest.mark.parametrize("outputs", [128, 130])
def test_each_row_gets_what_its_adapter_adds(
    outputs: int, kind: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ranks that fill a piece and that do not, and of none; a row without an adapter keeps what it has. What lies between
    the two products is not rounded."""
    stand_in(monkeypatch, "thin", _thin=thin, _wide=wide)
    g, bounds = torch.Generator().manual_seed(0), torch.tensor([[0, 3, 3], [3, 3, 20]], dtype=torch.int32)
    a, b, x, y = (
        torch.randn(rows, size, generator=g, dtype=torch.float64).to(kind)
        for rows, size in ((20, 6), (20, outputs), (5, 12), (5, outputs))
    )
    out, x, of = y.clone(), x[:, ::2], [2, -1, 0, 1, 2]
    launch.add_thin(x, a, b, bounds, 17, torch.tensor(of), out)
    for n, k in enumerate(of):
        own = slice(*bounds[:, k].tolist()) if k >= 0 else slice(0)
        want = y[n].double() + x[n].double() @ a[own].double().T @ b[own].double()
        torch.testing.assert_close(out[n].double(), want, atol=off, rtol=off / 16)
    assert torch.equal(out[[1, 3]], y[[1, 3]])


def test_all_of_a_launch_lies_where_its_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values. Where there are no rows, or no adapter has a rank, none is launched."""
    told = [written_down(monkeypatch, module) for module in ("thin", "integers")]
    x, bounds, of = (
        torch.zeros(3, 6, device=META),
        torch.zeros(2, 1, device=META).int(),
        torch.zeros(3, device=META).int(),
    )
    launch.add_thin(x, x, x, bounds, 0, of, x)
    launch.add_thin(x[:0], x, x, bounds, 4, of[:0], x[:0])
    assert not told[0]
    launch.add_thin(x, x, x, bounds, 4, of, x)
    out = launch.int8_product(x.to(torch.int8), x[:, :1])(x)
    assert (out.shape, out.device) == ((3, 3), META)
    assert [each["name"] for each in (*told[0], *told[1])] == ["_thin", "_wide", "_levels", "_product"]
