"""What the model asks of whoever owns the K/V memory: one `GroupCache` per pool, one `PagedStep` per forward.

Shapes: U units, P slots a page, S tokens a block, Lg layers in a group, Hk KV heads, d head dim; N new tokens of R
requests in one step; M units in the longest block table.

Layer j of a group sees ``kv[j]`` [U, Hk, P, W]: W = 2d numbers a slot, keys before values, which is the layout that vLLM uses,
so that one operation can serve both engines; or levels in int8 with their scales (`slots`). Unit 0 is the null unit: it pads
tables and is never allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.model.sending import sent
from shoal.model.slots import width as slot_width

if TYPE_CHECKING:
    from shoal.model.adapters import Beside

T = TypeVar("T")


@dataclass
class GroupCache:
    """`kv` [Lg, U, Hk, P, W], and what its blocks are scored by, `summaries` [Lg, U, Hk, P/S, m] (fp32 or better): the mean of
    the stored keys (m = d), or their mean and variance (m = 2d).

    A unit belongs to one layer group at a time; which one is the allocator's knowledge, not the memory's.
    """

    kv: Tensor
    summaries: Tensor

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        units: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype | None = None,
    ) -> GroupCache:
        """Memory of `units` units for a model that computes in `dtype`; keys and values in `kv_dtype`, that or int8."""
        lead = (config.group_layers, units, config.kv_heads)
        exact, stored = torch.promote_types(dtype, torch.float32), kv_dtype or dtype
        return cls(
            torch.zeros(*lead, config.page, slot_width(config.head_dim, stored), dtype=stored, device=device),
            torch.zeros(*lead, config.page // config.block, config.summary_values, dtype=exact, device=device),
        )


class Rows:
    """What the layer groups of one forward share: who has which rows, and what follows from that alone. Every derived
    piece is computed once a forward, at its first use, and not once a layer.

    positions [N]  absolute position of each new token, from 0
    starts [R+1]   request r owns rows starts[r] .. starts[r+1]-1, in order
    whole          rows that these are the first of
    ends [R]       position of each request's last row, where the host knows it; those of others may follow
    apart          several rows may be of one request all the same: each has a table of its own, of the same units
    """

    def __init__(
        self,
        positions: Tensor,
        starts: list[int],
        page: int,
        block: int,
        whole: Rows | None = None,
        ends: list[int] | None = None,
        *,
        apart: bool = False,
    ) -> None:
        self.positions, self.starts, self.page, self.block, self._whole = positions, starts, page, block, whole
        self._ends = ends
        counts = self._counts = [end - start for start, end in pairwise(starts)]
        self.singles = [r for r, count in enumerate(counts) if count == 1]  # they decode together
        self.chunks = [r for r, count in enumerate(counts) if count > 1]  # prefill, verification: each for itself
        self.longest = max(counts, default=0)  # rows of one request
        self.apart = apart
        self._made: dict[Hashable, Any] = {}

    def of_at_least(self, least: int) -> list[tuple[int, int]]:
        """The requests with so many rows, and how many each has."""
        return [(r, count) for r, count in enumerate(self._counts) if count >= least]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when `key` was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def by_row(self, key: Hashable, make: Callable[[], T]) -> T:
        """`once`, of a tuple of arrays with a place for each row: the beginnings of those that `whole` has, if it has them."""
        there: Any = None if self._whole is None else self._whole._made.get(key)
        return self.once(key, make if there is None else lambda: tuple(part[: len(self.positions)] for part in there))  # type: ignore[return-value]

    @cached_property
    def offsets(self) -> Tensor:
        """Slot of each row within its page, [N]."""
        return self.positions % self.page

    @cached_property
    def block_ends(self) -> Tensor:
        """Rows whose token completes a block, so that the block's summary is written, [E]."""
        return ((self.positions + 1) % self.block == 0).nonzero().flatten()

    @cached_property
    def last(self) -> Tensor:
        """Position of each request's last row, [R]."""
        if not self.chunks:
            return self.positions
        if len(self.starts) == 2:
            return self.positions[-1:]
        return self.positions[sent(self.starts[1:], self.positions.device) - 1]

    @cached_property
    def single_rows(self) -> Tensor:
        """Row of each of `singles`."""
        return sent([self.starts[r] for r in self.singles], self.positions.device)

    @cached_property
    def single_requests(self) -> Tensor:
        """`singles` where the rows are."""
        return sent(self.singles, self.positions.device)

    @cached_property
    def single(self) -> Rows:
        """`singles` alone."""
        rows = self.single_rows
        return Rows(self.positions[rows], list(range(len(rows) + 1)), self.page, self.block)

    def parted(self, position: int) -> tuple[tuple[Tensor, Rows], tuple[Tensor, Rows]]:
        """Of one row a request: which stand before a position, and which do not, each with these alone."""
        before = self.positions < position
        places = [each.nonzero().flatten() for each in (before, ~before)]
        early, late = ((at, Rows(self.positions[at], list(range(len(at) + 1)), self.page, self.block)) for at in places)
        return early, late

    def of(self, request: int, count: int | None = None) -> Rows:
        """One of `chunks` alone, or its first `count` rows."""
        start, many = self.starts[request], self._counts[request]
        count = many if count is None else count
        positions, ends = self.positions[start : start + count], self._ends and [self._ends[request] + count - many]
        return self.once((request, count), lambda: Rows(positions, [0, count], self.page, self.block, ends=ends))

    def end(self, request: int) -> int:
        """Position of the last row of a request. A device is waited for where nobody has said it."""
        if self._ends is not None:
            return self._ends[request]
        return self.once(("end", request), lambda: int(self.positions[self.starts[request + 1] - 1]))


