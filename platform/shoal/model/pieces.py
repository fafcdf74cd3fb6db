"""A text through a network in pieces of bounded size, as an engine runs a prompt: the next reads the keys and values of those
before it, which lie in memory of the text's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.model.adapters import Adapter, alone
from shoal.model.cache import GroupCache, PagedStep, Rows
from shoal.model.net import Net


def in_pieces(net: Net, x: Tensor, layers: int, rows: int, adapter: Adapter | None = None) -> Iterator[Tensor]:
    """Hidden states [n, D] after `layers` layers of one text with the inputs `x` [T, D]: at most `rows` at a time, each made
    when it is asked for."""
    c = net.config
    groups, pages = c.groups(layers), -(-len(x) // c.page)
    cache = GroupCache.zeros(c, 1 + groups * pages, net.dtype, net.device)  # the null unit included
    tables = 1 + torch.arange(groups * pages, device=net.device).view(groups, 1, pages)
    for start in range(0, len(x), rows):
        piece = x[start : start + rows]
        end = start + len(piece)
        at = torch.arange(start, end, device=net.device)
        beside, shared = alone(net, adapter, len(piece)), Rows(at, [0, len(piece)], c.page, c.block, ends=[end - 1])
        for group, own in zip(net.groups, tables, strict=False):
            slots = own[0, at // c.page] * c.page + at % c.page
            reads = own[:, : -(-end // c.page)].contiguous()
            step = PagedStep(at, slots, reads, shared.starts, c.page, c.block, shared, beside=beside)
            piece = group.paged(piece, step, cache)  # type: ignore[operator]
        yield piece
