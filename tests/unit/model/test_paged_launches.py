"""What launches the kernels of a decoding step, on programs that do in torch what each kernel says: grids, constants, the
order of arguments, and who reads what another wrote. Against torch over pages; the kernels themselves are of tests/triton."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.model import paged, quant
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.reach import ALL, Reach
from tests.triton.stored import Stored, store
from tests.unit.model.test_launch import Kernel

STRIDES = 3  # of a memory: unit, head, slot or block


def complete(t: int, window: int, shape: dict[str, Any]) -> int:
    """Blocks that the query at t may choose of."""
    return int(max(t - window + shape["S"], 0) // shape["S"] if shape["BEYOND"] else (t + 1) // shape["S"])


def at(tables: Any, requests: Any, row: int, place: int, size: int) -> tuple[int, int]:
    return int(tables[requests[row], place // size]), place % size


def rated(
    q: Any, summaries: Any, tables: Any, requests: Any, row: int, head: int, many: int, shape: dict[str, Any]
) -> Any:
    """z [G, many]."""
    group, dim = shape["G"], shape["D"]
    mine = q[row, head * group : (head + 1) * group]
    found = [
        summaries[unit, head, j]
        for unit, j in (at(tables, requests, row, b, shape["PAGED"]) for b in range(many))
    ]  # fmt: skip
    if not found:
        return q.new_zeros(group, 0)
    every = torch.stack(found)
    z = mine @ every[:, :dim].T * shape["SCALE"]
    return z + mine.square() @ every[:, dim:].T * shape["SCALE"] ** 2 / 2 if shape["VARIANCE"] else z


def listed(z: Any, many: int, shape: dict[str, Any]) -> list[int]:
    if many <= shape["K"]:
        return [*range(many)]
    score = z[0] if shape["G"] == 1 else z.softmax(-1).sum(0)
    others = sorted(range(shape["SINKS"], many), key=lambda b: -float(score[b]))
    return sorted([*range(shape["SINKS"]), *others][: shape["K"]])


def score(
    grid: Any, q: Any, summaries: Any, tables: Any, positions: Any, requests: Any, z: Any, *sizes: int, **shape: Any
) -> None:
    *strides, window, dense, count = sizes
    assert strides == [tables.stride(0), *summaries.stride()[:STRIDES]] and z.shape[2] == count
    for row, head, tile in itertools.product(*map(range, grid)):
        many = complete(t := int(positions[row]), window, shape)
        if t >= dense and many > shape["K"]:
            mine = slice(head * shape["G"], (head + 1) * shape["G"])
            of = slice(tile * shape["TILE"], min(many, (tile + 1) * shape["TILE"]))
            z[row, mine, of] = rated(q, summaries, tables, requests, row, head, many, shape)[:, of]


def choose(
    grid: Any, q: Any, summaries: Any, tables: Any, positions: Any, requests: Any, z: Any, chosen: Any, *sizes: int,
    **shape: Any,
) -> None:  # fmt: skip
    *strides, window, dense, count = sizes
    assert strides == [tables.stride(0), *summaries.stride()[:STRIDES]]
    assert shape["TILE"] >= count and shape["FULL"] >= shape["K"] == chosen.shape[2] and shape["ROWS"] >= shape["G"]
    for row, head in itertools.product(*map(range, grid)):
        t = int(positions[row])
        many = complete(t, window, shape) if t >= dense else 0
        if many > shape["K"]:
            mine = slice(head * shape["G"], (head + 1) * shape["G"])
            scores = (
                rated(q, summaries, tables, requests, row, head, many, shape)
                if shape["SCORES"]
                else z[row, mine, :many]
            )
            found = listed(scores, many, shape)
        else:
            found = [*range(many)]
        chosen[row, head] = torch.tensor(found + [-1] * (shape["K"] - len(found)))


def reads(t: int, window: int, dense: int, found: list[int], shape: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The keys of the window, and of the other branch: what it chose, and the tail."""
    low = 0 if t < dense else max(0, t - window + 1)
    far = [b * shape["S"] + i for b in found for i in range(shape["S"])]
    if shape["BEYOND"]:
        return [*range(low, t + 1)], [key for key in far if key < low]
    return [*range(low, t + 1)], [*far, *range((t + 1) // shape["S"] * shape["S"], t + 1)] if shape["K"] else []


def weighed(
    q: Any, kv: Any, tables: Any, requests: Any, row: int, head: int, keys: list[int], more: Any, shape: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Undivided sum of values [d], largest score, and divisor of one query head."""
    dim, own = shape["D"], head // shape["G"]
    slots = torch.stack(
        [kv[unit, own, slot] for unit, slot in (at(tables, requests, row, key, shape["P"]) for key in keys)]
    )
    z = slots[:, :dim] @ q[row, head] * shape["SCALE"] + more
    e = (z - z.max()).exp()
    return e @ slots[:, dim:], z.max(), e.sum()


def attend(
    grid: Any, q: Any, kv: Any, tables: Any, positions: Any, requests: Any, chosen: Any, bias: Any, part: Any, stats: Any,
    *sizes: int, **shape: Any,
) -> None:  # fmt: skip
    *strides, window, dense = sizes
    assert strides == [tables.stride(0), *kv.stride()[:STRIDES]] and not shape["INT8"]
    stats[..., 1] = 0
    near, pieces = shape["NEAR"], shape["PIECES"]
    assert part.shape[2] == stats.shape[2] == pieces == grid[2]
    for row, own, piece in itertools.product(*map(range, grid)):
        found = [b for b in chosen[row, own].tolist() if b >= 0] if shape["K"] else []
        branches = reads(int(positions[row]), window, dense, found, shape)
        far = piece >= near
        keys, number, of = branches[far], piece - near * far, pieces - near if far else near
        each = -(-len(keys) // of)
        some = keys[number * each : (number + 1) * each]
        for head in range(own * shape["G"], (own + 1) * shape["G"]) if some else ():
            more = bias[head] if shape["BEYOND"] and not far and positions[row] >= dense else 0.0
            part[row, head, piece], *two = weighed(q, kv, tables, requests, row, head, some, more, shape)
            stats[row, head, piece] = torch.stack(two)


def join(grid: Any, part: Any, stats: Any, gamma: Any, out: Any, **shape: Any) -> None:
    assert shape["PADDED"] >= shape["PIECES"] == part.shape[2] and shape["HEADS"] == out.shape[1]

    def one(row: int, head: int, of: slice) -> Any:
        there = stats[row, head, of, 1] > 0
        top, divisor = stats[row, head, of][there].unbind(-1)
        weight = (top - top.max()).exp()
        return weight @ part[row, head, of][there] / (weight @ divisor)

    for row, head in itertools.product(*map(range, grid)):
        if shape["GATED"]:
            near, far = one(row, head, slice(shape["NEAR"])), one(row, head, slice(shape["NEAR"], None))
            out[row, head] = far + gamma[head] * (near - far)
        else:
            out[row, head] = one(row, head, slice(None))


def alone(
    grid: Any, q: Any, kv: Any, summaries: Any, tables: Any, positions: Any, requests: Any, z: Any, chosen: Any, bias: Any,
    gamma: Any, out: Any, *sizes: int, **shape: Any,
) -> None:  # fmt: skip
    *strides, window, dense, count = sizes
    assert strides == [tables.stride(0), *kv.stride()[:STRIDES], *summaries.stride()[:STRIDES]]
    assert not shape["K"] or (shape["BLOCKS"] >= count and shape["FULL"] >= shape["K"] and z.shape[-1] in (1, count))
    for row, own in itertools.product(*map(range, grid)):
        t = int(positions[row])
        many = complete(t, window, shape) if shape["K"] and t >= dense else 0
        scores = rated(q, summaries, tables, requests, row, own, many, shape)
        near, far = reads(t, window, dense, listed(scores, many, shape), shape)
        for head in range(own * shape["G"], (own + 1) * shape["G"]):
            more = bias[head] if shape["BEYOND"] and t >= dense else 0.0
            branches = [near, far] if shape["GATED"] else [near + far]
            if shape["BEYOND"]:
                more = torch.tensor([more] * len(near) + [0.0] * len(far), dtype=q.dtype)
            found = [weighed(q, kv, tables, requests, row, head, keys, more, shape) for keys in branches]
            said = [total / divisor for total, _, divisor in found]
            out[row, head] = said[0] if len(said) == 1 else said[1] + gamma[head] * (said[0] - said[1])


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"_score": score, "_choose": choose, "_attend": attend, "_join": join, "_alone": alone}
    made = SimpleNamespace(**{name: Kernel(run) for name, run in kernels.items()})
    monkeypatch.setitem(sys.modules, "shoal.model.gpu.attention", made)
    monkeypatch.setattr("shoal.model.gpu.attention", made, raising=False)
    monkeypatch.setattr(fused, "usable", lambda x: False)


@pytest.fixture(params=["alone", "in pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = 1 if request.param == "alone" else 2
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (pieces, pieces * (far > 0)))


def same(case: Stored, reach: Reach) -> None:
    with torch.no_grad():
        want = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
        got = launch.attend(case.q, case.kv, case.summaries, case.step, reach)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


GAMMA = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(("group", "few"), [(2, 512), (1, 512), (2, 0)])
def test_both_branches_in_one_launch_or_in_four(
    group: int, few: int, variance: bool, cut: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are made by who chooses, or in a launch of their own; rows of one request in strips."""
    monkeypatch.setattr(launch, "FEW_BLOCKS", few)
    monkeypatch.setattr(launch, "SCORED", 4 * 18 * 3)
    case = store(1, [70, 38, 9, 1], [3, 2, 1, 1], kv_heads=4 // group, group=group, variance=variance)
    for top_k in (3, 40):
        same(case, Reach(10, top_k, 1, GAMMA))


@pytest.mark.parametrize("dense", [0, 40])
def test_one_softmax_over_both(dense: int, cut: None) -> None:
    case = store(3, [70, 38, 41, 1], [3, 2, 1, 1])
    same(case, Reach(10, 3, 1, None, torch.linspace(-1, 2, 4, dtype=torch.float64), dense))


@pytest.mark.parametrize(("window", "dense"), [(7, 0), (ALL, ALL)])
def test_the_window_alone_and_all_of_the_context(window: int, dense: int, cut: None) -> None:
    case = store(4, [50, 9], [1, 4])
    same(case, Reach(window, 0, 0, None, dense=dense))
    chosen = launch.choose(case.q, case.summaries, case.step, Reach(7, 3, 1, GAMMA), case.step.positions, case.requests)
    assert chosen.shape == (5, 2, 3) and chosen[1:, :, 2].unique().tolist() == [-1], "9 tokens have two blocks"


# ---- a linear in int8


def levels(grid: Any, x: Any, levels: Any, scales: Any, **shape: Any) -> None:
    assert shape["I"] == x.shape[1] <= shape["WIDE"] and (shape["TOP"], shape["ZERO"]) == (63, 64) and x.is_contiguous()
    for row in range(*grid):
        scales[row] = quant.token_scale(x[row])
        levels[row] = quant.token_levels(x[row], scales[row])


def product(
    grid: Any,
    levels: Any,
    weight: Any,
    scales: Any,
    weight_scales: Any,
    out: Any,
    rows: int,
    outputs: int,
    **shape: Any,
) -> None:
    assert levels.shape == (rows, shape["I"]) and weight.shape == (outputs, shape["I"]) and weight.is_contiguous()
    assert all(size & size - 1 == 0 for size in (shape["ROWS"], shape["COLUMNS"], shape["DEEP"])), (
        "tiles are powers of two"
    )
    for column, row in itertools.product(*map(range, grid)):
        m, o = (slice(at * size, (at + 1) * size) for at, size in ((row, shape["ROWS"]), (column, shape["COLUMNS"])))
        total = levels[m].long() @ weight[o].long().T
        out[m, o] = total.float() * weight_scales[o] * scales[m, None]


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_a_linear_in_int8_covers_all_rows_and_outputs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(_levels=Kernel(levels), _product=Kernel(product))
    monkeypatch.setitem(sys.modules, "shoal.model.gpu.integers", made)
    monkeypatch.setattr("shoal.model.gpu.integers", made, raising=False)
    g = torch.Generator().manual_seed(rows)
    weight, scale = quant.quantize_rows(torch.randn(70, 40, generator=g))
    x = torch.randn(rows, 80, generator=g)[:, ::2]
    got = launch.int8_product(weight, scale)(x)
    torch.testing.assert_close(got, quant.int8_linear_reference(x, weight, scale), rtol=1e-6, atol=1e-6)