@dataclass
class PagedStep:
    """Where the N new tokens of one forward stand, for one layer group. The rows of a request are contiguous and in order.

    positions [N]  absolute position of each new token, from 0
    slots [N]      unit * P + offset that its K/V are written to (-1: padding, written to the null unit)
    tables [R, M]  units of each request's pages in order, padded with 0
    starts [R+1]   request r owns rows starts[r] .. starts[r+1]-1
    shared         what all groups share; made at its first use when it is not given
    beside         what adapters add to the linears' outputs
    writes, reads  give `write_rows` of `slots` and `read_rows` of `tables`; made of these when they are not given
    """

    positions: Tensor
    slots: Tensor
    tables: Tensor
    starts: list[int]
    page: int
    block: int
    shared: Rows | None = None
    writes: Callable[[], Tensor] | None = None
    reads: Callable[[], Tensor] | None = None
    beside: Beside | None = None
    _written: Tensor | None = None
    _read: Tensor | None = None

    @cached_property
    def rows(self) -> Rows:
        """What all groups share."""
        return self.shared or Rows(self.positions, self.starts, self.page, self.block)

    @cached_property
    def units(self) -> Tensor:
        """Unit that each new token is written to, [N]."""
        return self.slots.clamp(min=0) // self.page

    def written(self, kv_heads: int) -> Tensor:
        """`write_rows` of this step."""
        if self._written is None:
            self._written = self.writes() if self.writes else write_rows(self.slots, kv_heads, self.page)
        return self._written

    def read(self, kv_heads: int) -> Tensor:
        """`read_rows` of this step."""
        if self._read is None:
            self._read = self.reads() if self.reads else read_rows(self.tables, kv_heads)
        return self._read


def write_rows(slots: Tensor, kv_heads: int, page: int) -> Tensor:
    """Where each new token's keys and values go, in a unit memory seen as [U * Hk * P, W]: [.., N * Hk] for [.., N]."""
    at = slots.clamp(min=0)
    heads = torch.arange(0, kv_heads * page, page, device=slots.device)
    return ((at // page * (kv_heads * page) + at % page)[..., None] + heads).flatten(-2)


def read_rows(tables: Tensor, kv_heads: int) -> Tensor:
    """The pages of each request and KV head, in a unit memory seen as [U * Hk, ...]: [.., R, Hk, M] for [.., R, M]."""
    return tables[..., None, :] * kv_heads + torch.arange(kv_heads, device=tables.device)[:, None]
