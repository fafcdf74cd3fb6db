"""Attention over pages in Triton against the definition in float64 (`reference.py`), and the choice of blocks for itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.model import paged, reference
from shoal.model.gpu import launch
from shoal.model.reach import ALL, Reach
from tests.triton.seen import KINDS, NOBODY, Seen, attended
from tests.triton.stored import Stored, store

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

# of the largest value: rounding of sums in fp32; in bf16 each weight and the result are of 8 bits, and lose at most 2^-8 each,
# which the interpreter cuts where a GPU rounds
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
MARGIN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # scores are fp32 in bf16 too


def whole(case: Stored, request: int) -> tuple[Tensor, Tensor, Tensor, slice]:
    """q, k and v [1, n, heads, d] of a request in float64, with noise for other queries than those that the slice names."""
    n, span = len(case.k[request]), slice(*case.step.starts[request : request + 2])
    q = torch.randn(n, *case.q.shape[1:], dtype=torch.float64)
    asked = slice(n - (span.stop - span.start), n)
    q[asked] = case.q[span].double()
    return q[None], case.k[request].double()[None], case.v[request].double()[None], asked


def margin(case: Stored, request: int, reach: Reach, block: int) -> Tensor:
    """How far the K-th best score of each row of a request is from the next, relative, the least of all KV heads [n]."""
    q, k, _, asked = whole(case, request)
    scores = reference.block_scores(q[0].transpose(0, 1), k[0].transpose(0, 1), block, "mean")[
        :, asked, reach.sinks :
    ].exp()
    if scores.shape[-1] <= (most := reach.top_k - reach.sinks):
        return torch.ones(scores.shape[1])
    best = scores.sort(-1, descending=True).values
    return ((best[..., most - 1] - best[..., most]) / best[..., most - 1].clamp(min=1e-300)).amin(0)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4)]),
    sizes=st.sampled_from([(8, 4), (8, 8), (4, 1), (16, 4)]),
    window=st.integers(1, 40),
    top_k=st.integers(1, 6),
    dim=st.sampled_from([8, 16, 24]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    programs=st.sampled_from([1, 264]),
    few=st.sampled_from([0, 2**14]),
    new=st.integers(1, 3),
)
def test_both_branches_are_the_definition(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    window: int,
    top_k: int,
    dim: int,
    dtype: torch.dtype,
    programs: int,
    few: int,
    new: int,
) -> None:
    """Ragged lengths, groups, pages and blocks, by one program or in pieces, which score for themselves or have teams; several
    rows a request, as in verification and prefill."""
    (page, block), (kv_heads, group) = sizes, heads
    case = store(
        seed, lengths, [min(new, n) for n in lengths],
        kv_heads=kv_heads, group=group, dim=dim, page=page, block=block, dtype=dtype,
    )  # fmt: skip
    gamma = torch.rand(kv_heads * group, dtype=torch.float64)
    reach = Reach(window, top_k, min(1, top_k), gamma)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PROGRAMS", programs)
        patch.setattr(launch, "FEW_NUMBERS", few)
        patch.setattr(launch, "ALONE_BLOCKS", few)
        patch.setattr(launch, "TILE", 16)
        patch.setattr(launch, "LEAST_KEYS", 16)
        got = attended(case, dataclasses.replace(reach, gamma=gamma.to(launch.fp(dtype)))).double()
    for r in range(len(lengths)):
        q, k, v, asked = whole(case, r)
        want = reference.reference_attention(
            q, k, v, window=window, block=block, top_k=top_k, sinks=reach.sinks, local_weight=gamma
        )[0, asked]
        sure = margin(case, r, reach, block) > MARGIN[dtype]
        off = (got[slice(*case.step.starts[r : r + 2])] - want).abs().amax((1, 2))[sure]
        assert (off <= BOUNDS[dtype] * v.abs().max().clamp(min=1)).all()


def chosen_of(seen: Seen, row: int, head: int) -> list[int]:
    """Of the last launch: the one list that all who read chosen blocks have made, each in memory of its own."""
    lists = [found for found in seen.given[-1]["chosen"][row, head].tolist() if NOBODY not in found]
    assert all(found == lists[0] for found in lists)
    return [block for block in lists[0] if block >= 0]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(20, 120),
    heads=st.sampled_from([(2, 1), (1, 4)]),
    top_k=st.integers(1, 5),
    sinks=st.integers(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    equal=st.booleans(),
    few=st.sampled_from([0, 2**14]),
    pieces=st.sampled_from([1, 2]),
)
def test_the_chosen_blocks_are_those_of_the_definition(
    seed: int, length: int, heads: tuple[int, int], top_k: int, sinks: int, dtype: torch.dtype, equal: bool, few: int,
    pieces: int, seen: Seen,
) -> None:  # fmt: skip
    """Wherever scores differ by more than rounding; and where all are equal, to the bit, the lower blocks. By each program
    that reads some of them the same, to the bit."""
    case = store(seed, [length], [2], kv_heads=heads[0], group=heads[1], dtype=dtype)
    if equal:
        case.q.zero_()
    reach = Reach(5, top_k, sinks, torch.ones(heads[0] * heads[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "FEW_NUMBERS", few)
        patch.setattr(launch, "ALONE_BLOCKS", few)
        patch.setattr(launch, "_tile", lambda q: 4)  # so that each piece has some of the K + 1 blocks
        patch.setattr(launch, "_pieces", lambda programs, near, far: (pieces, pieces))
        attended(case, reach)
    q, k, _, asked = whole(case, 0)
    scores = reference.block_scores(q[0].transpose(0, 1), k[0].transpose(0, 1), 4, "mean")
    if equal:
        scores = torch.where(scores.isfinite(), 0.0, scores)
    want = reference.chosen_blocks(scores, 4, top_k, sinks)[:, asked]  # [Hk, n, N]
    sure = margin(case, 0, reach, 4) > MARGIN[dtype]
    for row in range(2):
        for head in range(heads[0]):
            blocks = chosen_of(seen, row, head)
            assert blocks == sorted(set(blocks)) and len(blocks) == min(top_k, (int(case.step.positions[row]) + 1) // 4)
            if sure[row] or equal:
                assert blocks == want[head, row].nonzero().flatten().tolist()


@pytest.mark.parametrize("few", [0, 2**14])
@pytest.mark.parametrize("heads", [1, 2])
def test_both_zeros_are_one_score(heads: int, few: int, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training and in torch, so that the lower block is read; a product that rounds to nothing may be either."""
    from triton import language as tl

    from shoal.model.gpu import attention

    def scored(own: Any, *given: Any) -> Any:
        b = given[3]
        z = tl.where(b == 0, 5.0, 0.0) * tl.where((b == 1) | (b == 4), -1.0, 1.0)
        return tl.broadcast_to(z[None, :], own.shape[0], b.shape[0])

    monkeypatch.setattr(attention, "_rated", scored)
    monkeypatch.setattr(launch, "FEW_NUMBERS", few)
    monkeypatch.setattr(launch, "ALONE_BLOCKS", few)
    case = store(1, [12], [1], kv_heads=1, group=heads, page=12, block=2, dtype=torch.float32)
    case.step.tables = case.step.tables[:, :1]
    attended(case, Reach(3, 3, 1, torch.ones(heads)))
    assert seen.given[-1]["SHARED"] == (few == 0) and chosen_of(seen, 0, 0) == [0, 1, 2]
    zeros = seen.given[-1]["z"].view(heads, 6)
    assert torch.equal(torch.signbit(zeros[0]), torch.tensor([False, True, False, False, True, False]))


