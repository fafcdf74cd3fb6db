"""Requests of some lengths in pages, by the torch functions, for kernels to read.

Letters: N rows, R requests, H query heads, Hk KV heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.model import paged, slots
from shoal.model.cache import PagedStep


@dataclass
class Stored:
    """`lengths` tokens of each request, the last `new` of which are the rows of `step`. q [N, H, d]; k and v [R][n, Hk, d] as
    they were given; memory holds NaN wherever nothing was written."""

    q: Tensor
    k: list[Tensor]
    v: list[Tensor]
    kv: Tensor
    summaries: Tensor
    step: PagedStep

    @property
    def requests(self) -> Tensor:
        """Of each row, [N]."""
        starts = self.step.starts
        return torch.tensor([r for r in range(len(starts) - 1) for _ in range(starts[r], starts[r + 1])])


def step_of(tables: Tensor, spans: Sequence[tuple[int, int]], page: int, block: int) -> PagedStep:
    positions = [t for begin, end in spans for t in range(begin, end)]
    slot = [int(tables[r, t // page]) * page + t % page for r, span in enumerate(spans) for t in range(*span)]
    starts = [0]
    for begin, end in spans:
        starts.append(starts[-1] + end - begin)
    return PagedStep(torch.tensor(positions), torch.tensor(slot), tables, starts, page, block)


def store(
    seed: int,
    lengths: Sequence[int],
    new: Sequence[int],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    page: int = 8,
    block: int = 4,
    dtype: torch.dtype = torch.float64,
    kv_dtype: torch.dtype | None = None,
    variance: bool = False,
) -> Stored:
    """Pages in an order drawn from `seed`, and tables of one unit more than the longest needs."""
    g = torch.Generator().manual_seed(seed)
    needs = [-(-n // page) for n in lengths]
    order, tables = (
        (torch.randperm(sum(needs), generator=g) + 1).tolist(),
        torch.zeros(len(lengths), max(needs) + 1).long(),
    )
    for r, need in enumerate(needs):
        tables[r, :need] = torch.tensor([order.pop() for _ in range(need)])
    kind = kv_dtype or dtype
    kv = torch.full((sum(needs) + 1, kv_heads, page, slots.width(dim, kind)), -1 if kind == torch.int8 else torch.nan)
    exact = torch.promote_types(dtype, torch.float32)
    summaries = torch.full((len(kv), kv_heads, page // block, dim * (1 + variance)), torch.nan, dtype=exact)
    made = Stored(
        torch.empty(0), [], [], kv.to(kind), summaries, step_of(tables, [(0, n) for n in lengths], page, block)
    )
    for n in lengths:
        made.k.append(torch.randn(n, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype))
        made.v.append(torch.randn(n, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype))
    paged.write_kv(torch.cat(made.k), torch.cat(made.v), made.kv, made.summaries, made.step)
    made.step = step_of(tables, [(n - c, n) for n, c in zip(lengths, new, strict=True)], page, block)
    rows = len(made.step.positions)
    made.q = torch.randn(rows, kv_heads * group, dim, generator=g, dtype=torch.float64).to(dtype)
    return made
