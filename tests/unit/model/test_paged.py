"""The parts that reading and writing of pages is made of, each by its definition; as a whole: test_attention.py and
test_reference.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.model import paged, slots
from shoal.model.cache import PagedStep
from shoal.model.reach import Reach
from tests import pretend_gpu
from tests.pretend_gpu import pretended

F64 = torch.float64


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("kind", [F64, torch.int8])
def test_keys_and_values_go_to_their_slots_and_a_block_that_is_complete_has_its_summary(
    variance: bool, kind: torch.dtype
) -> None:
    """Of keys as they are stored, those of steps before as well; what is padding goes to unit 0, and nothing else changes."""
    heads, page, block, dim = 2, 4, 2, 3
    wide = slots.width(dim, kind)
    kv, summaries = (
        torch.zeros(4, heads, page, wide, dtype=kind),
        torch.full((4, heads, page // block, 2 * dim), 9.0, dtype=F64),
    )
    summaries = summaries if variance else summaries[..., :dim].contiguous()
    early, values = drawn(1, heads, dim), drawn(2, heads, dim)
    kv[3, :, 0] = slots.encode(early, values, kind)
    before, old = kv.clone(), summaries.clone()
    # the second token of unit 3's first block; the first of a block; padding, though its block would be complete
    at, places = torch.tensor([5, 2, 1]), torch.tensor([3 * page + 1, 1 * page + 2, -1])
    k, v = drawn(3, 3, heads, dim), drawn(4, 3, heads, dim)
    paged.write_kv(
        k, v, kv, summaries, PagedStep(at, places, torch.tensor([[2, 3], [1, 0], [0, 0]]), [0, 1, 2, 3], page, block)
    )
    want = before.clone()
    for n, (unit, offset) in enumerate(((3, 1), (1, 2), (0, 0))):
        want[unit, :, offset] = slots.encode(k[n], v[n], kind)
    assert torch.equal(kv, want)
    stored = slots.decode(kv[3, :, :2], F64)[0]  # [heads, 2, dim]
    assert kind != F64 or torch.equal(stored, torch.stack([early, k[0]], dim=1))
    mean = stored.mean(1)
    whole = torch.cat([mean, (stored - mean[:, None]).square().mean(1)], dim=-1) if variance else mean
    torch.testing.assert_close(summaries[3, :, 0], whole, rtol=0, atol=1e-15)
    summaries[3, :, 0] = old[3, :, 0]
    assert torch.equal(summaries[1:], old[1:])


def reach_of(kind: str, heads: int) -> Reach:
    gate = drawn(1, heads).sigmoid()
    return {
        "hybrid": Reach(3, 2, 1, gate), "sparse": Reach(3, 2, 1, None, gate, 8), "local": Reach(3, 2, 1, None),
        "dense": Reach(3, 2, 1, None, None, 1 << 40),
    }[kind]  # fmt: skip


class Stored:
    """Pages with the keys and values of a request of 31 tokens, and of one of 7."""

    PAGE, BLOCK, HEADS, DIM = 4, 2, 3, 4
    LENGTHS = (31, 7)
    TABLES = torch.tensor([[*range(1, 9)], [9, 10, *[0] * 6]])

    def __init__(self) -> None:
        self.kv = drawn(5, 11, self.HEADS, self.PAGE, 2 * self.DIM)
        self.summaries = drawn(6, 11, self.HEADS, self.PAGE // self.BLOCK, self.DIM)
        self.queries = [drawn(length, length, 2 * self.HEADS, self.DIM) for length in self.LENGTHS]

    def read(self, reach: Reach, *chunks: tuple[int, int, int]) -> Tensor:
        """What rows read in one step; of each request of it which one it is, its first row, and the end."""
        at = torch.cat([torch.arange(first, end) for _, first, end in chunks])
        starts = [0, *torch.tensor([end - first for _, first, end in chunks]).cumsum(0).tolist()]
        tables = self.TABLES[[r for r, _, _ in chunks]]
        step = PagedStep(at, torch.zeros_like(at), tables, starts, self.PAGE, self.BLOCK)
        q = torch.cat([self.queries[r][first:end] for r, first, end in chunks])
        return paged.paged_attention(q, self.kv, self.summaries, step, reach)


@pytest.mark.parametrize("kind", ["hybrid", "sparse", "local", "dense"])
@torch.no_grad()
def test_a_row_reads_the_same_alone_beside_others_and_in_a_chunk_of_any_length(kind: str) -> None:
    """A short request beside a long one, as well, and what decodes beside a chunk."""
    stored, reach = Stored(), reach_of(kind, 6)
    alone = [torch.cat([stored.read(reach, (r, at, at + 1)) for at in range(end)]) for r, end in enumerate((31, 7))]
    assert all(each.isfinite().all() for each in alone)
    for chunks in (
        [(0, 30, 31), (1, 6, 7)],
        [(1, 3, 4), (0, 12, 13)],
        [(0, 0, 31)],
        [(1, 5, 7)],
        [(1, 0, 2), (0, 27, 31)],
        [(0, 9, 12), (1, 6, 7)],
        [(1, 2, 3), (0, 29, 31)],
    ):
        want = torch.cat([alone[r][first:end] for r, first, end in chunks])
        torch.testing.assert_close(stored.read(reach, *chunks), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hybrid", "sparse", "local"])
def test_a_row_that_decodes_far_from_its_beginning_does_not_read_all(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "_all", lambda *_: pytest.fail("all of it"))
    Stored().read(reach_of(kind, 6), (0, 30, 31))


@pytest.mark.parametrize("kind", ["hybrid", "sparse", "local", "dense"])
@pytest.mark.parametrize("chunk", [False, True])
@torch.no_grad()
def test_pages_are_written_and_read_where_they_lie(kind: str, chunk: bool) -> None:
    """A long request, and a short one of one row or of three, on a GPU that is pretended: nothing mixes devices."""
    heads, page, block, dim = 2, 4, 2, 4
    reach = reach_of(kind, 2 * heads)
    tables = torch.tensor([[*range(1, 9)], [9, 10, *[0] * 6]])
    at = torch.tensor([30, *([4, 5, 6] if chunk else [6])])
    owner = torch.tensor([0, *[1] * (len(at) - 1)])
    places = tables[owner, at // page] * page + at % page
    q, k, v = drawn(2, len(at), 2 * heads, dim), drawn(3, len(at), heads, dim), drawn(4, len(at), heads, dim)
    kv, summaries = drawn(5, 11, heads, page, 2 * dim), drawn(6, 11, heads, page // block, 2 * dim)

    def run(device: torch.device) -> list[Tensor]:
        queries, keys, values = (each.to(device) for each in (q, k, v))
        memory, means = (each.to(device, copy=True) for each in (kv, summaries))
        positions, slots_, pages = (each.to(device) for each in (at, places, tables))
        step = PagedStep(positions, slots_, pages, [0, 1, len(at)], page, block)
        gamma, bias = (None if each is None else each.to(device) for each in (reach.gamma, reach.bias))
        own = Reach(reach.window, reach.top_k, reach.sinks, gamma, bias, reach.dense)
        paged.write_kv(keys, values, memory, means, step)
        pretend_gpu.waited.clear()
        return [paged.paged_attention(queries, memory, means, step, own), memory, means]

    here = run(torch.device("cpu"))
    with pretended() as gpu:
        there: list[Any] = run(gpu)
        assert kind != "dense" or not any("nonzero" in what for what in pretend_gpu.waited), (
            "nobody counts what is stale"
        )
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one.held, other, rtol=0, atol=1e-12)