@pytest.fixture(params=[1, 2])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Into how many pieces the keys of a branch are cut: of one, one program reads all of a row."""
    pieces: int = request.param
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (pieces, pieces * (far > 0)))
    return pieces


@pytest.mark.parametrize("dense", [0, 40])
@pytest.mark.parametrize("kv_dtype", [torch.float64, torch.int8])
def test_one_softmax_is_the_definition(dense: int, kv_dtype: torch.dtype, cut: int) -> None:
    """Sparse layers, by the torch path that `test_sparse` holds against their equations: some rows before the dense length."""
    case = store(3, [70, 38, 41, 1], [3, 2, 1, 1], kv_dtype=kv_dtype)
    reach = Reach(10, 3, 1, None, torch.randn(4, dtype=torch.float64), dense)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(launch, "ON", set())
        want = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    torch.testing.assert_close(attended(case, reach), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("window", "dense"), [(7, 0), (ALL, ALL)])
def test_the_window_alone_and_all_of_the_context(window: int, dense: int, cut: int) -> None:
    case = store(4, [50, 9], [1, 4])
    got = attended(case, Reach(window, 0, 0, None, dense=dense))
    for r in range(2):
        q, k, v, asked = whole(case, r)
        want = reference.reference_attention(q, k, v, window=window, block=4, top_k=1, sinks=0, local_weight=1.0)[
            0, asked
        ]
        torch.testing.assert_close(got[slice(*case.step.starts[r : r + 2])], want, atol=1e-12, rtol=0)


def test_the_variance_is_scored(cut: int) -> None:
    case = store(5, [90], [2], variance=True)
    gamma = torch.full((4,), 0.3, dtype=torch.float64)
    q, k, v, asked = whole(case, 0)
    how = {"window": 6, "block": 4, "top_k": 3, "sinks": 1, "local_weight": gamma}
    want = reference.reference_attention(q, k, v, **how, summary="mean_var")[0, asked]
    torch.testing.assert_close(attended(case, Reach(6, 3, 1, gamma)), want, atol=1e-12, rtol=0)
    other = reference.reference_attention(q, k, v, **how)[0, asked]
    assert (other - want).abs().max() > 1e-3


def test_where_rows_are_many_each_is_attended_by_one_program() -> None:
    """But not where one of them may read so much that the others would wait for it."""
    assert launch._pieces(launch.BUSY, 1024, 1088) == (1, 1) and launch._pieces(launch.BUSY, 512, 0) == (1, 0)
    assert min(launch._pieces(launch.BUSY, 2**17, 0)) == 0 and launch._pieces(launch.BUSY, 2**17, 0)[0] > 1
    assert min(launch._pieces(2, 1024, 1088)) > 4
    assert launch._pieces(2, 512, 33 * 32) == (4, 8), "a row of 1b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["query", "window", "chosen"])
def test_what_is_no_number_is_not_lost(kind: str, where: str, cut: int) -> None:
    """A row that holds a NaN is NaN, as in torch: a piece of NaNs was taken for one without keys, and a model that is broken
    would have answered as if nothing were."""
    case = store(3, [70], [1], kv_heads=1, group=4)
    if where == "query":
        case.q.fill_(torch.nan)
    else:
        t = 69 if where == "window" else 1  # the first block is a sink
        case.kv[case.step.tables[0, t // 8], :, t % 8, :16] = torch.nan
    found = attended(case, KINDS[kind])
    assert found.isnan().all() == (kind != "L" or where != "chosen")


def test_no_rows_are_no_launch() -> None:
    """Of a layer with the window alone, too."""
    case = store(1, [9], [0])
    for reach in (Reach(4, 2, 1, torch.ones(4)), Reach(4, 0, 0, None)):
        assert attended(case, reach).shape == (0, 4, 16)


def test_a_pool_of_more_numbers_than_32_bits_count_is_reached(tmp_path: Path, cut: int) -> None:
    """The last unit of it, in a file that is nearly all holes, where what 32 bits would make of its place is a hole, too."""
    case, reach = store(8, [30], [1], dtype=torch.float32), Reach(6, 3, 1, torch.full((4,), 0.5))
    want, each = attended(case, reach), case.kv[0].numel()
    units = 2**31 // each + len(case.kv) + 1
    memory = torch.from_numpy(np.memmap(tmp_path / "holes", np.float32, "w+", shape=units * each))
    kv, used = memory.view(units, *case.kv.shape[1:]), case.step.tables != 0
    means = torch.from_numpy(np.memmap(tmp_path / "means", np.float32, "w+", shape=units * case.summaries[0].numel()))
    summaries = means.view(units, *case.summaries.shape[1:])
    moved = torch.where(used, case.step.tables + units - len(case.kv), 0)
    kv[moved[used]], summaries[moved[used]] = case.kv[case.step.tables[used]], case.summaries[case.step.tables[used]]
    assert int(moved.max()) * each > 2**31
    step = dataclasses.replace(case.step, tables=moved, shared=None)
    assert torch.equal(launch.attend(case.q, kv, summaries, step, reach), want)


def test_rows_are_attended_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the scores of a long prompt never exist at once."""
    case, reach = store(6, [60, 44], [3, 2]), Reach(6, 3, 1, torch.full((4,), 0.5, dtype=torch.float64))
    want = attended(case, reach)
    monkeypatch.setattr(launch, "SCORED", 2 * 4 * case.step.tables.shape[1] * 2)
    assert torch.equal(attended(case, reach), want)


def test_long_prompts_in_dense_layers_share_their_keys() -> None:
    """A row that reads all of the context by itself would read it as often as there are rows."""
    case = store(7, [60], [launch.LONG + 1])
    dense, local = Reach(ALL, 0, 0, None, dense=ALL), Reach(9, 0, 0, None)
    assert launch.shared(case.step, dense) == [(0, launch.LONG + 1)] and not launch.shared(case.step, local)
    assert not launch.shared(store(7, [60], [launch.LONG]).step, dense)
